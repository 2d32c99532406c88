// y = a b, both at least 2-D, batch axes broadcast.
//   ty = ta b + a tb ;  tda = tdy b^T + dy tb^T ;  tdb = a^T tdy + ta^T dy
#include <ATen/ops/matmul.h>

#include <algorithm>

#include "rules.h"

namespace flatcore {

at::Tensor MatmulRule::forward(State& state) const {
    return at::matmul(state.value(op_.inputs[0]), state.value(op_.inputs[1]));
}

namespace {

at::Tensor transposed(const at::Tensor& t) { return t.transpose(-2, -1); }

}  // namespace

at::Tensor MatmulRule::tangent(const Directions& d) const {
    const auto rank = static_cast<int64_t>(output().shape.size());
    at::Tensor ty;
    if (active(0)) ty = at::matmul(align_directions(d.tangent(0), rank), d.state().value(op_.inputs[1]));
    if (active(1)) {
        const at::Tensor term =
            at::matmul(d.state().value(op_.inputs[0]), align_directions(d.tangent(1), rank));
        ty = ty.defined() ? ty.add_(term) : term;
    }
    return ty;
}

void MatmulRule::adjoint(Directions& d) const {
    const State& state = d.state();
    const auto rank = static_cast<int64_t>(output().shape.size());
    const bool cross = d.second_order() && has_second_order();
    const at::Tensor tdy = d.cotangent();
    const at::Tensor dy = cross ? state.adjoint(op_.output) : at::Tensor();
    for (int i : {0, 1}) {
        if (!d.wants(i)) continue;
        const auto product = [&](const at::Tensor& adjoint, const at::Tensor& factor) {
            return i == 0 ? at::matmul(adjoint, transposed(factor)) : at::matmul(transposed(factor), adjoint);
        };
        at::Tensor result;
        if (tdy.defined()) result = product(tdy, state.value(op_.inputs[1 - i]));
        if (cross) {
            const at::Tensor term = product(dy, align_directions(d.tangent(1 - i), rank));
            result = result.defined() ? result.add_(term) : term;
        }
        if (result.defined()) d.add(i, reduce_directions(result, input(i).shape), true);
    }
}

double MatmulRule::flops(int64_t K, bool second_order) const {
    const int products = 2 * (active(0) + active(1)) + (second_order && has_second_order() ? 2 : 0);
    return 2.0 * static_cast<double>(K * output().numel * input(0).shape.back()) * products;
}

int64_t MatmulRule::workspace(int64_t K) const {
    // A side's result before the broadcast axes are summed away, and the second term before it is added to
    // the first.
    const auto matrix = [](const Value& x) {
        return x.shape[x.shape.size() - 1] * x.shape[x.shape.size() - 2];
    };
    const int64_t batches = matrix(output()) == 0 ? 0 : output().numel / matrix(output());
    const int64_t widest = std::max(matrix(output()), std::max(matrix(input(0)), matrix(input(1))));
    return 2 * K * batches * widest;
}

}  // namespace flatcore
