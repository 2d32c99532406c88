#pragma once

#include <ATen/core/Tensor.h>

namespace flatcore {

// A copy of `rows` (K, P), of any strides, with each row in one piece: what becomes of directions that a
// caller lays as the columns of a matrix; in `fresh_rows`. torch's own copy of a transposed matrix takes one
// thread and small pages, which for ViT-tiny and K = 8 was a seventh of a product.
at::Tensor contiguous_rows(const at::Tensor& rows, int64_t most);

}  // namespace flatcore
