// What a gradient covariance needs of the cut between model and loss.
#pragma once

#include <ATen/ops/zeros.h>

#include "pass.h"

namespace flatcore {

// <dz_n, tz_n> for every direction and example, over all of the example's rows of all cut values:
// (K, examples, 1).
inline at::Tensor cut_inner_products(const State& state, const Pass& pass, int64_t batch_examples) {
    const int64_t K = pass.K();
    at::Tensor inner = at::zeros({K, batch_examples, 1}, state.options());
    for (int id : state.program().cut())
        if (state.adjoint(id).defined())
            inner += (pass.tangent_of(id).reshape({K, batch_examples, -1}) *
                      state.adjoint(id).reshape({1, batch_examples, -1}))
                         .sum(2, true);
    return inner;
}

}  // namespace flatcore
