// Block Lanczos with full reorthogonalisation, deflation and thick restart, for a symmetric operator A on
// R^P.
//
// Vectors are rows: a block is (q, P) and apply(X) = X A. The factorisation, true after every member
// function, is
//
//     V A = T V + C Q        V (m, P), V Vᵀ = I       T (m, m) = V A Vᵀ, symmetric
//                            Q (q, P), Q Qᵀ = I, V Qᵀ = 0       C (m, q), the residual's coefficients
//
// (in column notation A V = V T + R Eᵀ with R Eᵀ = Qᵀ Cᵀ). Before a restart C is zero but in the last block's
// rows and T is block tridiagonal; T is kept full, so that a restart needs no special case (Wu and Simon,
// "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22
// (2000) 602-616, section 2, for one vector). With T s = theta s, |s| = 1, the Ritz pair (theta, x = sᵀ V)
// has the residual |x A - theta x| = |sᵀ C|.
//
// A Space holds the vectors and does the work of length P:
//     Block                     a handle on (p, P) rows; rows() of one shares its memory
//     dimension(), epsilon()    P; the unit roundoff of the vectors' precision
//     count(X)                  p
//     allocate(p), random(p)    new rows, with undefined and with independent standard normal entries
//     rows(X, first, n)         n consecutive rows, sharing memory
//     select(X, i), scatter(X, i, Y), assign(X, Y)     X[i] as new rows; X[i] = Y; X = Y
//     apply(X)                  X A
//     gram(X, Y)                X Yᵀ, on the host
//     update(X, B, Y)           X -= B Y
//     combine(B, Y), combine_into(X, B, Y)      B Y as new rows; X = B Y
//     rotate(X, B)              the first rows of X become B X, in place
//     eigh(T)                   all eigenpairs of a small symmetric matrix
//
// Ledger of one step with q rows, m the basis with them: q operator applications; words moved 4 m P for the
// two projections (each reads V twice) and about 16 q P for the block itself. Memory: capacity x P for the
// basis and 5 q P.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "matrix.h"
#include "orthonormalise.h"

namespace flatcore::krylov {

template <class Space>
class BlockLanczos {
 public:
    using Block = typename Space::Block;

    // `start` (s, P), s >= 0, not necessarily orthonormal, is filled up with random rows to `width` rows, the
    // block size that is restored after every deflation.
    BlockLanczos(Space& space, const Block& start, int64_t width, int64_t capacity)
        : space_(space), width_(std::min(width, space.dimension())), storage_(space.allocate(capacity)),
          capacity_(capacity), T_(0, 0), C_(0, 0) {
        if (space_.count(start) > 0) append(project(start), 0.0);
        fill(width_);
    }

    int64_t basis_rows() const { return m_; }
    int64_t block_rows() const { return q_; }
    int64_t steps() const { return steps_; }
    int64_t applications() const { return applications_; }
    bool complete() const { return m_ == space_.dimension(); }
    // Rows a further step may need in the storage.
    int64_t rows_after_step() const { return std::min(space_.dimension(), m_ + q_ + std::max(q_, width_)); }
    int64_t capacity() const { return capacity_; }

    Block basis() { return space_.rows(storage_, 0, m_); }
    Block next_block() { return space_.rows(storage_, m_, q_); }
    const Matrix& projected() const { return T_; }
    const Matrix& coupling() const { return C_; }

    // Random rows brought in so far, as (step, rows): see EigenSolver for what they are good for.
    struct Injection {
        int64_t step;
        int64_t rows;
    };
    const std::vector<Injection>& injections() const { return injections_; }

    // One step: Q joins the basis and the next block is what A Q has outside it. Two projections, each
    // followed by an orthonormalisation, keep V Vᵀ = I to rounding (Barlow and Smoktunowicz,
    // "Reorthogonalized block classical Gram-Schmidt", Numer. Math. 123 (2013) 395-423).
    void step() {
        const int64_t q = q_;
        if (q == 0) throw std::logic_error("block Lanczos: a step without a block");
        Block W = space_.apply(next_block());
        applications_ += q;
        const int64_t old = m_;
        m_ += q;
        q_ = 0;
        Block V = basis();

        Matrix H = space_.gram(V, W);  // W = Hᵀ V + what is left
        if (!all_finite(H)) throw OperatorError(kNotFinite);
        space_.update(W, transpose(H), V);
        for (int64_t j = 0; j < q; ++j) scale_ = std::max(scale_, column_norm(H, j));
        // What is shorter than the rounding of A Q is no direction. Keeping such a row would be harmless (it
        // acts as a random one), dividing by it unchecked would not.
        Orthonormal<Block> first = orthonormalise(space_, W, 8.0 * space_.epsilon() * scale_);
        const Matrix G = space_.gram(V, first.rows);
        space_.update(first.rows, transpose(G), V);
        add(H, multiply(G, transpose(first.factor)));
        Orthonormal<Block> second = orthonormalise(space_, first.rows, kLostLength);
        Matrix B = multiply(first.factor, second.factor);
        for (int64_t j = 0; j < B.rows; ++j) scale_ = std::max(scale_, column_norm(transpose(B), j));

        grow_projected(H, old);
        const int64_t r = std::min(space_.count(second.rows), space_.dimension() - m_);
        space_.assign(space_.rows(storage_, m_, r), space_.rows(second.rows, 0, r));
        q_ = r;
        C_ = Matrix(m_, q_);
        for (int64_t i = 0; i < q; ++i)
            for (int64_t j = 0; j < q_; ++j) C_(old + i, j) = B(i, j);
        ++steps_;
        fill(width_);
    }

    // Adds random rows, orthogonal to everything, to the next block until it has `target` rows or the basis
    // is complete. They do not couple: their columns of C are zero. This is the restart after a breakdown (Q
    // empty, V A = T V: an invariant subspace) and after a partial one alike.
    void fill(int64_t target) {
        target = std::min(target, space_.dimension() - m_);
        const int64_t before = q_;
        for (int attempt = 0; attempt < 8 && q_ < target; ++attempt)
            append(project(space_.random(target - q_)), 0.0);
        if (q_ > before) injections_.push_back({steps_, q_ - before});
    }

    struct Ritz {
        std::vector<double> values;  // (m,), ascending
        Matrix vectors;              // (m, m), a column each
        std::vector<double> bounds;  // (m,), the residual norms |sᵀ C|
    };

    Ritz ritz() {
        Spectral spectral = space_.eigh(T_);
        const Matrix residuals = multiply(transpose(C_), spectral.vectors);
        std::vector<double> bounds(spectral.values.size(), 0.0);
        for (size_t i = 0; i < bounds.size(); ++i)
            bounds[i] = column_norm(residuals, static_cast<int64_t>(i));
        return {std::move(spectral.values), std::move(spectral.vectors), std::move(bounds)};
    }

    // Thick restart: the basis becomes the chosen Ritz vectors, the next block stays, and V A = T V + C Q
    // goes on holding with T = diag(theta) and C = Sᵀ C.
    void restart(const Ritz& ritz, const std::vector<int64_t>& chosen) {
        const Matrix S = columns(ritz.vectors, chosen);
        const auto kept = static_cast<int64_t>(chosen.size());
        space_.rotate(basis(), transpose(S));
        std::vector<int64_t> everything(static_cast<size_t>(q_));
        for (int64_t i = 0; i < q_; ++i) everything[static_cast<size_t>(i)] = i;
        Block Q = space_.select(next_block(), everything);
        C_ = multiply(transpose(S), C_);
        T_ = Matrix(kept, kept);
        for (int64_t i = 0; i < kept; ++i)
            T_(i, i) = ritz.values[static_cast<size_t>(chosen[static_cast<size_t>(i)])];
        m_ = kept;
        space_.assign(next_block(), Q);
    }

 private:
    // A unit row that a repeated projection shortens to less than this was rounding noise within the basis.
    static constexpr double kLostLength = 0.1;

    Block project(Block W) {
        Block known = space_.rows(storage_, 0, m_ + q_);
        if (space_.count(known) > 0) space_.update(W, space_.gram(W, known), known);
        return W;
    }

    void append(const Block& W, double drop) {
        Orthonormal<Block> first = orthonormalise(space_, W, drop);
        Orthonormal<Block> second = orthonormalise(space_, project(first.rows), kLostLength);
        const int64_t room = std::min(space_.dimension(), capacity_) - m_ - q_;
        const int64_t r = std::min(space_.count(second.rows), room);
        space_.assign(space_.rows(storage_, m_ + q_, r), space_.rows(second.rows, 0, r));
        q_ += r;
        C_ = padded(C_, m_, q_);
    }

    // T = V A Vᵀ grows by the rows of the block that joined the basis. That its entries agree with the
    // residual's coefficients C of the rows before, and across the diagonal, is the only view the method has
    // of A's symmetry.
    void grow_projected(const Matrix& H, int64_t old) {
        T_ = padded(T_, m_, m_);
        for (int64_t j = 0; j < m_ - old; ++j) {
            for (int64_t i = 0; i < old; ++i) {
                check_symmetric(H(i, j), C_(i, j));
                T_(i, old + j) = T_(old + j, i) = H(i, j);
            }
            for (int64_t i = 0; i < m_ - old; ++i) {
                check_symmetric(H(old + i, j), H(old + j, i));
                T_(old + i, old + j) = 0.5 * (H(old + i, j) + H(old + j, i));
            }
        }
    }

    // Rounding leaves differences of a few eps |A|; half of the digits is far beyond that.
    void check_symmetric(double uAv, double Auv) const {
        if (std::abs(uAv - Auv) > std::sqrt(space_.epsilon()) * scale_)
            throw OperatorError("A is not symmetric, or two products with it differ: <u, A v> = " +
                                std::to_string(uAv) + " but <A u, v> = " + std::to_string(Auv) +
                                " for two unit vectors; give a symmetric operator, e.g. (A + A.T) / 2.");
    }

    Space& space_;
    int64_t width_;  // block size that fill restores
    Block storage_;  // (capacity, P): V, then Q
    int64_t capacity_;
    int64_t m_ = 0;       // rows of V
    int64_t q_ = 0;       // rows of Q
    Matrix T_;            // (m, m)
    Matrix C_;            // (m, q)
    double scale_ = 0.0;  // largest |x A| seen, |x| = 1
    int64_t steps_ = 0;
    int64_t applications_ = 0;  // products of one vector with A
    std::vector<Injection> injections_;
};

}  // namespace flatcore::krylov
