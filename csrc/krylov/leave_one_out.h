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
// and trace agree. Their means over i are the estimates. The signs are not rescaled to the sphere: so they
// are Hutchinson's own probes, and his estimate comes along.
//
// With Y = F Q, Pi_i = Qᵀ (I - s_i s_iᵀ) Q for the unit vector s_i with F s_i parallel to e_i: it is
// orthogonal to all rows of F but one. Where F is close to singular, s_i is uncertain in just the directions
// in which H = Q A Qᵀ is of the order of its rounding, so that this costs no accuracy.
//
// The error bar. The spread s² of the m estimates over m is what the paper takes for the variance of their
// mean. It misses what they have in common: Var(mean) = E s² / m + Cov(a_i, a_j), and where the spectrum
// decays the covariance is the larger part. It can be estimated without bias: let a_i|j be the estimate of
// probe i with w_j left out of the projector as well, d_ij = a_i - a_i|j. Given all other probes, a_i and
// a_i|j have the same mean over w_i; a_i|j does not depend on w_j, over which a_j has that mean. So of
// Cov(a_i, a_j) = Cov(a_i|j + d_ij, a_j|i + d_ji) all terms vanish but one:
//
//     Cov(a_i, a_j) = E d_ij d_ji
//
// With t_ij the unit vector of s_j's part orthogonal to s_i, tau = t_ijᵀ Q and f = (I - Pi_i) A tau,
//
//     d_ij = tau * (2 f + eta tau) - w_i * (tau (<f, w_i> + eta <tau, w_i>) + f <tau, w_i>)
//
// where eta = <tau, A tau>.
//
// Beyond what range_basis.h asks of a Space:
//     signs(first, n)                   probes first to first + n - 1, rows of random signs
//     put_moments(mean, squares, first, base, S, U, V, R)    of the rows base + s_i * u_i + v_i * r_i; the
//     sum of
//                                       the squares as Numbers
//     common(S, E, V, there, back)      the sum of d_ij d_ji over pairs, as Numbers
//     place(B)                          B where the vectors are, for combine and update
//     piece()                           columns to take at a time
//
// Ledger of m probes: 2 m products with A; about 12 m² P operations; 2 m P words.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

#include "linear_solve.h"
#include "range_basis.h"

namespace flatcore::krylov {

// For all i with j = i + shift modulo m: tau = c_0 s_j + c_1 s_i, f = c_0 e_j + c_1 e_i + c_2 s_i and
// d_ij = tau * (2 f + c_3 tau) - w_i * (c_4 tau + c_5 f), where s, e and w stand for their rows of length
// P.
struct PairTerms {
    int64_t shift;
    Matrix coefficients;  // (m, 6)
};

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
        Entries entries(space_);
        for (int64_t s = 0; s < quadratic_.rows; ++s) {
            const auto [first, n] = s == 0 ? std::pair<int64_t, int64_t>{0, space_.dimension()}
                                           : slices_[static_cast<size_t>(s - 1)];
            entries.add(quadratic_, s, old,
                        space_.row_dots(space_.columns(V, first, n), space_.columns(Y, first, n)));
        }
        basis_.extend(std::move(Y));
        const int64_t m = probes();
        W_ = padded(W_, m, m);
        T_ = padded(T_, m, m);
        entries.add(W_, 0, old, space_.gram_there(basis_.Q(), V));
        entries.add(T_, 0, old, space_.gram_there(basis_.Z(), V));
        for (int64_t first = 0; first < old; first += b) {
            const Block earlier = space_.signs(first, std::min(b, old - first));
            entries.add(W_, old, first, space_.gram_there(space_.rows(basis_.Q(), old, b), earlier));
            entries.add(T_, old, first, space_.gram_there(space_.rows(basis_.Z(), old, b), earlier));
        }
        entries.put();
        downdate();
    }

    // (1 or 1 + slices, 2): estimate and variance, of the trace and of the diagonal blocks' traces.
    Matrix estimates(bool of_slices) {
        const int64_t m = probes();
        Matrix result(of_slices ? 1 + static_cast<int64_t>(slices_.size()) : 1, 2);
        std::vector<Sums> sums;
        sums.push_back({scaled_identity(m, 1.0), basis_.projected(), W_, T_});
        if (of_slices) add_sums_of_slices(sums);
        for (int64_t s = 0; s < result.rows; ++s) {
            const Sums& part = sums[static_cast<size_t>(s)];
            const std::vector<double> a = samples(part, s);
            double mean = 0.0, spread = 0.0, common = 0.0;
            for (const double x : a) mean += x / static_cast<double>(m);
            for (const double x : a) spread += (x - mean) * (x - mean);
            const Matrix d = differences(part);
            for (int64_t i = 0; i < m; ++i)
                for (int64_t j = 0; j < m; ++j) common += i == j ? 0.0 : d(i, j) * d(j, i);
            result(s, 0) = mean;
            result(s, 1) = (spread + std::max(common, 0.0)) / static_cast<double>(m * (m - 1));
        }
        return result;
    }

    // mean and squares (P,): the mean of a_i over the probes and the sum of squared deviations from it.
    // Returns the factor that makes of the spread the variance of the mean, over all entries: of one
    // entry alone the covariance would be too uncertain.
    template <class Vector>
    double diagonal_moments(Vector& mean, Vector& squares) {
        const int64_t P = space_.dimension(), piece = space_.piece(probes());
        const int64_t sampled = 1 + P / (piece * kSampledPieces);
        // a_i = base + s_i Q * u_i + w_i * r_i, with u and r combinations of the rows of Q and Z.
        Matrix along = transpose(S_), u_q(probes(), probes()), r_q = basis_.coefficients();
        for (int64_t i = 0; i < probes(); ++i)
            for (int64_t k = 0; k < probes(); ++k) {
                u_q(i, k) = 2.0 * HS_(k, i) - eta_[static_cast<size_t>(i)] * S_(k, i);
                r_q(i, k) -= C_(k, i);
            }
        Matrix u_z = along;
        for (double& x : u_z.data) x *= 2.0;
        const auto along_q = space_.place(along), from_q = space_.place(u_q), from_z = space_.place(u_z);
        const auto rest_q = space_.place(r_q), rest_z = space_.place(transpose(X_));
        const auto bend_q = space_.place(transpose(HS_));
        std::vector<PairTerms> there, back;
        for (int64_t shift = 1; shift <= std::min(kShifts, probes() / 2); ++shift) {
            there.push_back(pair_terms(shift));
            back.push_back(pair_terms(probes() - shift));
        }
        std::vector<typename Space::Numbers> spreads, commons;
        const Block signs = space_.signs(0, probes());
        for (int64_t first = 0; first < P; first += piece) {
            const int64_t n = std::min(piece, P - first);
            const Block q = space_.columns(basis_.Q(), first, n), z = space_.columns(basis_.Z(), first, n);
            Block u = space_.combine(from_q, q), r = space_.combine(rest_q, q);
            space_.update(u, from_z, z);
            space_.update(r, rest_z, z);
            const Block v = space_.columns(signs, first, n), tau = space_.combine(along_q, q);
            const auto squares_here =
                space_.put_moments(mean, squares, first, basis_.known_diagonal(first, n), tau, u, v, r);
            if (first / piece % sampled != 0) continue;
            spreads.push_back(squares_here);
            Block e = space_.combine(along_q, z);
            space_.update(e, bend_q, q);
            for (size_t shift = 0; shift < there.size(); ++shift)
                commons.push_back(space_.common(tau, e, v, there[shift], back[shift]));
        }
        const double spread = sum(spreads), common = sum(commons);
        const double m = static_cast<double>(probes()), pairs = m * static_cast<double>(there.size());
        return spread > 0.0 ? 1.0 + std::max(common, 0.0) / pairs * m * (m - 1.0) / spread : 1.0;
    }

 private:
    static constexpr double kParallel = 1e-10;     // squared sine, far above that of rounding
    static constexpr int64_t kShifts = 4;          // of pairs, for the covariance of the diagonal
    static constexpr int64_t kSampledPieces = 32;  // of its entries, at least, where there are so many

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

    // Sums over a slice of P: Q Qᵀ, Q Zᵀ, Q Ωᵀ, Z Ωᵀ.
    struct Sums {
        Matrix QQ, QZ, QV, ZV;
    };

    void add_sums_of_slices(std::vector<Sums>& sums) {
        const int64_t m = probes(), piece = 16;
        Entries entries(space_);
        sums.resize(1 + slices_.size(), {Matrix(m, m), Matrix(m, m), Matrix(m, m), Matrix(m, m)});
        for (size_t s = 0; s < slices_.size(); ++s) {
            const auto [first, n] = slices_[s];
            const Block q = space_.columns(basis_.Q(), first, n), z = space_.columns(basis_.Z(), first, n);
            entries.add(sums[s + 1].QQ, 0, 0, space_.gram_there(q, q));
            entries.add(sums[s + 1].QZ, 0, 0, space_.gram_there(q, z));
        }
        for (int64_t at = 0; at < m; at += piece) {
            const Block signs = space_.signs(at, std::min(piece, m - at));
            for (size_t s = 0; s < slices_.size(); ++s) {
                const auto [first, n] = slices_[s];
                const Block v = space_.columns(signs, first, n);
                entries.add(sums[s + 1].QV, 0, at,
                            space_.gram_there(space_.columns(basis_.Q(), first, n), v));
                entries.add(sums[s + 1].ZV, 0, at,
                            space_.gram_there(space_.columns(basis_.Z(), first, n), v));
            }
        }
        entries.put();
    }

    // a_i summed over slice s.
    std::vector<double> samples(const Sums& sums, int64_t s) const {
        const int64_t m = probes();
        const Matrix& H = basis_.projected();
        const Matrix GS = multiply(sums.QQ, S_), KS = multiply(sums.QZ, S_);
        double known = 0.0;
        for (int64_t i = 0; i < m; ++i) {
            known += 2.0 * sums.QZ(i, i);
            for (int64_t k = 0; k < m; ++k) known -= H(i, k) * sums.QQ(k, i);
        }
        std::vector<double> a;
        for (int64_t i = 0; i < m; ++i) {
            double value = known + quadratic_(s, i);
            for (int64_t k = 0; k < m; ++k)
                value += -2.0 * S_(k, i) * KS(k, i) + 2.0 * HS_(k, i) * GS(k, i) -
                         eta_[static_cast<size_t>(i)] * S_(k, i) * GS(k, i) - X_(k, i) * sums.ZV(k, i) -
                         C_(k, i) * sums.QV(k, i);
            a.push_back(value);
        }
        return a;
    }

    // d_ij summed over a slice; 0 where s_i and s_j are parallel to rounding, as in a range of m - 1
    // dimensions, which both projectors span.
    Matrix differences(const Sums& sums) const {
        const int64_t m = probes();
        const Matrix St = transpose(S_), GS = multiply(St, multiply(sums.QQ, S_)),
                     KS = multiply(St, multiply(sums.QZ, S_)), GH = multiply(St, multiply(sums.QQ, HS_)),
                     SV = multiply(St, sums.QV), SZ = multiply(St, sums.ZV),
                     HV = multiply(transpose(HS_), sums.QV);
        Matrix d(m, m);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) {
                if (i == j) continue;
                const Pair p = pair(i, j);
                const auto linear = [&](const Matrix& B) { return p.scale * (B(j, i) - p.cosine * B(i, i)); };
                const auto square = [&](const Matrix& B) {
                    return p.scale * p.scale *
                           (B(j, j) - p.cosine * (B(i, j) + B(j, i)) + p.cosine * p.cosine * B(i, i));
                };
                const double tau_f = square(KS) - square(GH) + p.bend * linear(GS);
                const double tau_v = linear(SV), f_v = linear(SZ) - linear(HV) + p.bend * SV(i, i);
                d(i, j) =
                    2.0 * tau_f + p.eta * square(GS) - tau_v * (p.f_v + p.eta * p.tau_v) - f_v * p.tau_v;
            }
        return d;
    }

    // t_ij = scale (s_j - cosine s_i), and of it eta, bend = <s_i, H t_ij>, <tau, w_i> and <f, w_i>.
    struct Pair {
        double scale = 0.0, cosine = 0.0, eta = 0.0, bend = 0.0, tau_v = 0.0, f_v = 0.0;
    };

    Pair pair(int64_t i, int64_t j) const {
        const int64_t m = probes();
        Pair p;
        for (int64_t k = 0; k < m; ++k) p.cosine += S_(k, i) * S_(k, j);
        double square = 0.0;
        for (int64_t k = 0; k < m; ++k) {
            const double t = S_(k, j) - p.cosine * S_(k, i);
            square += t * t;
        }
        if (square < kParallel) return {};
        p.scale = 1.0 / std::sqrt(square);
        for (int64_t k = 0; k < m; ++k) {
            const double t = p.scale * (S_(k, j) - p.cosine * S_(k, i));
            const double Ht = p.scale * (HS_(k, j) - p.cosine * HS_(k, i));
            p.eta += t * Ht;
            p.bend += S_(k, i) * Ht;
            p.tau_v += t * W_(k, i);
            p.f_v += t * T_(k, i) - Ht * X_(k, i);
        }
        return p;
    }

    PairTerms pair_terms(int64_t shift) const {
        const int64_t m = probes();
        PairTerms terms{shift, Matrix(m, 6)};
        for (int64_t i = 0; i < m; ++i) {
            const Pair p = pair(i, (i + shift) % m);
            const double row[] = {p.scale, -p.scale * p.cosine,     p.bend,
                                  p.eta,   p.f_v + p.eta * p.tau_v, p.tau_v};
            std::copy(std::begin(row), std::end(row), &terms.coefficients(i, 0));
        }
        return terms;
    }

    // Numbers on their way into larger matrices, which must stay where they are until then.
    class Entries {
     public:
        explicit Entries(Space& space) : space_(space) {}

        void add(Matrix& whole, int64_t row, int64_t col, typename Space::Numbers numbers) {
            places_.push_back({&whole, row, col});
            numbers_.push_back(std::move(numbers));
        }
        void put() {
            const std::vector<Matrix> parts = space_.fetch(numbers_);
            for (size_t at = 0; at < parts.size(); ++at)
                for (int64_t i = 0; i < parts[at].rows; ++i)
                    for (int64_t j = 0; j < parts[at].cols; ++j)
                        (*places_[at].whole)(places_[at].row + i, places_[at].col + j) = parts[at](i, j);
        }

     private:
        struct Place {
            Matrix* whole;
            int64_t row, col;
        };
        Space& space_;
        std::vector<Place> places_;
        std::vector<typename Space::Numbers> numbers_;
    };

    double sum(const std::vector<typename Space::Numbers>& numbers) const {
        double total = 0.0;
        for (const Matrix& number : space_.fetch(numbers)) total += number(0, 0);
        return total;
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
