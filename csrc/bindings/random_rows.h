// The random rows of csrc/kernels/probes.h, drawn where they are wanted.
#pragma once

#include <ATen/core/Tensor.h>

namespace flatcore {

// (n, P), rows first to first + n - 1.
at::Tensor sign_rows(uint64_t seed, int64_t first, int64_t n, int64_t P, const at::TensorOptions& options);
at::Tensor gaussian_rows(uint64_t seed, int64_t first, int64_t n, int64_t P,
                         const at::TensorOptions& options);

}  // namespace flatcore
