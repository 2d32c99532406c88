// y = x W^T + b over the last axis of x; N rows, `in` inputs, `out` outputs.
//   ty_k = tx_k W^T + x V_k^T + tb_k
//   tdx_k = tdy_k W + dy V_k ;  tdW_k = tdy_k^T x + dy^T tx_k ;  tdb_k = sum over rows of tdy_k
// The terms in W alone fold K into the rows of one GEMM; V_k stays where the caller put it.
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "engine/gemm_bf16.h"
#include "rules.h"

namespace flatcore {

LinearRule::LinearRule(const Program& program, const Op& op)
    : Rule(program, op), transposed_(op.attributes.flag("transposed")) {
    if (input(1).shape.size() != 2) throw std::invalid_argument("weight must be a matrix");
    in_ = input(1).shape[transposed_ ? 0 : 1];
    out_ = input(1).shape[transposed_ ? 1 : 0];
    if (input(0).shape.empty() || input(0).shape.back() != in_)
        throw std::invalid_argument("the last axis of x must have " + std::to_string(in_) + " elements");
    rows_ = in_ ? input(0).numel / in_ : 0;
}

at::Tensor LinearRule::weight_as_matrix(const at::Tensor& weight) const {
    return transposed_ ? weight : weight.transpose(-2, -1);
}

at::Tensor LinearRule::forward(State& state) const {
    const at::Tensor& x = state.value(op_.inputs[0]);
    const at::Tensor& weight = state.value(op_.inputs[1]);
    const at::Tensor bias = has(2) ? state.value(op_.inputs[2]) : at::Tensor();
    return at::linear(x, transposed_ ? weight.t() : weight, bias);
}

// On a GPU cuBLAS adds one direction's bias in the product, without a pass of its own.
bool LinearRule::bias_joins(const Directions& d) const {
    return program_.gpu() && d.K() == 1 && active(2) && (active(0) || active(1)) &&
           input(2).shape == Integers{out_} &&
           !(d.precision() == Precision::bf16 && bf16_pays(rows_, out_, in_));
}

at::Tensor LinearRule::tangent(const Directions& d) const {
    const int64_t K = d.K();
    at::Tensor ty = new_directions(K, output(), d.state().options());
    const at::Tensor matrix = ty.view({K, rows_, out_});
    bool started = false;
    const bool joins = bias_joins(d);
    const auto with_bias = [&](const at::Tensor& a, const at::Tensor& b) {
        at::Tensor sum = matrix.select(0, 0);
        at::addmm_out(sum, d.tangent(2).reshape({out_}), a, b);
    };
    if (active(2) && !joins) {
        ty.copy_(align_directions(d.tangent(2), static_cast<int64_t>(output().shape.size())));
        started = true;
    }
    if (active(0)) {
        const at::Tensor tx = d.tangent(0).reshape({K, rows_, in_}),
                         weight = weight_as_matrix(d.state().value(op_.inputs[1]));
        if (joins)
            with_bias(tx.select(0, 0), weight);
        else
            gemm_shared(matrix, tx, weight, started, d.precision());
        started = true;
    }
    if (active(1)) {
        const at::Tensor x = d.state().value(op_.inputs[0]).reshape({rows_, in_}),
                         tweight = weight_as_matrix(d.tangent(1));
        if (joins && !started)
            with_bias(x, tweight.select(0, 0));
        else
            gemm_each(matrix, x, tweight, started, d.precision());
    }
    return ty;
}

void LinearRule::adjoint(Directions& d) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const bool cross = d.second_order() && has_second_order();
    const at::Tensor cotangent = d.cotangent();
    const bool reached = cotangent.defined();
    // Read by two products each.
    const Factor tdy = reached ? cotangent.reshape({K, rows_, out_}) : cotangent,
                 dy = cross ? state.adjoint(op_.output).reshape({rows_, out_}) : at::Tensor();
    if (d.wants(0)) {
        auto [buffer, fresh] = d.accumulator(0);
        // Where x's adjoint has other strides (an image lies channels last), the products are added to it
        // after.
        const bool in_place = K == 0 || buffer.select(0, 0).is_contiguous();
        const at::Tensor tdx =
            in_place ? buffer.view({K, rows_, in_}) : at::zeros({K, rows_, in_}, buffer.options());
        bool started = !(in_place && fresh);
        if (reached) {
            gemm_shared(tdx, tdy, weight_as_matrix(state.value(op_.inputs[1])).t(), started, d.precision());
            started = true;
        }
        if (cross) gemm_each(tdx, dy, weight_as_matrix(d.tangent(1)).transpose(1, 2), started, d.precision());
        if (!in_place) {
            const at::Tensor sum = tdx.view(buffer.sizes());
            fresh ? buffer.copy_(sum) : buffer.add_(sum);
        }
    }
    if (d.wants(1)) {
        auto [buffer, fresh] = d.accumulator(1);
        // The weight's own orientation, so that what is written is contiguous: tdy^T x, or x^T tdy if
        // transposed.
        const auto product = [&](const Factor& adjoint, const Factor& x, bool accumulate) {
            const Factor &left = transposed_ ? x : adjoint, &right = transposed_ ? adjoint : x;
            gemm_each(buffer, left.t(), right, accumulate, d.precision());
        };
        if (reached) product(tdy, state.value(op_.inputs[0]).reshape({rows_, in_}), !fresh);
        if (cross) product(dy, d.tangent(0).reshape({K, rows_, in_}), !fresh || reached);
    }
    if (d.wants(2) && reached) {
        auto [buffer, fresh] = d.accumulator(2);
        if (fresh)
            at::sum_out(buffer, tdy.full(), 1);
        else
            buffer.add_(tdy.full().sum(1));
    }
}

double LinearRule::flops(int64_t K, bool second_order) const {
    const int products = active(0) + active(1)                            // tangent
                         + active(0) + active(1)                          // adjoint, first order
                         + (second_order && has_second_order() ? 2 : 0);  // cross terms
    return 2.0 * static_cast<double>(K * rows_ * in_ * out_) * products;
}

// Of all the products, whichever side is rounded ahead; on a GPU the adjoints are, for two products.
Rounding LinearRule::rounding(int64_t K, bool second_order) const {
    if (!bf16_pays(rows_, in_, out_)) return {};
    const int64_t x = rows_ * in_, y = rows_ * out_, weight = in_ * out_;
    if (program_.gpu()) {
        const bool cross = second_order && has_second_order();
        const int64_t adjoint = K * y + (cross ? y + K * std::max(weight, x) : std::max(weight, x));
        return {flops(K, second_order), rounded_whole(std::max({K * x + weight, x + K * weight, adjoint}))};
    }
    return {flops(K, second_order),
            std::max({bf16_workspace(out_, in_), bf16_workspace(in_, out_), bf16_workspace(rows_, in_),
                      bf16_workspace(in_, rows_), bf16_workspace(rows_, out_), bf16_workspace(out_, rows_)})};
}

int64_t LinearRule::workspace(int64_t K) const {
    // The batched product's own copy of the weights' results or the bias' sums; directions of an x that is a
    // parameter brought together for one GEMM; the adjoint of an image before it is laid channels last.
    const bool apart = input(0).channels_last || (input(0).kind == ValueKind::parameter && K > 1);
    const int64_t gathered = apart ? K * input(0).numel : 0;
    return gathered + std::max(active(1) ? gemm_each_workspace(program_.gpu(), K, in_, out_, rows_) : 0,
                               active(2) ? K * out_ : 0);
}

}  // namespace flatcore
