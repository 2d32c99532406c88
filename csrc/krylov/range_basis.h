// An orthonormal basis of part of the range of a symmetric operator A, its products, and what is left of A
// outside of it.
//
// With Q (m, P) the basis, Q Qᵀ = I, Z = Q A, and Pi = Qᵀ Q the projector on it,
//
//     A = Pi A + A Pi - Pi A Pi + (I - Pi) A (I - Pi)
//
// whose first three terms are known from Q and Z, whatever Q is: nothing is assumed of it. The last term is
// what the stochastic estimators sample: Hutch++ (Meyer, Musco, Musco and Woodruff, "Hutch++: optimal
// stochastic trace estimation", SOSA 2021, algorithm 1), deflation by approximate eigenvectors, and XTrace
// (leave_one_out.h).
//
// Beyond the members of a Space that block_lanczos.h names, here
//     columns(X, first, n)      n consecutive columns of the rows X, sharing memory
//     column_dots(X, Y)         sum_k x_k * y_k, entry by entry, in float64
//     norms(X)                  the rows' lengths
//     gram_there(X, Y)          X Yᵀ as Numbers, which stay on the vectors' device
//     row_dots(X, Y)            <x_i, y_i>, (1, p), in float64, as Numbers
//     fetch(numbers)            the matrices, all of them at once
//
// Ledger of extending m rows by b: b products with A; 4 m b P words' worth of projection, 2 m b P of H.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "linear_solve.h"
#include "matrix.h"
#include "orthonormalise.h"

namespace flatcore::krylov {

template <class Space>
class RangeBasis {
 public:
    using Block = typename Space::Block;

    explicit RangeBasis(Space& space) : space_(space), Q_(space.allocate(0)), Z_(space.allocate(0)) {}

    int64_t rows() const { return m_; }
    Block Q() { return space_.rows(Q_, 0, m_); }
    Block Z() { return space_.rows(Z_, 0, m_); }
    const Matrix& projected() const { return H_; }  // H = Q A Qᵀ, (m, m)
    // Y = F Q of all blocks that came, (m, m), to the rounding of Y.
    const Matrix& coefficients() const { return F_; }
    // F with entries of that rounding, for the random rows, which make it invertible.
    const Matrix& invertible_coefficients() const { return L_; }

    // The span of Y (b, P), which is overwritten, joins the basis with b rows, one product each. Where rows
    // of Y lie in the basis already, to rounding, random rows take their place.
    void extend(Block Y) {
        const int64_t b = space_.count(Y), old = m_;
        reserve(old + b);
        for (const double length : space_.norms(Y)) scale_ = std::max(scale_, length);
        if (!std::isfinite(scale_)) throw OperatorError(kNotFinite);
        const double drop = kRounding * space_.epsilon() * scale_;

        Projection once = space_.project(Y, Q());
        Matrix inside = std::move(once.inside);
        Orthonormal<Block> first = orthonormalise(space_, Y, std::move(once.gram), drop);
        Projection twice = space_.project(first.rows, Q());
        add(inside, multiply(first.factor, twice.inside));
        const Orthonormal<Block> second =
            orthonormalise(space_, first.rows, std::move(twice.gram), kLostLength);
        const int64_t fresh = space_.count(second.rows);
        space_.assign(space_.rows(Q_, old, fresh), second.rows);
        m_ = old + fresh;
        fill(old + b);

        const Matrix outside = multiply(first.factor, second.factor);
        append_rows(F_, inside, padded(outside, b, b));
        append_rows(L_, inside, completed(outside, scale_ > 0.0 ? drop : 1.0));
        multiply_new_rows(old);
    }

    // Y = V A becomes V (I - Pi) A (I - Pi).
    void remainder(const Block& V, Block& Y) {
        space_.update(Y, space_.gram_there(V, Q()), Z());
        space_.update(Y, space_.gram_there(Y, Q()), Q());
    }

    // The diagonal of A without its remainder, n entries from `first`: sum_k q_k * (2 z_k - (H Q)_k).
    auto known_diagonal(int64_t first, int64_t n) {
        const Block q = space_.columns(Q(), first, n);
        Block factor = space_.combine(scaled_identity(m_, 2.0), space_.columns(Z(), first, n));
        space_.update(factor, H_, q);
        return space_.column_dots(q, factor);
    }

 private:
    static constexpr double kRounding = 8.0;  // of a product, in units of its length

    void reserve(int64_t rows) {
        if (rows <= space_.count(Q_)) return;
        const int64_t capacity = std::max(rows, space_.count(Q_) + space_.count(Q_) / 2);
        for (Block* storage : {&Q_, &Z_}) {
            Block larger = space_.allocate(capacity);
            space_.assign(space_.rows(larger, 0, m_), space_.rows(*storage, 0, m_));
            *storage = larger;
        }
    }

    void fill(int64_t target) {
        for (int attempt = 0; m_ < target; ++attempt) {
            if (attempt == 8)
                throw OperatorError("A: no room for " + std::to_string(target) +
                                    " orthonormal rows; sample fewer.");
            Block W = space_.random(target - m_);
            for (int pass = 0; pass < 2; ++pass) {
                Matrix gram = space_.project(W, Q()).gram;
                W = orthonormalise(space_, W, std::move(gram), kLostLength).rows;
            }
            const int64_t r = space_.count(W);
            space_.assign(space_.rows(Q_, m_, r), W);
            m_ += r;
        }
    }

    // B (b, r) with b - r further columns of length `length`, orthogonal to its own.
    Matrix completed(const Matrix& B, double length) {
        const int64_t b = B.rows, missing = b - B.cols;
        Matrix full = padded(B, b, b);
        if (missing == 0) return full;
        const Spectral spectral = space_.eigh(multiply(B, transpose(B)));
        for (int64_t i = 0; i < b; ++i)
            for (int64_t j = 0; j < missing; ++j) full(i, B.cols + j) = length * spectral.vectors(i, j);
        return full;
    }

    static void append_rows(Matrix& whole, const Matrix& left, const Matrix& right) {
        const int64_t old = whole.rows, b = left.rows;
        whole = padded(whole, old + b, old + b);
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = 0; j < old; ++j) whole(old + i, j) = left(i, j);
            for (int64_t j = 0; j < b; ++j) whole(old + i, old + j) = right(i, j);
        }
    }

    void multiply_new_rows(int64_t old) {
        const int64_t b = m_ - old;
        Block z = space_.apply(space_.rows(Q_, old, b));
        space_.assign(space_.rows(Z_, old, b), z);
        const std::vector<Matrix> found = space_.fetch({space_.gram_there(z, Q()), space_.row_dots(z, z)});
        const Matrix& h = found[0];
        if (!all_finite(h)) throw OperatorError(kNotFinite);
        for (const double square : found[1].data) size_ = std::max(size_, std::sqrt(square));
        H_ = padded(H_, m_, m_);
        for (int64_t i = 0; i < b; ++i) {
            for (int64_t j = 0; j < old; ++j) H_(old + i, j) = H_(j, old + i) = h(i, j);
            for (int64_t j = 0; j < b; ++j) {
                const double one = h(i, old + j), other = h(j, old + i);
                if (std::abs(one - other) > std::sqrt(space_.epsilon()) * size_)
                    throw OperatorError("A is not symmetric, or two products with it differ: <u, A v> = " +
                                        std::to_string(one) + " but <A u, v> = " + std::to_string(other) +
                                        " for two unit vectors; give a symmetric operator, e.g. "
                                        "(A + A.T) / 2.");
                H_(old + i, old + j) = 0.5 * (one + other);
            }
        }
    }

    Space& space_;
    Block Q_, Z_;  // (capacity, P), the first m_ rows in use
    int64_t m_ = 0;
    Matrix H_, F_, L_;
    double scale_ = 0.0;  // longest row that came
    double size_ = 0.0;   // largest |q A| seen
};

}  // namespace flatcore::krylov
