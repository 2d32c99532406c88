// Block Lanczos with full reorthogonalisation, deflation, locking and thick restart, for a symmetric operator
// A on R^P.
//
// Vectors are rows: a block is (q, P) and apply(X) = X A. The factorisation, true after every member
// function, is
//
//     V A = T V + C Q + E    V (m, P), V Vᵀ = I       T (m, m) = V A Vᵀ, symmetric
//                            Q (q, P), Q Qᵀ = I, V Qᵀ = 0       C (m, q), the residual's coefficients
//                            E (m, P), what was left out on purpose: only its row norms `slack` are known
//
// (in column notation A V = V T + R Eᵀ with R Eᵀ = Qᵀ Cᵀ). E = 0 unless rows were locked, or rounded for
// storage. Before a restart C is zero but in the last block's rows and T is block tridiagonal; T is kept
// full, so that a restart needs no special case (Wu and Simon, "Thick-restart Lanczos method for large
// symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, section 2, for one vector).
// With T s = theta s, |s| = 1, the Ritz pair (theta, x = sᵀ V) has the residual |x A - theta x| = |sᵀ C + sᵀ
// E|.
//
// The first `locked` rows of V are converged Ritz vectors. They are neither rotated nor rediagonalised, and
// their residuals count to E; what they couple to later rows stands in T and counts to those rows' residuals.
//
// A Space does the work of length P:
//     Block                     a handle on (p, P) rows; rows() of one shares its memory
//     dimension(), epsilon()    P; the unit roundoff of the vectors' precision
//     count(X)                  p
//     allocate(p), random(p)    new rows, with undefined and with independent standard normal entries
//     allocate_pair(i, p)       rows for block 0 or 1 of a pair, which may lie where the last such block did
//     rest(X)                   X is not needed for a while
//     rows(X, first, n)         n consecutive rows, sharing memory
//     select(X, i), scatter(X, i, Y), assign(X, Y)     X[i] as new rows; X[i] = Y; X = Y
//     apply(X)                  X A
//     Numbers                   a small matrix where the vectors are, which the host does not know yet
//     gram(X, Y), lengths(X)    X Yᵀ, on the host; the lengths of the rows
//     project(X, Y)             X -= (X Yᵀ) Y; X Yᵀ and then X Xᵀ, on the host
//     update(X, B, Y)           X -= B Y
//     combine_into(X, B, Y)     X = B Y
//     rotate(X, B)              the first rows of X become B X, in place
//     cholesky_rows(X, G)       L⁻¹ X and L, G = L Lᵀ = X Xᵀ as Numbers; anything where there is no such L
//     fetch(numbers)            the matrices on the host, all of them at once
//     eigh(T)                   all eigenpairs of a small symmetric matrix
// and its Basis holds V and Q, maybe rounded, maybe elsewhere:
//     capacity(), rounding()    rows; the relative error of a stored row, 0 if there is none
//     load(first, n)            rows in full precision, maybe sharing memory
//     store(first, X)           rounds X into the rows from `first`; the errors' lengths
//     put(first, X)             the same, as Numbers
//     project(W, m)             W -= (W Vᵀ) V; V Wᵀ and then W Wᵀ, on the host; V the first m rows
//     project_there(W, m)       the same, as Numbers
//     update(W, B, m), combine_into(X, B, m)     W -= B V; X = B V
//     rotate(first, m, B)       the rows from `first` become B V, V the m rows from `first`; the errors'
//     lengths
//
// Ledger of one step with q rows, m the basis with them: q operator applications; words moved 4 m P for the
// two projections (each reads V twice) and about 16 q P for the block itself. Memory: the basis and 4 q P.
// Where vectors are on a device, the host waits for it once (outside.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "factorisation.h"
#include "outside.h"
#include "rayleigh_ritz.h"

namespace flatcore::krylov {

template <class Space>
class BlockLanczos {
 public:
    using Block = typename Space::Block;
    using Basis = typename Space::Basis;

    // Empty until fill() or begin(). `width`: the block size that is restored after every deflation.
    BlockLanczos(Space& space, Basis basis, int64_t width, double asymmetry)
        : space_(space), basis_(std::move(basis)), asymmetry_(asymmetry) {
        set_width(width);
    }

    const Factorisation& state() const { return s_; }
    void restore(Factorisation state) { s_ = std::move(state); }
    Basis& storage() { return basis_; }
    void set_width(int64_t width) { s_.width = std::min(width, space_.dimension()); }
    bool complete() const { return s_.m == space_.dimension(); }
    // Rows a further step may need in the storage.
    int64_t rows_after_step() const {
        return std::min(space_.dimension(), s_.m + s_.q + std::max(s_.q, s_.width));
    }
    void count(int64_t applications) { s_.applications += applications; }

    // Starts anew from Ritz rows. The next block is what the residuals of `going_on` have in common, those of
    // the other rows are left out.
    void begin(const RitzRows<Block>& pairs, const std::vector<int64_t>& going_on) {
        const int64_t j = space_.count(pairs.rows);
        s_.m = j;
        s_.q = s_.locked = 0;
        for (const double theta : pairs.values) s_.scale = std::max(s_.scale, std::abs(theta));
        s_.T = diagonal(pairs.values);
        s_.C = Matrix(j, 0);
        s_.slack = pairs.norms;
        for (const int64_t i : going_on) s_.slack[static_cast<size_t>(i)] = 0.0;
        s_.add_rounding(basis_.store(0, pairs.rows));
        if (!going_on.empty()) next_from(outside(space_.select(pairs.residuals, going_on)), going_on);
    }

    // One step: Q joins the basis and the next block is what A Q has outside it.
    void step() {
        const int64_t q = s_.q;
        if (q == 0) throw std::logic_error("block Lanczos: a step without a block");
        Block W = space_.apply(basis_.load(s_.m, q));
        s_.applications += q;
        const int64_t old = s_.m;
        s_.m += q;
        s_.q = 0;
        Outside<Block> next = outside(std::move(W));
        grow_projected(next.inside, old);
        s_.C = Matrix(s_.m, 0);
        s_.slack.resize(static_cast<size_t>(s_.m), 0.0);
        std::vector<int64_t> sources(static_cast<size_t>(q));
        for (int64_t i = 0; i < q; ++i) sources[static_cast<size_t>(i)] = old + i;
        next_from(std::move(next), sources);
        ++s_.steps;
        fill(s_.width);
    }

    // Adds random rows, orthogonal to everything, to the next block until it has `target` rows or the basis
    // is complete. They do not couple: their columns of C are zero. This is the start, and the restart after
    // a breakdown (Q empty, V A = T V: an invariant subspace) and after a partial one.
    void fill(int64_t target) {
        target = std::min(target, space_.dimension() - s_.m);
        const int64_t before = s_.q;
        for (int attempt = 0; attempt < 8 && s_.q < target; ++attempt) append(space_.random(target - s_.q));
        if (s_.q > before) s_.injections.push_back({s_.steps, s_.q - before});
    }

    void unlock() { s_.locked = 0; }

    // For rows that are all locked: what they couple to in the next block counts to E already.
    void drop_next() {
        s_.q = 0;
        s_.C = Matrix(s_.m, 0);
    }

    Ritz ritz() const { return ritz_pairs(space_, s_); }

    // Thick restart: the basis becomes the locked rows and the chosen Ritz vectors, of which the first
    // `converged` are locked as well; the next block stays, and V A = T V + C Q + E goes on holding with
    // T = diag(theta) and C = Sᵀ C.
    void restart(const Ritz& ritz, const std::vector<int64_t>& chosen, int64_t converged) {
        const int64_t first = s_.locked;
        const Matrix S = columns(ritz.vectors, chosen);
        const Block Q = copy(basis_.load(s_.m, s_.q));
        const std::vector<double> errors =
            basis_.rotate(first, s_.m - first, transpose(part(S, first, s_.m - first, S.cols)));
        s_.restart(ritz, chosen, S, converged);
        std::vector<double> rounding(static_cast<size_t>(first), 0.0);
        rounding.insert(rounding.end(), errors.begin(), errors.end());
        s_.add_rounding(rounding);
        put_next(Q, std::move(s_.C));
    }

 private:
    Outside<Block> outside(Block W) {
        return OutsideOfBasis<Space>(space_, basis_, s_.m, s_.scale).of(std::move(W));
    }

    // The rows `sources` of V get the coefficients.
    void next_from(const Outside<Block>& next, const std::vector<int64_t>& sources) {
        const int64_t r = std::min(space_.count(next.rows), space_.dimension() - s_.m);
        Matrix C(s_.m, r);
        for (size_t i = 0; i < sources.size(); ++i)
            for (int64_t j = 0; j < r; ++j) C(sources[i], j) = next.coefficients(static_cast<int64_t>(i), j);
        if (next.stored)
            take_next(r, next.errors, std::move(C));
        else
            put_next(space_.rows(next.rows, 0, r), std::move(C));
    }

    void put_next(const Block& Q, Matrix C) {
        take_next(space_.count(Q), basis_.store(s_.m, Q), std::move(C));
    }

    // C Q = C Q' + C (Q - Q') with Q' as stored: the last term counts to E.
    void take_next(int64_t rows, const std::vector<double>& errors, Matrix C) {
        s_.q = rows;
        s_.C = std::move(C);
        if (!errors.empty()) s_.add_slack(row_lengths(s_.C, errors));
    }

    void append(Block W) {
        Matrix before = basis_.project(W, s_.m + s_.q).gram;
        Orthonormal<Block> first = orthonormalise(space_, std::move(W), std::move(before), 0.0);
        Matrix gram = basis_.project(first.rows, s_.m + s_.q).gram;
        Orthonormal<Block> second =
            orthonormalise(space_, std::move(first.rows), std::move(gram), kLostLength);
        const int64_t room = std::min(space_.dimension(), basis_.capacity()) - s_.m - s_.q;
        const int64_t r = std::min(space_.count(second.rows), room);
        basis_.store(s_.m + s_.q, space_.rows(second.rows, 0, r));
        s_.q += r;
        s_.C = padded(s_.C, s_.m, s_.q);
    }

    Block copy(const Block& X) const {
        Block Y = space_.allocate(space_.count(X));
        space_.assign(Y, X);
        return Y;
    }

    // T = V A Vᵀ grows by the rows of the block that joined the basis. That its entries agree with the
    // residual's coefficients C of the rows before, and across the diagonal, is the only view the method has
    // of A's symmetry.
    void grow_projected(const Matrix& H, int64_t old) {
        double left_out = 0.0;
        for (const double length : s_.slack) left_out += length * length;
        const double allowed = asymmetry_ * s_.scale + 4.0 * std::sqrt(left_out);
        s_.T = padded(s_.T, s_.m, s_.m);
        for (int64_t j = 0; j < s_.m - old; ++j) {
            for (int64_t i = 0; i < old; ++i) {
                check_symmetric(H(i, j), s_.C(i, j), allowed);
                s_.T(i, old + j) = s_.T(old + j, i) = H(i, j);
            }
            for (int64_t i = 0; i < s_.m - old; ++i) {
                check_symmetric(H(old + i, j), H(old + j, i), allowed);
                s_.T(old + i, old + j) = 0.5 * (H(old + i, j) + H(old + j, i));
            }
        }
    }

    Space& space_;
    Basis basis_;
    double asymmetry_;  // of the scale: how far <u, A v> and <A u, v> may be apart
    Factorisation s_;
};

}  // namespace flatcore::krylov
