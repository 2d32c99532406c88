// y = x * W + b (cross-correlation, N C H W).
//   ty_k = tx_k * W + x * V_k + tb_k
//   tdx_k = tdy_k *' W + dy *' V_k ;  tdW_k = wgrad(tdy_k, x) + wgrad(dy, tx_k) ;  tdb_k = sum of tdy_k
// Where W is shared, K folds into the batch axis. Where x or dy is shared, K folds into the channel axis of the other
// operand, inside each group, so that the shared tensor is read once: (N, g K c, H, W). No grouped convolution is made.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/sum.h>

#include "rules.h"

namespace flatcore {

ConvolutionRule::ConvolutionRule(const Program& program, const Op& op)
    : Rule(program, op),
      stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")),
      dilation_(op.attributes.integers("dilation")),
      groups_(op.attributes.integer("groups")) {
    if (input(0).shape.size() != 4 || input(1).shape.size() != 4)
        throw std::invalid_argument("x and weight must have four axes");
    if (stride_.size() != 2 || padding_.size() != 2 || dilation_.size() != 2)
        throw std::invalid_argument("stride, padding and dilation must be two integers");
}

at::Tensor ConvolutionRule::convolve(const at::Tensor& x, const at::Tensor& weight) const {
    return at::convolution(x, weight, std::nullopt, stride_, padding_, dilation_, false, {0, 0}, groups_);
}

at::Tensor ConvolutionRule::input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef input_shape) const {
    const at::Tensor shape_only = at::empty({1}, dy.options()).expand(input_shape);
    return std::get<0>(at::convolution_backward(dy, shape_only, weight, at::OptionalIntArrayRef(), stride_, padding_,
                                                dilation_, false, {0, 0}, groups_, {true, false, false}));
}

at::Tensor ConvolutionRule::weight_gradient(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef weight_shape) const {
    const at::Tensor shape_only = at::empty({1}, dy.options()).expand(weight_shape);
    return std::get<1>(at::convolution_backward(dy, x, shape_only, at::OptionalIntArrayRef(), stride_, padding_, dilation_,
                                                false, {0, 0}, groups_, {false, true, false}));
}

namespace {

// (K, N, C, H, W) -> (N, g K c, H, W): direction k of a group's channels lies behind direction k - 1's.
at::Tensor fold_channels(const at::Tensor& t, int64_t groups) {
    const int64_t K = t.size(0), N = t.size(1), C = t.size(2), H = t.size(3), W = t.size(4);
    if (K == 1) return t.select(0, 0);
    return t.reshape({K, N, groups, C / groups, H, W}).permute({1, 2, 0, 3, 4, 5}).reshape({N, K * C, H, W});
}

// The inverse, as a view.
at::Tensor unfold_channels(const at::Tensor& t, int64_t K, int64_t groups) {
    const int64_t N = t.size(0), C = t.size(1) / K, H = t.size(2), W = t.size(3);
    if (K == 1) return t.unsqueeze(0);
    const at::Tensor split = t.reshape({N, groups, K, C / groups, H, W}).permute({2, 0, 1, 3, 4, 5});
    return groups == 1 ? split.squeeze(2) : split.reshape({K, N, C, H, W});
}

at::Tensor fold_batch(const at::Tensor& t) { return t.reshape({t.size(0) * t.size(1), t.size(2), t.size(3), t.size(4)}); }

// V (K, o, c, kh, kw) with K in the output channels of each group: (g K o', c, kh, kw).
at::Tensor fold_outputs(const at::Tensor& V, int64_t groups) {
    const int64_t K = V.size(0), o = V.size(1);
    return V.reshape({K, groups, o / groups, V.size(2), V.size(3), V.size(4)})
        .transpose(0, 1)
        .reshape({K * o, V.size(2), V.size(3), V.size(4)});
}

// V with K in the input channels: (o, K c, kh, kw).
at::Tensor fold_inputs(const at::Tensor& V) {
    return V.transpose(0, 1).reshape({V.size(1), V.size(0) * V.size(2), V.size(3), V.size(4)});
}

at::Tensor add_to(const at::Tensor& sum, const at::Tensor& term) { return sum.defined() ? sum.add_(term) : term; }

}  // namespace

at::Tensor ConvolutionRule::forward(State& state) const {
    const std::optional<at::Tensor> bias =
        has(2) ? std::optional<at::Tensor>(state.value(op_.inputs[2])) : std::nullopt;
    return at::convolution(state.value(op_.inputs[0]), state.value(op_.inputs[1]), bias, stride_, padding_, dilation_,
                           false, {0, 0}, groups_);
}

at::Tensor ConvolutionRule::tangent(const Directions& d) const {
    const int64_t K = d.K();
    const Integers shape = with_directions(K, output().shape);
    at::Tensor ty;
    if (active(0)) ty = convolve(fold_batch(d.tangent(0)), d.state().value(op_.inputs[1])).view(shape);
    if (active(1))
        ty = add_to(ty, unfold_channels(convolve(d.state().value(op_.inputs[0]), fold_outputs(d.tangent(1), groups_)), K,
                                        groups_));
    if (active(2)) {
        const at::Tensor bias = d.tangent(2).reshape({K, 1, output().shape[1], 1, 1});
        ty = ty.defined() ? ty.add_(bias) : bias.expand(shape).contiguous();
    }
    return ty.contiguous();
}

void ConvolutionRule::adjoint(Directions& d) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const bool cross = d.second_order() && has_second_order();
    const at::Tensor tdy = d.cotangent();
    const at::Tensor dy = cross ? state.adjoint(op_.output) : at::Tensor();
    if (d.wants(0)) {
        const Integers& shape = input(0).shape;
        at::Tensor tdx;
        if (tdy.defined()) {
            Integers folded = shape;
            folded[0] *= K;
            tdx = input_gradient(fold_batch(tdy), state.value(op_.inputs[1]), folded).view(with_directions(K, shape));
        }
        if (cross) {
            Integers folded = shape;
            folded[1] *= K;
            tdx = add_to(tdx, unfold_channels(input_gradient(dy, fold_inputs(d.tangent(1)), folded), K, groups_));
        }
        if (tdx.defined()) d.add(0, tdx, true);
    }
    if (d.wants(1)) {
        const Integers& shape = input(1).shape;
        if (tdy.defined()) {
            Integers folded = shape;
            folded[0] *= K;
            const at::Tensor gradient =
                weight_gradient(fold_channels(tdy, groups_), state.value(op_.inputs[0]), folded);
            d.add(1,
                  gradient.view({groups_, K, shape[0] / groups_, shape[1], shape[2], shape[3]})
                      .transpose(0, 1)
                      .reshape(with_directions(K, shape)),
                  true);
        }
        if (cross) {
            Integers folded = shape;
            folded[1] *= K;
            const at::Tensor gradient = weight_gradient(dy, fold_channels(d.tangent(0), groups_), folded);
            d.add(1, gradient.view({shape[0], K, shape[1], shape[2], shape[3]}).transpose(0, 1), false);
        }
    }
    if (d.wants(2) && tdy.defined()) d.add(2, tdy.sum(Integers{1, 3, 4}), true);
}

double ConvolutionRule::flops(int64_t K, bool second_order) const {
    const int products = 2 * (active(0) + active(1)) + (second_order && has_second_order() ? 2 : 0);
    const Integers& weight = input(1).shape;
    return 2.0 * static_cast<double>(K * output().numel * weight[1] * weight[2] * weight[3]) * products;
}

int64_t ConvolutionRule::workspace(int64_t K) const {
    // The folded copy of tdy or tx, or the second convolution's result before it is added.
    return active(1) ? K * std::max(output().numel, active(0) ? input(0).numel : 0) : 0;
}

}  // namespace flatcore
