// The small dense algebra of the Krylov methods: float64 on the host, row-major, whatever the precision of
// the vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace flatcore::krylov {

struct Matrix {
    int64_t rows = 0;
    int64_t cols = 0;
    std::vector<double> data;

    Matrix() = default;
    Matrix(int64_t rows, int64_t cols)
        : rows(rows), cols(cols), data(static_cast<size_t>(rows * cols), 0.0) {}

    double& operator()(int64_t i, int64_t j) { return data[static_cast<size_t>(i * cols + j)]; }
    double operator()(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * cols + j)]; }
};

inline Matrix transpose(const Matrix& a) {
    Matrix t(a.cols, a.rows);
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
    return t;
}

inline Matrix multiply(const Matrix& a, const Matrix& b) {
    Matrix c(a.rows, b.cols);
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t l = 0; l < a.cols; ++l)
            for (int64_t j = 0; j < b.cols; ++j) c(i, j) += a(i, l) * b(l, j);
    return c;
}

inline void add(Matrix& a, const Matrix& b) {
    for (size_t i = 0; i < a.data.size(); ++i) a.data[i] += b.data[i];
}

// The columns named by `chosen`, in that order.
inline Matrix columns(const Matrix& a, const std::vector<int64_t>& chosen) {
    Matrix b(a.rows, static_cast<int64_t>(chosen.size()));
    for (int64_t i = 0; i < b.rows; ++i)
        for (int64_t j = 0; j < b.cols; ++j) b(i, j) = a(i, chosen[static_cast<size_t>(j)]);
    return b;
}

inline Matrix diagonal(const std::vector<double>& values) {
    const auto n = static_cast<int64_t>(values.size());
    Matrix a(n, n);
    for (int64_t i = 0; i < n; ++i) a(i, i) = values[static_cast<size_t>(i)];
    return a;
}

// The block of `rows` x `cols` entries from (first, 0).
inline Matrix part(const Matrix& a, int64_t first, int64_t rows, int64_t cols) {
    Matrix b(rows, cols);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) b(i, j) = a(first + i, j);
    return b;
}

// The same entries in a larger matrix, zeros elsewhere.
inline Matrix padded(const Matrix& a, int64_t rows, int64_t cols) {
    Matrix b(rows, cols);
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.cols; ++j) b(i, j) = a(i, j);
    return b;
}

inline double column_norm(const Matrix& a, int64_t j) {
    double sum = 0.0;
    for (int64_t i = 0; i < a.rows; ++i) sum += a(i, j) * a(i, j);
    return std::sqrt(sum);
}

inline bool all_finite(const Matrix& a) {
    for (const double x : a.data)
        if (!std::isfinite(x)) return false;
    return true;
}

// Of a projection W' = W - (W Vᵀ) V: the inner products of V and W, as the function that does it says, and
// W' W'ᵀ. Both at once, since fetching small matrices from a device is what a step waits for.
struct Projection {
    Matrix inside;
    Matrix gram;
};

// The same, not yet known on the host.
template <class Numbers>
struct ProjectionThere {
    Numbers inside;
    Numbers gram;
};

// X = factor rows with a lower triangular factor.
template <class Block, class Numbers>
struct CholeskyRows {
    Block rows;
    Numbers factor;
};

// a = vectors diag(values) vectorsᵀ, values ascending.
struct Spectral {
    std::vector<double> values;
    Matrix vectors;
};

}  // namespace flatcore::krylov
