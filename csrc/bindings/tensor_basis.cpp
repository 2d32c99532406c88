#include "tensor_basis.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

namespace flatcore {
namespace {

using krylov::Matrix;

constexpr int64_t kPanel = int64_t{1} << 22;  // entries of a panel

int64_t piece_of(int64_t rows) { return std::max<int64_t>(1, kPanel / std::max<int64_t>(rows, 1)); }

at::Tensor narrow_columns(const at::Tensor& X, int64_t first, int64_t n) { return X.narrow(1, first, n); }

}  // namespace

at::Tensor to_tensor(const Matrix& B, const at::TensorOptions& options) {
    at::Tensor host = at::empty({B.rows, B.cols}, at::kDouble);
    std::copy(B.data.begin(), B.data.end(), host.mutable_data_ptr<double>());
    return host.to(options);
}

Matrix to_matrix(const at::Tensor& B) {
    const at::Tensor host = B.to(at::kCPU, at::kDouble).contiguous();
    Matrix result(host.size(0), host.size(1));
    std::copy_n(host.const_data_ptr<double>(), host.numel(), result.data.begin());
    return result;
}

// A float32 sum of P terms of one sign, in the order of a BLAS, is off by far more than sqrt(P) roundings; so
// the sums of pieces are added up in float64. The BLAS is twice as fast with the narrow factor on the left.
Matrix gram_of(const at::Tensor& X, const at::Tensor& Y) {
    constexpr int64_t kPiece = int64_t{1} << 14;
    const bool swap = X.size(0) > Y.size(0);
    const at::Tensor &left = swap ? Y : X, &right = swap ? X : Y;
    const int64_t P = X.size(1);
    at::Tensor sum = at::zeros({left.size(0), right.size(0)}, X.options().dtype(at::kDouble));
    for (int64_t first = 0; first < P; first += kPiece) {
        const int64_t n = std::min(kPiece, P - first);
        sum.add_(at::mm(narrow_columns(left, first, n), narrow_columns(right, first, n).t()));
    }
    return to_matrix(swap ? sum.t() : sum);
}

double TensorBasis::rounding() const {
    if (tail_.scalar_type() == at::kHalf) return 0x1.0p-11;
    if (tail_.scalar_type() == at::kBFloat16) return 0x1.0p-8;
    return 0.0;
}

// Rows [first_row, first_row + rows), columns [first_column, ...), in full precision where the vectors are.
at::Tensor TensorBasis::columns(int64_t first_row, int64_t rows, int64_t first_column, int64_t n) const {
    const int64_t h = head_.size(0);
    const int64_t above = std::clamp<int64_t>(h - first_row, 0, rows);
    at::Tensor top = narrow_columns(head_.narrow(0, std::min(first_row, h), above), first_column, n);
    if (above == rows) return top;
    const int64_t from = std::max<int64_t>(first_row - h, 0);
    at::Tensor bottom = narrow_columns(tail_.narrow(0, from, rows - above), first_column, n);
    const bool converts = bottom.scalar_type() != head_.scalar_type() || bottom.device() != head_.device();
    if (converts) bottom = bottom.to(head_.options());
    if (scale_ != 1.0) bottom = converts ? bottom.div_(scale_) : bottom.div(scale_);
    return above == 0 ? bottom : at::cat({top, bottom});
}

at::Tensor TensorBasis::load(int64_t first, int64_t n) const { return columns(first, n, 0, head_.size(1)); }

// The tail's part of these rows and columns is not needed for a while.
void TensorBasis::rest(int64_t first_row, int64_t rows, int64_t first_column, int64_t n) const {
    const int64_t h = head_.size(0), from = std::max<int64_t>(first_row - h, 0);
    const int64_t to = std::max<int64_t>(first_row + rows - h, 0);
    mapped_.rest(narrow_columns(tail_.narrow(0, from, to - from), first_column, n));
}

std::vector<double> TensorBasis::store(int64_t first, const Block& X) {
    const int64_t h = head_.size(0), n = X.size(0), above = std::clamp<int64_t>(h - first, 0, n);
    if (above > 0) head_.narrow(0, first, above).copy_(X.narrow(0, 0, above));
    if (rounding() == 0.0) {
        for (int64_t i = above; i < n; ++i) {
            tail_.select(0, first + i - h).copy_(X.select(0, i));
            rest(first + i, 1, 0, X.size(1));
        }
        return {};
    }
    std::vector<double> errors(static_cast<size_t>(n), 0.0);
    for (int64_t i = above; i < n; ++i) {
        at::Tensor row = tail_.select(0, first + i - h);
        row.copy_(X.select(0, i).mul(scale_));
        const at::Tensor error = row.to(X.options()).div_(scale_).sub_(X.select(0, i));
        errors[static_cast<size_t>(i)] = at::linalg_vector_norm(error).item<double>();
    }
    return errors;
}

void TensorBasis::for_each_panel(int64_t first, int64_t m,
                                 const std::function<void(const at::Tensor&, int64_t, int64_t)>& use) const {
    const int64_t h = head_.size(0), P = head_.size(1), above = std::clamp<int64_t>(h - first, 0, m);
    if (above > 0) use(head_.narrow(0, first, above), 0, 0);
    if (above == m) return;
    for (int64_t column = 0, piece = piece_of(m - above); column < P; column += piece) {
        const int64_t n = std::min(piece, P - column);
        use(columns(first + above, m - above, column, n), above, column);
        rest(first + above, m - above, column, n);
    }
    rest(first + above, m - above, 0, P);
}

krylov::Matrix TensorBasis::gram(int64_t m, const Block& W) const {
    Matrix result(m, W.size(0));
    for_each_panel(0, m, [&](const at::Tensor& V, int64_t row, int64_t column) {
        const Matrix part = gram_of(V, narrow_columns(W, column, V.size(1)));
        for (int64_t i = 0; i < part.rows; ++i)
            for (int64_t j = 0; j < part.cols; ++j) result(row + i, j) += part(i, j);
    });
    return result;
}

void TensorBasis::update(Block& W, const Matrix& B, int64_t m) const {
    if (B.rows == 0 || m == 0) return;
    const at::Tensor coefficients = to_tensor(B, head_.options());
    for_each_panel(0, m, [&](const at::Tensor& V, int64_t row, int64_t column) {
        narrow_columns(W, column, V.size(1)).addmm_(coefficients.narrow(1, row, V.size(0)), V, 1, -1);
    });
}

void TensorBasis::combine_into(Block X, const Matrix& B, int64_t m) const {
    const at::Tensor coefficients = to_tensor(B, head_.options());
    X.zero_();
    mapped_.rest(X);
    for_each_panel(0, m, [&](const at::Tensor& V, int64_t row, int64_t column) {
        at::Tensor part = narrow_columns(X, column, V.size(1));
        part.addmm_(coefficients.narrow(1, row, V.size(0)), V);
        mapped_.rest(part);
    });
    mapped_.rest(X);
}

std::vector<double> TensorBasis::rotate(int64_t first, int64_t m, const Matrix& B) {
    const at::Tensor coefficients = to_tensor(B, head_.options());
    const int64_t P = head_.size(1), piece = piece_of(m);
    std::vector<double> squares(static_cast<size_t>(B.rows), 0.0);
    for (int64_t column = 0; column < P; column += piece) {
        const int64_t n = std::min(piece, P - column);
        const at::Tensor rotated = at::mm(coefficients, columns(first, m, column, n));
        TensorBasis part(narrow_columns(head_, column, n), narrow_columns(tail_, column, n), scale_);
        const std::vector<double> errors = part.store(first, rotated);
        rest(first, m, column, n);
        for (size_t i = 0; i < errors.size(); ++i) squares[i] += errors[i] * errors[i];
    }
    rest(first, m, 0, P);
    if (rounding() == 0.0) return {};
    for (double& square : squares) square = std::sqrt(square);
    return squares;
}

}  // namespace flatcore
