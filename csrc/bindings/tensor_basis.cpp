#include "tensor_basis.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../engine/float32_products.h"
#include "tall_rows.h"
#include "transfers.h"

namespace flatcore {
namespace {

using krylov::Matrix;

at::Tensor narrow_columns(const at::Tensor& X, int64_t first, int64_t n) { return X.narrow(1, first, n); }

}  // namespace

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
    const bool away = bottom.device() != head_.device();
    const bool converts = away || bottom.scalar_type() != head_.scalar_type();
    if (away) {
        // Row by row: what is contiguous and pinned needs no copy on the host, and nobody waits for it.
        const at::Tensor here = at::empty({rows - above, n}, head_.options());
        for (int64_t i = 0; i < rows - above; ++i)
            here.select(0, i).copy_(bottom.select(0, i), /*non_blocking=*/true);
        bottom = here;
    } else if (converts) {
        bottom = bottom.to(head_.options());
    }
    if (scale_ != 1.0) bottom = converts ? bottom.div_(scale_) : bottom.div(scale_);
    return above == 0 ? bottom : at::cat({top, bottom});
}

at::Tensor TensorBasis::load(int64_t first, int64_t n) const { return columns(first, n, 0, head_.size(1)); }

int64_t TensorBasis::panel_columns(int64_t rows) const {
    return std::max<int64_t>(1, panel_entries(head_.device()) / std::max<int64_t>(rows, 1));
}

// The tail's part of these rows and columns is not needed for a while.
void TensorBasis::rest(int64_t first_row, int64_t rows, int64_t first_column, int64_t n) const {
    const int64_t h = head_.size(0), from = std::max<int64_t>(first_row - h, 0);
    const int64_t to = std::max<int64_t>(first_row + rows - h, 0);
    mapped_.rest(narrow_columns(tail_.narrow(0, from, to - from), first_column, n));
}

at::Tensor TensorBasis::put(int64_t first, const Block& X) {
    const int64_t h = head_.size(0), n = X.size(0), above = std::clamp<int64_t>(h - first, 0, n);
    if (above > 0) head_.narrow(0, first, above).copy_(X.narrow(0, 0, above));
    const bool rounded = rounding() > 0.0;
    const at::Tensor errors = rounded ? at::zeros({1, n}, X.options().dtype(at::kDouble)) : at::Tensor();
    for (int64_t i = above; i < n; ++i) {
        at::Tensor row = tail_.select(0, first + i - h);
        if (rounded) {
            row.copy_(X.select(0, i).mul(scale_));
            const at::Tensor error = row.to(X.options()).div_(scale_).sub_(X.select(0, i));
            errors.select(1, i).copy_(at::linalg_vector_norm(error));
        } else {
            row.copy_(X.select(0, i));
            rest(first + i, 1, 0, X.size(1));
        }
    }
    return errors;
}

std::vector<double> TensorBasis::store(int64_t first, const Block& X) {
    const at::Tensor errors = put(first, X);
    if (!errors.defined()) return {};
    // The head rounds nothing.
    if (first + X.size(0) <= head_.size(0)) return std::vector<double>(static_cast<size_t>(X.size(0)), 0.0);
    return to_matrix(errors).data;
}

void TensorBasis::for_each_panel(int64_t first, int64_t m,
                                 const std::function<void(const at::Tensor&, int64_t, int64_t)>& use) const {
    const int64_t h = head_.size(0), P = head_.size(1), above = std::clamp<int64_t>(h - first, 0, m);
    if (above > 0) use(head_.narrow(0, first, above), 0, 0);
    if (above == m) return;
    for (int64_t column = 0, piece = panel_columns(m - above); column < P; column += piece) {
        const int64_t n = std::min(piece, P - column);
        use(columns(first + above, m - above, column, n), above, column);
        rest(first + above, m - above, column, n);
    }
    rest(first + above, m - above, 0, P);
}

krylov::ProjectionThere<at::Tensor> TensorBasis::project_there(const Block& W, int64_t m) const {
    const at::Tensor inside = at::zeros({m, W.size(0)}, W.options().dtype(at::kDouble));
    for_each_panel(0, m, [&](const at::Tensor& V, int64_t row, int64_t column) {
        inside.narrow(0, row, V.size(0)).add_(inner_products(V, narrow_columns(W, column, V.size(1))));
    });
    if (inside.numel() > 0) update_by(W, inside.t().to(W.options()).contiguous(), m);
    return {inside, inner_products(W, W)};
}

krylov::Projection TensorBasis::project(const Block& W, int64_t m) const {
    const auto there = project_there(W, m);
    std::vector<Matrix> found = fetch({there.inside, there.gram});
    return {std::move(found[0]), std::move(found[1])};
}

void TensorBasis::update(Block& W, const Matrix& B, int64_t m) const {
    if (B.rows > 0 && m > 0) update_by(W, to_tensor(B, head_.options()), m);
}

void TensorBasis::update_by(const Block& W, const at::Tensor& B, int64_t m) const {
    for_each_panel(0, m, [&](const at::Tensor& V, int64_t row, int64_t column) {
        update_rows(narrow_columns(W, column, V.size(1)), B.narrow(1, row, V.size(0)), V);
    });
}

void TensorBasis::combine_into(Block X, const Matrix& B, int64_t m) const {
    const Float32Products full_precision(X.device(), Precision::full);
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
    const int64_t P = head_.size(1), piece = panel_columns(m);
    const at::Tensor squares = at::zeros({1, B.rows}, coefficients.options().dtype(at::kDouble));
    for (int64_t column = 0; column < P; column += piece) {
        const int64_t n = std::min(piece, P - column);
        const at::Tensor rotated = at::empty({B.rows, n}, coefficients.options());
        combine_rows(rotated, coefficients, columns(first, m, column, n));
        TensorBasis part(narrow_columns(head_, column, n), narrow_columns(tail_, column, n), scale_);
        const at::Tensor errors = part.put(first, rotated);
        rest(first, m, column, n);
        if (errors.defined()) squares.add_(errors.square());
    }
    rest(first, m, 0, P);
    if (rounding() == 0.0) return {};
    std::vector<double> errors = to_matrix(squares).data;
    for (double& error : errors) error = std::sqrt(error);
    return errors;
}

}  // namespace flatcore
