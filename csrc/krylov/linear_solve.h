// Small dense inverses on the host: LU with partial pivoting, and what leaving out a row of a square matrix
// leaves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "matrix.h"

namespace flatcore::krylov {

inline Matrix scaled_identity(int64_t n, double factor) {
    Matrix a(n, n);
    for (int64_t i = 0; i < n; ++i) a(i, i) = factor;
    return a;
}

// A⁻¹ by LU with partial pivoting, column by column. A pivot of rounding size is taken as it is, one of zero
// as a number far below the others: the columns then point where A loses rank.
inline Matrix inverse(Matrix a) {
    const int64_t n = a.rows;
    double largest = 0.0;
    for (const double x : a.data) largest = std::max(largest, std::abs(x));
    std::vector<int64_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
    for (int64_t k = 0; k < n; ++k) {
        int64_t best = k;
        for (int64_t i = k + 1; i < n; ++i)
            if (std::abs(a(i, k)) > std::abs(a(best, k))) best = i;
        std::swap(order[static_cast<size_t>(k)], order[static_cast<size_t>(best)]);
        for (int64_t j = 0; j < n; ++j) std::swap(a(k, j), a(best, j));
        if (a(k, k) == 0.0) a(k, k) = 1e-20 * (largest > 0.0 ? largest : 1.0);
        for (int64_t i = k + 1; i < n; ++i) {
            const double multiple = a(i, k) /= a(k, k);
            for (int64_t j = k + 1; j < n; ++j) a(i, j) -= multiple * a(k, j);
        }
    }
    Matrix result(n, n);
    for (int64_t col = 0; col < n; ++col) {
        for (int64_t i = 0; i < n; ++i) {
            double x = order[static_cast<size_t>(i)] == col ? 1.0 : 0.0;
            for (int64_t j = 0; j < i; ++j) x -= a(i, j) * result(j, col);
            result(i, col) = x;
        }
        for (int64_t i = n - 1; i >= 0; --i) {
            double x = result(i, col);
            for (int64_t j = i + 1; j < n; ++j) x -= a(i, j) * result(j, col);
            result(i, col) = x / a(i, i);
        }
    }
    return result;
}

// Column i is the unit vector orthogonal to all rows of F but row i: the i-th column of F⁻¹, normalised. Rows
// are brought to equal lengths first, which changes no direction.
inline Matrix directions_of_rows(Matrix F) {
    for (int64_t i = 0; i < F.rows; ++i) {
        double largest = 0.0;
        for (int64_t j = 0; j < F.cols; ++j) largest = std::max(largest, std::abs(F(i, j)));
        if (largest > 0.0)
            for (int64_t j = 0; j < F.cols; ++j) F(i, j) /= largest;
    }
    Matrix S = inverse(std::move(F));
    for (int64_t i = 0; i < S.cols; ++i) {
        double largest = 0.0;  // lest squares overflow
        for (int64_t k = 0; k < S.rows; ++k) largest = std::max(largest, std::abs(S(k, i)));
        for (int64_t k = 0; k < S.rows; ++k) S(k, i) /= largest;
        const double length = column_norm(S, i);
        for (int64_t k = 0; k < S.rows; ++k) S(k, i) /= length;
    }
    return S;
}

}  // namespace flatcore::krylov
