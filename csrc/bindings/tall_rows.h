// Inner products and combinations of blocks of long rows: of each the way that suits device and sizes. In
// full precision, whatever the process allows elsewhere: with operands in TF32 a basis would not be
// orthogonal.
#pragma once

#include <ATen/core/Tensor.h>

namespace flatcore {

// X Yᵀ in float64, where X and Y are, for (p, P) and (m, P) rows. A float32 sum of P terms of one sign, in
// the order of a BLAS, is off by far more than sqrt(P) roundings; so sums over pieces of columns are added up
// in float64.
at::Tensor inner_products(const at::Tensor& X, const at::Tensor& Y);

// Its ways, with X the narrower one. On the CPU one BLAS call for each piece, while it is in the cache. On a
// GPU that would be thousands of launches: a kernel of its own for few rows, else one batched product.
at::Tensor products_piece_by_piece(const at::Tensor& X, const at::Tensor& Y);
at::Tensor products_by_kernel(const at::Tensor& X, const at::Tensor& Y);
at::Tensor products_in_batches(const at::Tensor& X, const at::Tensor& Y);

// X -= B Y and X = B Y, with B (p, m) contiguous and of the rows' dtype and device.
void update_rows(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y);
void combine_rows(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y);

// The same for K problems beside each other: Y (K, m, P), X (K, P), products and B (K, m).
at::Tensor inner_products_each(const at::Tensor& Y, const at::Tensor& X);
void update_each_row(const at::Tensor& X, const at::Tensor& B, const at::Tensor& Y);

// Entries of a panel of columns, for which something is copied or converted: on the CPU what the cache holds,
// on a GPU enough that its launches do not count.
int64_t panel_entries(const at::Device& device);

}  // namespace flatcore
