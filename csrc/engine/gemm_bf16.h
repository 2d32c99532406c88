// Matrix products of float32 matrices whose elements are rounded to bfloat16 on the way in: sums and results
// are float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "factor.h"

namespace flatcore {

// Has this processor instructions for it, and does torch's kernel for them give the right numbers here?
bool bf16_available();

// Is a product of these sizes, in any order, large enough to be faster in bfloat16, rounding included?
// Smaller ones stay in float32.
bool bf16_pays(int64_t m, int64_t n, int64_t k);

// c = a b, or c += a b; float32 matrices, or batches of them, of which a and b may be one matrix for all. The
// rows of c are dense, all else may have any strides, and no axis but the batch's is empty.
void multiply_bf16(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate);

// Elements of float32 that rounded operands occupy at most, where the one rounded ahead (the one that a
// batch shares, else the smaller) has `length` rows of a or columns of b and `depth` elements along k.
// `matrices`: how many a batch has of it.
int64_t bf16_workspace(int64_t length, int64_t depth, int64_t matrices = 1);

// The same for a GPU, where factors are rounded ahead, `elements` of them together.
inline int64_t rounded_whole(int64_t elements) { return (elements + 1) / 2; }

// gemm_gpu.cpp
void multiply_bf16_on_gpu(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate);

}  // namespace flatcore
