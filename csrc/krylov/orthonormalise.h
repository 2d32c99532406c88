// Rank-revealing orthonormalisation of a block of rows, written over a space's `gram`, `project` and
// `combine_into`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "matrix.h"
#include "operator_error.h"

namespace flatcore::krylov {

// Part of a pivoted Cholesky factorisation: gram[picked, picked] = lower lowerᵀ, best pivots first.
struct PivotedCholesky {
    std::vector<int64_t> picked;
    std::vector<int64_t> left;
    Matrix lower;
};

// A pivot below this share of its row's own squared length is not divided by.
inline constexpr double kShare = 0.01;

// Stops before a pivot <= `least` and before one that is below a hundredth of its row's own squared length:
// the error of Q = lower⁻¹ W is eps times the condition of the Gram matrix, so this costs at most two digits,
// which the second pass over the block recovers (Cholesky-QR applied twice), and never divides by rounding
// noise.
inline PivotedCholesky pivoted_cholesky(const Matrix& gram, double least) {
    const int64_t n = gram.rows;
    std::vector<int64_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
    std::vector<double> rest(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) rest[static_cast<size_t>(i)] = gram(i, i);
    Matrix factor(n, n);
    int64_t rank = 0;
    for (; rank < n; ++rank) {
        int64_t best = -1;
        for (int64_t s = rank; s < n; ++s) {
            const int64_t i = order[static_cast<size_t>(s)];
            const double pivot = rest[static_cast<size_t>(i)];
            if (!(pivot > least) || pivot < kShare * gram(i, i)) continue;
            if (best < 0 || pivot > rest[static_cast<size_t>(order[static_cast<size_t>(best)])]) best = s;
        }
        if (best < 0) break;
        std::swap(order[static_cast<size_t>(rank)], order[static_cast<size_t>(best)]);
        const int64_t p = order[static_cast<size_t>(rank)];
        const double diagonal = std::sqrt(rest[static_cast<size_t>(p)]);
        factor(p, rank) = diagonal;
        for (int64_t s = rank + 1; s < n; ++s) {
            const int64_t i = order[static_cast<size_t>(s)];
            double sum = gram(i, p);
            for (int64_t j = 0; j < rank; ++j) sum -= factor(i, j) * factor(p, j);
            factor(i, rank) = sum / diagonal;
            rest[static_cast<size_t>(i)] -= factor(i, rank) * factor(i, rank);
        }
    }
    PivotedCholesky result;
    result.picked.assign(order.begin(), order.begin() + rank);
    result.left.assign(order.begin() + rank, order.end());
    result.lower = Matrix(rank, rank);
    for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j <= i; ++j)
            result.lower(i, j) = factor(result.picked[static_cast<size_t>(i)], j);
    return result;
}

// Are all rows longer than `drop` and longer than a tenth outside of the rows before them? Then the plain
// Cholesky factor of their Gram matrix is as good as the pivoted one.
inline bool resolved(const Matrix& gram, double drop) {
    if (!all_finite(gram)) return false;
    const int64_t n = gram.rows;
    Matrix factor(n, n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double sum = gram(i, j);
            for (int64_t l = 0; l < j; ++l) sum -= factor(i, l) * factor(j, l);
            if (i > j)
                factor(i, j) = sum / factor(j, j);
            else if (sum > drop * drop && sum >= kShare * gram(i, i))
                factor(i, i) = std::sqrt(sum);
            else
                return false;
        }
    return true;
}

inline Matrix inverse_lower(const Matrix& lower) {
    const int64_t n = lower.rows;
    Matrix inverse(n, n);
    for (int64_t j = 0; j < n; ++j) {
        inverse(j, j) = 1.0 / lower(j, j);
        for (int64_t i = j + 1; i < n; ++i) {
            double sum = 0.0;
            for (int64_t l = j; l < i; ++l) sum -= lower(i, l) * inverse(l, j);
            inverse(i, j) = sum / lower(i, i);
        }
    }
    return inverse;
}

// A unit row that a repeated projection shortens to less than this was rounding noise within the basis.
inline constexpr double kLostLength = 0.1;

// W = factor Q up to rows of length `drop`: W (p, P) as it came, Q (r, P) with r <= p orthonormal rows,
// factor (p, r).
template <class Block>
struct Orthonormal {
    Block rows;
    Matrix factor;
};

// Each round takes the rows its Gram matrix resolves and removes them from the others, whose shorter lengths
// the next round resolves; rows of length <= drop are left out. Q Qᵀ = I to about 100 p eps: call twice for
// full accuracy. gram = W Wᵀ.
template <class Space>
Orthonormal<typename Space::Block> orthonormalise(Space& space, typename Space::Block W, Matrix gram,
                                                  double drop) {
    const int64_t p = space.count(W);
    typename Space::Block Q = space.allocate(p);
    Matrix factor(p, p);
    std::vector<int64_t> remaining(static_cast<size_t>(p));
    for (int64_t i = 0; i < p; ++i) remaining[static_cast<size_t>(i)] = i;
    int64_t rank = 0;
    while (!remaining.empty()) {
        // The common case, every row in the first round, copies nothing: rest is W and Q one product with it.
        const bool all = static_cast<int64_t>(remaining.size()) == p;
        typename Space::Block rest = all ? W : space.select(W, remaining);
        if (!all_finite(gram)) throw OperatorError(kNotFinite);
        const PivotedCholesky cholesky = pivoted_cholesky(gram, drop * drop);
        const auto picked = static_cast<int64_t>(cholesky.picked.size());
        if (picked == 0) break;
        typename Space::Block fresh = space.rows(Q, rank, picked);
        Matrix from_rest(picked, space.count(rest));
        const Matrix inverse = inverse_lower(cholesky.lower);
        for (int64_t i = 0; i < picked; ++i)
            for (int64_t j = 0; j <= i; ++j)
                from_rest(i, cholesky.picked[static_cast<size_t>(j)]) = inverse(i, j);
        space.combine_into(fresh, from_rest, rest);
        for (int64_t i = 0; i < picked; ++i)
            for (int64_t j = 0; j <= i; ++j)
                factor(remaining[static_cast<size_t>(cholesky.picked[static_cast<size_t>(i)])], rank + j) =
                    cholesky.lower(i, j);
        std::vector<int64_t> left;
        for (const int64_t i : cholesky.left) left.push_back(remaining[static_cast<size_t>(i)]);
        if (!left.empty()) {
            typename Space::Block others = space.select(rest, cholesky.left);
            Projection projection = space.project(others, fresh);
            for (size_t i = 0; i < left.size(); ++i)
                for (int64_t j = 0; j < picked; ++j)
                    factor(left[i], rank + j) = projection.inside(static_cast<int64_t>(i), j);
            space.scatter(W, left, others);
            gram = std::move(projection.gram);
        }
        remaining = std::move(left);
        rank += picked;
    }
    Matrix kept(p, rank);
    for (int64_t i = 0; i < p; ++i)
        for (int64_t j = 0; j < rank; ++j) kept(i, j) = factor(i, j);
    return {space.rows(Q, 0, rank), std::move(kept)};
}

template <class Space>
Orthonormal<typename Space::Block> orthonormalise(Space& space, typename Space::Block W, double drop) {
    Matrix gram = space.gram(W, W);
    return orthonormalise(space, std::move(W), std::move(gram), drop);
}

}  // namespace flatcore::krylov
