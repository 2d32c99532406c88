// v^T A v without A v: the tangent sweep alone.
#pragma once

#include <ATen/core/Tensor.h>

#include "state.h"

namespace flatcore {

// q_k += v_k^T A v_k for the K rows of V, A as in `product`; q is (K), double, on the CPU.
void quadratic_form(const State& state, Mode mode, const at::Tensor& V, const at::Tensor& q,
                    int64_t batch_examples, double examples, Precision precision);

}  // namespace flatcore
