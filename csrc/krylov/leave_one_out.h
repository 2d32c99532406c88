// XTrace and XDiag: Epperly, Tropp and Webber, "XTrace: making the most of every sample in stochastic trace
// estimation", SIAM J. Matrix Anal. Appl. 45 (2024) 1-23.
//
// m probes w_i of independent signs, their products y_i = w_i A, Q a basis of the span of all y, Pi_i the
// projector on the span of all y_j with j != i. Of each probe comes an unbiased estimate: what is known from
// Pi_i, and of the remainder what the probe sees that had no part in Pi_i,
//
//     a_i = diag(Pi_i A + A Pi_i - Pi_i A Pi_i) + w_i * ((I - Pi_i) A (I - Pi_i) w_i)
//
// The sum of a_i over all entries is the estimate of XTrace, over the entries of a parameter that of its
// block's trace; entry by entry it is XDiag, but with the remainder projected on both sides, so that diagonal
// and trace agree. Their means over i are the estimates, their spread the error bar (section 2.2 there). The
// signs are not rescaled to the sphere: they are Hutchinson's own probes then, and his estimate comes along.
//
// With Y = F Q, Pi_i = Qᵀ (I - s_i s_iᵀ) Q for the unit vector s_i with F s_i parallel to e_i: it is
// orthogonal to all rows of F but one. Where F is close to singular, s_i is uncertain in just the directions
// in which H = Q A Qᵀ is of the order of its rounding, so that this costs no accuracy.
//
// Beyond what range_basis.h asks of a Space:
//     signs(first, n)                   probes first to first + n - 1, rows of random signs
//     row_dots(X, Y)                    <x_i, y_i>, in float64
//     put_moments(mean, squares, first, base, S, U, V, R)    of the rows base + s_i * u_i + v_i * r_i,
//     entries
//                                       from `first`
//
// Ledger of m probes: 2 m products with A; about 12 m² P operations; 2 m P words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "linear_solve.h"
#include "range_basis.h"

namespace flatcore::krylov {

template <class Space>
class LeaveOneOut {
 public:
    using Block = typename Space::Block;

    LeaveOneOut(Space& space, std::vector<std::pair<int64_t, int64_t>> slices)
        : space_(space), basis_(space), slices_(std::move(slices)) {}

    int64_t probes() const { return basis_.rows(); }
    RangeBasis<Space>& basis() { return basis_; }

    // Y (b, P): the products of the next b probes; overwritten. Takes b further products.
    void extend(Block Y) {
        const int64_t old = probes(), b = space_.count(Y);
        const Block V = space_.signs(old, b);
        quadratic_ = padded(quadratic_, 1 + static_cast<int64_t>(slices_.size()), old + b);
        for (int64_t s = 0; s < quadratic_.rows; ++s) {
            const auto [first, n] = s == 0 ? std::pair<int64_t, int64_t>{0, space_.dimension()}
                                           : slices_[static_cast<size_t>(s - 1)];
            const std::vector<double> dots =
                space_.row_dots(space_.columns(V, first, n), space_.columns(Y, first, n));
            for (int64_t i = 0; i < b; ++i) quadratic_(s, old + i) = dots[static_cast<size_t>(i)];
        }
        basis_.extend(std::move(Y));
        const int64_t m = probes();
        W_ = padded(W_, m, m);
        T_ = padded(T_, m, m);
        put(W_, space_.gram(basis_.Q(), V), 0, old);
        put(T_, space_.gram(basis_.Z(), V), 0, old);
        for (int64_t first = 0; first < old; first += b) {
            const Block earlier = space_.signs(first, std::min(b, old - first));
            put(W_, space_.gram(space_.rows(basis_.Q(), old, b), earlier), old, first);
            put(T_, space_.gram(space_.rows(basis_.Z(), old, b), earlier), old, first);
        }
        downdate();
    }

    // (1 + slices, m): the estimates of the trace, and of the diagonal blocks' traces where asked for.
    Matrix estimates(bool of_slices) {
        const int64_t m = probes();
        Matrix result(of_slices ? 1 + static_cast<int64_t>(slices_.size()) : 1, m);
        double known = 0.0;
        for (int64_t i = 0; i < m; ++i) known += basis_.projected()(i, i);
        for (int64_t i = 0; i < m; ++i) {
            double rest = quadratic_(0, i);
            for (int64_t k = 0; k < m; ++k) rest -= (T_(k, i) + C_(k, i)) * X_(k, i);
            result(0, i) = known - eta_[static_cast<size_t>(i)] + rest;
        }
        for (int64_t s = 1; s < result.rows; ++s) slice_estimates(s, result);
        return result;
    }

    // mean and squares (P,): the mean of a_i over the probes and the sum of squared deviations from it.
    template <class Vector>
    void diagonal_moments(Vector& mean, Vector& squares) {
        constexpr int64_t kPiece = int64_t{1} << 14;
        const int64_t P = space_.dimension();
        // a_i = base + s_i Q * u_i + w_i * r_i, with u and r combinations of the rows of Q and Z.
        Matrix along = transpose(S_), u_q(probes(), probes()), r_q = basis_.coefficients();
        for (int64_t i = 0; i < probes(); ++i)
            for (int64_t k = 0; k < probes(); ++k) {
                u_q(i, k) = 2.0 * HS_(k, i) - eta_[static_cast<size_t>(i)] * S_(k, i);
                r_q(i, k) -= C_(k, i);
            }
        Matrix u_z = along;
        for (double& x : u_z.data) x *= 2.0;
        const Matrix r_z = transpose(X_);
        const Block signs = space_.signs(0, probes());
        for (int64_t first = 0; first < P; first += kPiece) {
            const int64_t n = std::min(kPiece, P - first);
            const Block q = space_.columns(basis_.Q(), first, n), z = space_.columns(basis_.Z(), first, n);
            Block u = space_.combine(u_q, q), r = space_.combine(r_q, q);
            space_.update(u, u_z, z);
            space_.update(r, r_z, z);
            space_.put_moments(mean, squares, first, basis_.known_diagonal(first, n),
                               space_.combine(along, q), u, space_.columns(signs, first, n), r);
        }
    }

 private:
    // s_i and all that follows from it: x_i = (I - s_i s_iᵀ) Q w_i, H s_i, eta_i = s_iᵀ H s_i and
    // c_i = (I - s_i s_iᵀ) Q A (I - Pi_i) w_i, a column each.
    void downdate() {
        const int64_t m = probes();
        const Matrix& H = basis_.projected();
        S_ = directions_of_rows(basis_.invertible_coefficients());
        HS_ = multiply(H, S_);
        X_ = W_;
        remove_along_columns(X_);
        const Matrix HX = multiply(H, X_);
        C_ = T_;
        for (size_t k = 0; k < C_.data.size(); ++k) C_.data[k] -= HX.data[k];
        remove_along_columns(C_);
        eta_.assign(static_cast<size_t>(m), 0.0);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t k = 0; k < m; ++k) eta_[static_cast<size_t>(i)] += S_(k, i) * HS_(k, i);
    }

    void remove_along_columns(Matrix& X) const {
        for (int64_t i = 0; i < X.cols; ++i) {
            double along = 0.0;
            for (int64_t k = 0; k < X.rows; ++k) along += S_(k, i) * X(k, i);
            for (int64_t k = 0; k < X.rows; ++k) X(k, i) -= along * S_(k, i);
        }
    }

    void slice_estimates(int64_t s, Matrix& result) {
        const auto [first, n] = slices_[static_cast<size_t>(s - 1)];
        const int64_t m = probes(), piece = 32;
        const Matrix& H = basis_.projected();
        const Block q = space_.columns(basis_.Q(), first, n), z = space_.columns(basis_.Z(), first, n);
        const Matrix G = space_.gram(q, q), HP = space_.gram(q, z);
        const Matrix GS = multiply(G, S_), HPS = multiply(HP, S_);
        double known = 0.0;
        for (int64_t i = 0; i < m; ++i) {
            known += 2.0 * HP(i, i);
            for (int64_t k = 0; k < m; ++k) known -= H(i, k) * G(k, i);
        }
        Matrix W(m, m), T(m, m);
        for (int64_t at = 0; at < m; at += piece) {
            const Block v = space_.columns(space_.signs(at, std::min(piece, m - at)), first, n);
            put(W, space_.gram(q, v), 0, at);
            put(T, space_.gram(z, v), 0, at);
        }
        for (int64_t i = 0; i < m; ++i) {
            double value = known + quadratic_(s, i);
            for (int64_t k = 0; k < m; ++k)
                value += -2.0 * S_(k, i) * HPS(k, i) + 2.0 * HS_(k, i) * GS(k, i) -
                         eta_[static_cast<size_t>(i)] * S_(k, i) * GS(k, i) - X_(k, i) * T(k, i) -
                         C_(k, i) * W(k, i);
            result(s, i) = value;
        }
    }

    static void put(Matrix& whole, const Matrix& part, int64_t row, int64_t col) {
        for (int64_t i = 0; i < part.rows; ++i)
            for (int64_t j = 0; j < part.cols; ++j) whole(row + i, col + j) = part(i, j);
    }

    Space& space_;
    RangeBasis<Space> basis_;
    std::vector<std::pair<int64_t, int64_t>> slices_;  // (first, n)
    Matrix quadratic_;                                 // (1 + slices, m): <w_i, y_i>, in all and per slice
    Matrix W_, T_;                                     // Q Ωᵀ and Z Ωᵀ, (m, m)
    Matrix S_, HS_, X_, C_;                            // (m, m), see downdate
    std::vector<double> eta_;
};

}  // namespace flatcore::krylov
