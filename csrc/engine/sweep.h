// The sweeps over a state: backward once, then any number of products.
#pragma once

#include <ATen/core/Tensor.h>

#include "state.h"

namespace flatcore {

// Sets the adjoints of a state whose values are known.
void backward_sweep(State& state, double seed);

// Y_k (+)= A V_k for the K rows of V, where A is this batch's share of the operator `mode`:
//   hessian      seed * H of the batch loss
//   ggn          seed * J^T (d2 loss / d cut2) J
//   covariance   examples * sum_n (J_n^T dz_n)(J_n^T dz_n)^T, dz_n the adjoint of example n's rows of the
//   cut;
//                with `examples` the number of examples of the whole objective this is (1/N) sum_n g_n g_n^T
// V and Y are (K, P), unit stride along P. accumulate = false overwrites Y. Precision::bf16 needs float32 on
// a processor where bf16_available().
void product(const State& state, Mode mode, const at::Tensor& V, const at::Tensor& Y, bool accumulate,
             int64_t batch_examples, double examples, Precision precision = Precision::full);

// y (+)= seed * gradient of the batch loss; y is (P), contiguous.
void gradient(const State& state, const at::Tensor& y, bool accumulate, double seed);

}  // namespace flatcore
