// y = a b, both at least 2-D, batch axes broadcast.
//   ty = ta b + a tb ;  tda = tdy b^T + dy tb^T ;  tdb = a^T tdy + ta^T dy
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>

#include <algorithm>

#include "engine/gemm_bf16.h"
#include "engine/gemm_choice.h"
#include "rules.h"

namespace flatcore {

at::Tensor MatmulRule::forward(State& state) const {
    return at::matmul(state.value(op_.inputs[0]), state.value(op_.inputs[1]));
}

namespace {

at::Tensor transposed(const at::Tensor& t) { return t.transpose(-2, -1); }

at::Tensor product(const at::Tensor& a, const at::Tensor& b, Precision precision) {
    const int64_t m = a.size(-2), n = b.size(-1), k = a.size(-1);
    const bool rounded = precision == Precision::bf16 && bf16_pays(m, n, k);
    // On a GPU torch replaces batched products by a kernel of its own where k = 1, which counts elements in
    // 32 bits; those that are given their result it leaves alone.
    if (!rounded && !on_gpu(a)) return at::matmul(a, b);
    const auto batch_of = [](const at::Tensor& t) { return t.sizes().slice(0, t.dim() - 2); };
    const Integers batch = at::infer_size(batch_of(a), batch_of(b));
    const auto with_batch = [&](int64_t rows, int64_t columns) {
        Integers shape = batch;
        shape.insert(shape.end(), {rows, columns});
        return shape;
    };
    at::Tensor c = at::empty(with_batch(m, n), a.options());
    if (c.numel() == 0 || k == 0) return c.zero_();
    const int64_t count = c.numel() / (m * n);
    const at::Tensor of_all = c.view({count, m, n}), left = a.expand(with_batch(m, k)).reshape({count, m, k}),
                     right = b.expand(with_batch(k, n)).reshape({count, k, n});
    if (rounded)
        multiply_bf16(of_all, left, right, false);
    else
        multiply(of_all, left, right, false);
    return c;
}

}  // namespace

at::Tensor MatmulRule::tangent(const Directions& d) const {
    const auto rank = static_cast<int64_t>(output().shape.size());
    at::Tensor ty;
    if (active(0))
        ty = product(align_directions(d.tangent(0), rank), d.state().value(op_.inputs[1]), d.precision());
    if (active(1)) {
        const at::Tensor term =
            product(d.state().value(op_.inputs[0]), align_directions(d.tangent(1), rank), d.precision());
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
        const auto pulled_back = [&](const at::Tensor& adjoint, const at::Tensor& factor) {
            return i == 0 ? product(adjoint, transposed(factor), d.precision())
                          : product(transposed(factor), adjoint, d.precision());
        };
        at::Tensor result;
        if (tdy.defined()) result = pulled_back(tdy, state.value(op_.inputs[1 - i]));
        if (cross) {
            const at::Tensor term = pulled_back(dy, align_directions(d.tangent(1 - i), rank));
            result = result.defined() ? result.add_(term) : term;
        }
        if (result.defined()) d.add(i, reduce_directions(result, input(i).shape), true);
    }
}

double MatmulRule::flops(int64_t K, bool second_order) const {
    const int products = 2 * (active(0) + active(1)) + (second_order && has_second_order() ? 2 : 0);
    return 2.0 * static_cast<double>(K * output().numel * input(0).shape.back()) * products;
}

Rounding MatmulRule::rounding(int64_t K, bool second_order) const {
    const Integers &a = input(0).shape, &y = output().shape;
    const int64_t m = y[y.size() - 2], n = y.back(), k = a.back();
    if (!bf16_pays(m, n, k)) return {};
    const int64_t batches = output().numel / (m * n);
    if (program_.gpu())
        return {flops(K, second_order),
                rounded_whole(K * batches * std::max({m * k + k * n, m * n + k * n, m * n + m * k})) +
                    K * batches * (m * k + k * n + m * n)};
    const auto ahead = [&](int64_t length, int64_t depth) {
        return bf16_workspace(length, depth, K * batches);
    };
    const int64_t rounded =
        std::max({ahead(m, k), ahead(k, m), ahead(n, k), ahead(k, n), ahead(m, n), ahead(n, m)});
    // Operands broadcast to one batch are copied.
    return {flops(K, second_order), rounded + K * batches * (m * k + k * n + m * n)};
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
