// Lanczos tridiagonalisation of a symmetric operator from K start rows at once, each with a recurrence of its
// own: the Gauss quadratures behind stochastic Lanczos quadrature (Golub and Welsch, Math. Comp. 23 (1969)
// 221-230; Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
// Matrix Anal. Appl. 38 (2017), section 3).
//
// For every probe k with unit start row v_k, after j steps,
//
//     V_k A = T_k V_k + beta_k e_j q_k       V_k (j, P), V_k V_kᵀ = I, first row v_k;  T_k (j, j) tridiagonal
//
// The K probes share each product, not their Krylov spaces, so that the K quadratures are independent samples
// and their spread is an error bar. A Space here also knows, for the probes' bases stored as (K, steps, P)
// and rows (K, P):
//     squares(X)                   (K,): the rows' squared lengths
//     project_each(X, bases, j)    x_k -= (x_k V_kᵀ) V_k, twice, with the first j rows of V_k
//     scale_each(X, factors)
//
// Ledger of step j: K operator applications; 4 j K P words for the two passes, and one wait for a device.
// Memory: steps x K x P.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "orthonormalise.h"

namespace flatcore::krylov {

struct Tridiagonals {
    Matrix alpha;  // (K, steps), the diagonals
    Matrix beta;   // (K, steps), beta(k, j) couples rows j and j + 1; the last is the residual's norm,
                   // or 0 where the space was exhausted
    std::vector<int64_t> lengths;  // (K,), rows before the Krylov space of the probe was exhausted, or steps
    int64_t applications = 0;
};

// What projecting K rows w_k twice on the first j rows of V_k found.
struct ProjectionsOfEach {
    Matrix inside;                   // (K, j): V_k w_kᵀ, the first time
    std::vector<double> correction;  // (K,): of its last column, the second time
    std::vector<double> squares;     // (K,): |w_k|² after both
};

// `start` (K, P), no row zero, is overwritten. on_step gets what is known after so many steps; it may throw,
// and where it returns true the recurrence ends, with the steps done as the length of the probes still
// running.
template <class Space>
Tridiagonals probe_lanczos(Space& space, typename Space::Block start, int64_t steps,
                           const std::function<bool(const Tridiagonals&, int64_t)>& on_step) {
    const int64_t K = space.count(start);
    Tridiagonals result{Matrix(K, steps), Matrix(K, steps),
                        std::vector<int64_t>(static_cast<size_t>(K), steps), 0};
    std::vector<double> scale(static_cast<size_t>(K), 0.0);
    std::vector<double> factor(static_cast<size_t>(K));
    std::vector<bool> running(static_cast<size_t>(K), true);

    auto bases = space.allocate_bases(K, steps);
    const std::vector<double> square = space.squares(start);
    for (int64_t k = 0; k < K; ++k)
        factor[static_cast<size_t>(k)] = 1.0 / std::sqrt(square[static_cast<size_t>(k)]);
    auto q = start;
    space.scale_each(q, factor);

    for (int64_t j = 0; j < steps; ++j) {
        if (std::none_of(running.begin(), running.end(), [](bool r) { return r; })) break;
        space.assign_each(bases, j, q);
        auto w = space.apply(q);
        result.applications += K;
        const ProjectionsOfEach found = space.project_each(w, bases, j + 1);
        if (!all_finite(found.inside)) throw OperatorError(kNotFinite);
        for (int64_t k = 0; k < K; ++k) {
            const auto at = static_cast<size_t>(k);
            factor[at] = 0.0;  // an exhausted probe goes on as zeros
            if (!running[at]) continue;
            const double beta = std::sqrt(found.squares[at]);
            if (!std::isfinite(beta)) throw OperatorError(kNotFinite);
            result.alpha(k, j) = found.inside(k, j) + found.correction[at];
            result.beta(k, j) = beta;
            scale[at] = std::max({scale[at], std::abs(result.alpha(k, j)), beta});
            // A residual at rounding level: the Krylov space is invariant and its quadrature exact. Dividing
            // by it would start a recurrence from noise, whose nodes would carry weights of the order of the
            // rounding.
            if (beta <= 8.0 * space.epsilon() * scale[at] || j + 1 == space.dimension()) {
                running[at] = false;
                result.lengths[at] = j + 1;
                result.beta(k, j) = 0.0;
                continue;
            }
            factor[at] = 1.0 / beta;
        }
        if (on_step(result, j + 1)) {
            for (auto& length : result.lengths) length = std::min(length, j + 1);
            break;
        }
        space.scale_each(w, factor);
        q = w;
    }
    return result;
}

}  // namespace flatcore::krylov
