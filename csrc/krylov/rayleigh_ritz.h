// Rayleigh-Ritz on given rows by products of their own: exact to rounding, wherever the rows come from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "orthonormalise.h"

namespace flatcore::krylov {

// rows A = diag(values) rows + residuals, |residuals_i| = norms_i.
template <class Block>
struct RitzRows {
    std::vector<double> values;
    Block rows;
    Block residuals;
    std::vector<double> norms;
};

// Twice, since once is exact to a few digits less than the precision.
template <class Space>
typename Space::Block orthonormal_rows(Space& space, typename Space::Block W) {
    typename Space::Block Q = orthonormalise(space, std::move(W), 0.0).rows;
    return orthonormalise(space, std::move(Q), kLostLength).rows;
}

// `X` (j, P) orthonormal, overwritten. j operator applications, `piece` at a time. <u, A v> and <A u, v> may
// differ by `asymmetry` times the largest |x A|, of which `scale` was seen. `order` maps ascending values to
// the positions they come out in. The residuals lie in the second block of `allocate_pair`.
template <class Space, class Order>
RitzRows<typename Space::Block> rayleigh_ritz(Space& space, typename Space::Block X, int64_t piece,
                                              double asymmetry, double scale, Order order) {
    using Block = typename Space::Block;
    const int64_t j = space.count(X);
    Block Y = space.allocate_pair(1, j);
    for (int64_t first = 0; first < j; first += piece) {
        const int64_t n = std::min(piece, j - first);
        Block some = space.rows(X, first, n), products = space.rows(Y, first, n);
        space.assign(products, space.apply(some));
        space.rest(some);
        space.rest(products);
    }
    Matrix T = space.gram(X, Y);
    if (!all_finite(T)) throw OperatorError(kNotFinite);
    for (int64_t i = 0; i < j; ++i) scale = std::max(scale, column_norm(T, i));
    for (int64_t i = 0; i < j; ++i)
        for (int64_t l = 0; l < i; ++l) {
            check_symmetric(T(i, l), T(l, i), asymmetry * scale);
            T(i, l) = T(l, i) = 0.5 * (T(i, l) + T(l, i));
        }
    const Spectral spectral = space.eigh(T);
    const std::vector<int64_t> chosen = order(spectral.values);
    const Matrix St = transpose(columns(spectral.vectors, chosen));
    std::vector<double> values;
    for (const int64_t i : chosen) values.push_back(spectral.values[static_cast<size_t>(i)]);
    space.rotate(X, St);
    space.rotate(Y, St);
    space.update(Y, diagonal(values), X);
    std::vector<double> norms = space.lengths(Y);
    for (const double norm : norms)
        if (!std::isfinite(norm)) throw OperatorError(kNotFinite);
    return {std::move(values), std::move(X), std::move(Y), std::move(norms)};
}

}  // namespace flatcore::krylov
