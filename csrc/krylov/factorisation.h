// The small part of a block Lanczos factorisation V A = T V + C Q + E (see block_lanczos.h): all but its
// vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "matrix.h"

namespace flatcore::krylov {

// Ritz pairs, values ascending. Those of locked rows are among them, with unit vectors.
struct Ritz {
    std::vector<double> values;
    Matrix vectors;               // (m, m), a column each
    std::vector<double> bounds;   // |sᵀ C|: what further steps can lessen
    std::vector<double> slack;    // the rest of the residual, estimated
    std::vector<int64_t> locked;  // the row, or -1

    bool is_locked(int64_t i) const { return locked[static_cast<size_t>(i)] >= 0; }
    double residual(int64_t i) const {
        return std::hypot(bounds[static_cast<size_t>(i)], slack[static_cast<size_t>(i)]);
    }
};

// Random rows brought in: see EigenSolver for what they are good for.
struct Injection {
    int64_t step;
    int64_t rows;
};

struct Factorisation {
    int64_t m = 0;       // rows of V
    int64_t q = 0;       // rows of Q
    int64_t locked = 0;  // of the first rows of V
    int64_t width = 0;   // block size that fill restores
    int64_t steps = 0;
    int64_t applications = 0;   // products of one vector with A
    double scale = 0.0;         // largest |x A| seen, |x| = 1
    Matrix T;                   // (m, m)
    Matrix C;                   // (m, q)
    std::vector<double> slack;  // (m,), the lengths of the rows of E
    std::vector<Injection> injections;

    // Lengths of independent additions to the rows of E.
    void add_slack(const std::vector<double>& lengths) {
        for (size_t i = 0; i < lengths.size(); ++i) slack[i] = std::hypot(slack[i], lengths[i]);
    }

    // Rows of V that were rounded, by these lengths: each changes its row of the factorisation by up to |A|
    // times that.
    void add_rounding(const std::vector<double>& lengths) {
        for (size_t i = 0; i < lengths.size(); ++i) slack[i] = std::hypot(slack[i], scale * lengths[i]);
    }

    // The basis becomes the locked rows and Sᵀ V for the columns S of the chosen Ritz vectors, of which the
    // first `converged` are locked from now on.
    void restart(const Ritz& ritz, const std::vector<int64_t>& chosen, const Matrix& S, int64_t converged) {
        const int64_t first = locked, n = static_cast<int64_t>(chosen.size());
        const Matrix coupling = multiply(part(T, 0, first, m), S), rotated = multiply(transpose(S), C);
        Matrix projected = padded(part(T, 0, first, first), first + n, first + n);
        C = padded(part(C, 0, first, q), first + n, q);
        std::vector<double> left_out(slack.begin(), slack.begin() + first);
        for (int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<size_t>(chosen[static_cast<size_t>(i)]);
            projected(first + i, first + i) = ritz.values[at];
            for (int64_t l = 0; l < first; ++l)
                projected(l, first + i) = projected(first + i, l) = coupling(l, i);
            double sum = 0.0;
            for (int64_t j = first; j < m; ++j) sum += std::pow(S(j, i) * slack[static_cast<size_t>(j)], 2);
            if (i < converged) sum += std::pow(ritz.bounds[at], 2);
            left_out.push_back(std::sqrt(sum));
            for (int64_t j = 0; j < q; ++j) C(first + i, j) = i < converged ? 0.0 : rotated(i, j);
        }
        T = std::move(projected);
        slack = std::move(left_out);
        m = first + n;
        locked = first + converged;
    }
};

// Row i: the length of a sum of independent vectors of lengths |a_ij| lengths_j.
inline std::vector<double> row_lengths(const Matrix& a, const std::vector<double>& lengths) {
    std::vector<double> result(static_cast<size_t>(a.rows));
    for (int64_t i = 0; i < a.rows; ++i) {
        double sum = 0.0;
        for (int64_t j = 0; j < a.cols; ++j) sum += std::pow(a(i, j) * lengths[static_cast<size_t>(j)], 2);
        result[static_cast<size_t>(i)] = std::sqrt(sum);
    }
    return result;
}

template <class Space>
Ritz ritz_pairs(const Space& space, const Factorisation& s) {
    const int64_t first = s.locked, n = s.m - first;
    Matrix active(n, n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) active(i, j) = s.T(first + i, first + j);
    const Spectral spectral = space.eigh(active);

    std::vector<double> values;
    for (int64_t i = 0; i < first; ++i) values.push_back(s.T(i, i));
    values.insert(values.end(), spectral.values.begin(), spectral.values.end());
    std::vector<int64_t> order(values.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&values](int64_t a, int64_t b) {
        return values[static_cast<size_t>(a)] < values[static_cast<size_t>(b)];
    });

    Ritz ritz{{}, Matrix(s.m, s.m), {}, {}, {}};
    for (int64_t i = 0; i < s.m; ++i) {
        const int64_t from = order[static_cast<size_t>(i)];
        ritz.values.push_back(values[static_cast<size_t>(from)]);
        ritz.locked.push_back(from < first ? from : -1);
        if (from < first) {
            ritz.vectors(from, i) = 1.0;
        } else {
            for (int64_t j = 0; j < n; ++j) ritz.vectors(first + j, i) = spectral.vectors(j, from - first);
        }
    }
    const Matrix residuals = multiply(transpose(s.C), ritz.vectors);
    const Matrix coupling = multiply(part(s.T, 0, first, s.m), ritz.vectors);
    for (int64_t i = 0; i < s.m; ++i) {
        double sum = 0.0;
        for (int64_t j = 0; j < s.m; ++j)
            sum += std::pow(ritz.vectors(j, i) * s.slack[static_cast<size_t>(j)], 2);
        for (int64_t l = 0; l < first && ritz.locked[static_cast<size_t>(i)] < 0; ++l)
            sum += std::pow(coupling(l, i), 2);
        ritz.bounds.push_back(column_norm(residuals, i));
        ritz.slack.push_back(std::sqrt(sum));
    }
    return ritz;
}

}  // namespace flatcore::krylov
