// y = x * W + b (cross-correlation, N C H W, stored channels last).
//   ty_k = tx_k * W + x * V_k + tb_k
//   tdx_k = tdy_k *' W + dy *' V_k ;  tdW_k = wgrad(tdy_k, x) + wgrad(dy, tx_k) ;  tdb_k = sum of tdy_k
// Where W is shared, K folds into the batch axis. The other terms run one direction at a time: channels last
// needs no reordering of x or dy, and one direction's working set stays in the cache. On a GPU a small
// convolution leaves most processors idle and its launch costs as much as its work, so there K folds into the
// channels, of the results or of the operand that is summed over, for one more pass over operands or results.
//
// In bf16 the results are rounded too: oneDNN's and cuDNN's convolutions, as torch calls them, give the type
// that they take.
#include <ATen/Context.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>

#include "rules.h"

namespace flatcore {

namespace {

enum Saved { kX, kWeight };

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// The sum of the products goes into what has float32.
at::Tensor widened(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16 ? t.to(at::kFloat) : t; }

// With fewer channels, or less to do, the passes over operands and results cost more than the products save.
constexpr int64_t kFewestChannels = 16, kFewestProducts = int64_t{1} << 21;

bool pays_in_bf16(bool gpu, const Integers& weight, int64_t results, int64_t groups) {
    return groups == 1 && std::min(weight[0], weight[1]) >= kFewestChannels &&
           results * weight[1] * weight[2] * weight[3] >= kFewestProducts &&
           (gpu || at::globalContext().userEnabledMkldnn());
}

// On a GPU, up to this many multiply-adds a direction, directions are convolved together: in float32 some 30
// microseconds of an H200 at half its documented rate. By counting, not measured.
constexpr int64_t kMostTogether = int64_t{1} << 29;

// K images or weights (K, A, B, H, W) as (A, K B, H, W) or (K A, B, H, W), channels last, in one pass.
at::Tensor written(const at::Tensor& t, at::ScalarType type) {
    return at::empty(t.sizes(), t.options().dtype(type)).copy_(t);
}
at::Tensor in_channels(const at::Tensor& t, at::ScalarType type) {
    return written(t.permute({1, 3, 4, 0, 2}), type).flatten(3).permute({0, 3, 1, 2});
}
at::Tensor in_rows(const at::Tensor& t, at::ScalarType type) {
    return written(t.permute({0, 1, 3, 4, 2}), type).flatten(0, 1).permute({0, 3, 1, 2});
}
// (A, K B, H, W) as K images or weights (K, A, B, H, W), a view.
at::Tensor of_channels(const at::Tensor& t, int64_t K) {
    return t.unflatten(1, {K, t.size(1) / K}).transpose(0, 1);
}

void add_or_write(const at::Tensor& sum, const at::Tensor& term, bool add) {
    if (add)
        sum.add_(term);
    else
        sum.copy_(term);
}

}  // namespace

ConvolutionRule::ConvolutionRule(const Program& program, const Op& op)
    : Rule(program, op), stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")), dilation_(op.attributes.integers("dilation")),
      groups_(op.attributes.integer("groups")) {
    if (input(0).shape.size() != 4 || input(1).shape.size() != 4)
        throw std::invalid_argument("x and weight must have four axes");
    if (stride_.size() != 2 || padding_.size() != 2 || dilation_.size() != 2)
        throw std::invalid_argument("stride, padding and dilation must be two integers");
}

at::Tensor ConvolutionRule::convolve(const at::Tensor& x, const at::Tensor& weight) const {
    return channels_last(widened(
        at::convolution(x, weight, std::nullopt, stride_, padding_, dilation_, false, {0, 0}, groups_)));
}

// Of x, only the shape is read.
at::Tensor ConvolutionRule::input_gradient(const at::Tensor& dy, const at::Tensor& x,
                                           const at::Tensor& weight) const {
    return channels_last(widened(
        std::get<0>(at::convolution_backward(dy, x, weight, at::OptionalIntArrayRef(), stride_, padding_,
                                             dilation_, false, {0, 0}, groups_, {true, false, false}))));
}

// Of weight, only the shape is read.
at::Tensor ConvolutionRule::weight_gradient(const at::Tensor& dy, const at::Tensor& x,
                                            const at::Tensor& weight) const {
    const auto gradient = [&](const at::Tensor& images, const Integers& stride) {
        return widened(std::get<1>(at::convolution_backward(dy, images, weight, at::OptionalIntArrayRef(),
                                                            stride, padding_, dilation_, false, {0, 0},
                                                            groups_, {false, true, false})));
    };
    return skips_pixels(x, weight)
               ? gradient(channels_last(
                              x.slice(2, 0, std::nullopt, stride_[0]).slice(3, 0, std::nullopt, stride_[1])),
                          {1, 1})
               : gradient(x, stride_);
}

// Of a kernel of one pixel with strides, whose gradient is that of the pixels that it reads. oneDNN 3.12
// writes outside its memory there on processors with AVX2 alone, for channels that are no multiple of eight.
bool ConvolutionRule::skips_pixels(const at::Tensor& x, const at::Tensor& weight) const {
    return x.is_cpu() && weight.size(2) == 1 && weight.size(3) == 1 && padding_ == Integers{0, 0} &&
           stride_ != Integers{1, 1} && x.size(1) % 8 != 0;
}

at::Tensor ConvolutionRule::forward(State& state) const {
    const at::Tensor x = channels_last(state.value(op_.inputs[0])),
                     weight = channels_last(state.value(op_.inputs[1]));
    state.saved(op_) = {active(1) ? x : at::Tensor(), weight};
    const std::optional<at::Tensor> bias =
        has(2) ? std::optional<at::Tensor>(state.value(op_.inputs[2])) : std::nullopt;
    return channels_last(
        at::convolution(x, weight, bias, stride_, padding_, dilation_, false, {0, 0}, groups_));
}

at::Tensor ConvolutionRule::tangent(const Directions& d) const {
    const int64_t K = d.K();
    const auto& saved = d.state().saved(op_);
    const at::ScalarType type = operand_type(d);
    const auto operand = [type](const at::Tensor& t) { return channels_last(t).to(type); };
    at::Tensor ty;
    if (active(0)) {
        const at::Tensor tx = d.tangent(0).flatten(0, 1);
        ty = convolve(operand(tx), operand(saved[kWeight])).unflatten(0, {K, output().shape[0]});
    }
    if (active(1)) {
        const bool started = ty.defined();
        if (!started) ty = new_directions(K, output(), d.state().options());
        const at::Tensor x = operand(saved[kX]), tweight = d.tangent(1);
        if (together(K)) {
            add_or_write(ty, of_channels(convolve(x, in_rows(tweight, type)), K), started);
        } else {
            for (int64_t k = 0; k < K; ++k)
                add_or_write(ty.select(0, k), convolve(x, operand(tweight.select(0, k))), started);
        }
    }
    if (active(2)) {
        const at::Tensor bias = d.tangent(2).reshape({K, 1, output().shape[1], 1, 1});
        if (ty.defined())
            ty.add_(bias);
        else
            ty = new_directions(K, output(), d.state().options())
                     .copy_(bias.expand(with_directions(K, output().shape)));
    }
    return ty;
}

void ConvolutionRule::adjoint(Directions& d) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const auto& saved = state.saved(op_);
    const bool cross = d.second_order() && has_second_order();
    const at::ScalarType type = operand_type(d);
    const auto operand = [type](const at::Tensor& t) { return channels_last(t).to(type); };
    const at::Tensor summands =
        d.cotangent().defined() ? dense_directions(d.cotangent(), output()) : at::Tensor();
    const at::Tensor tdy = summands.defined() ? summands.to(type) : summands;
    const at::Tensor dy = cross ? dense(state.adjoint(op_.output), output()).to(type) : at::Tensor();
    // Stands in where an operand is asked for its shape alone. An expanded number would be copied.
    const auto unread = [&](const Integers& shape) {
        return at::empty(shape, state.options().dtype(type), at::MemoryFormat::ChannelsLast);
    };
    if (d.wants(0) && (tdy.defined() || cross)) {
        const Integers& shape = input(0).shape;
        at::Tensor tdx;
        if (tdy.defined()) {
            tdx = input_gradient(tdy.flatten(0, 1), unread({K * shape[0], shape[1], shape[2], shape[3]}),
                                 operand(saved[kWeight]))
                      .unflatten(0, {K, shape[0]});
        }
        if (cross) {
            const bool started = tdx.defined();
            if (!started) tdx = at::empty(with_directions(K, shape), state.options());
            const at::Tensor tweight = d.tangent(1);
            if (together(K)) {
                const at::Tensor x = unread({shape[0], K * shape[1], shape[2], shape[3]});
                add_or_write(tdx, of_channels(input_gradient(dy, x, in_channels(tweight, type)), K), started);
            } else {
                const at::Tensor x = unread(shape);
                for (int64_t k = 0; k < K; ++k)
                    add_or_write(tdx.select(0, k), input_gradient(dy, x, operand(tweight.select(0, k))),
                                 started);
            }
        }
        d.add(0, tdx, true);
    }
    if (d.wants(1) && (tdy.defined() || cross)) {
        const Integers& shape = input(1).shape;
        at::Tensor tdw = at::empty(with_directions(K, shape), state.options());
        const at::Tensor tx = cross ? d.tangent(0) : at::Tensor();
        const at::Tensor x = tdy.defined() ? operand(saved[kX]) : at::Tensor();
        if (together(K)) {
            if (tdy.defined()) {
                const at::Tensor weight = unread({K * shape[0], shape[1], shape[2], shape[3]});
                tdw.copy_(weight_gradient(in_channels(tdy, type), x, weight).unflatten(0, {K, shape[0]}));
            }
            if (cross) {
                const at::Tensor weight = unread({shape[0], K * shape[1], shape[2], shape[3]});
                add_or_write(tdw, of_channels(weight_gradient(dy, in_channels(tx, type), weight), K),
                             tdy.defined());
            }
        } else {
            const at::Tensor weight = unread(shape);
            for (int64_t k = 0; k < K; ++k) {
                const at::Tensor sum = tdw.select(0, k);
                if (tdy.defined()) sum.copy_(weight_gradient(tdy.select(0, k), x, weight));
                if (cross)
                    add_or_write(sum, weight_gradient(dy, operand(tx.select(0, k)), weight), tdy.defined());
            }
        }
        d.add(1, tdw, true);
    }
    if (d.wants(2) && tdy.defined()) d.add(2, summands.sum(Integers{1, 3, 4}), true);
}

bool ConvolutionRule::together(int64_t K) const {
    const Integers& weight = input(1).shape;
    const int64_t largest = std::max({input(0).numel, output().numel, input(1).numel});
    return program_.gpu() && K > 1 && groups_ == 1 &&
           output().numel * weight[1] * weight[2] * weight[3] <= kMostTogether &&
           K * largest <= std::numeric_limits<int32_t>::max();  // as cuDNN counts
}

double ConvolutionRule::flops(int64_t K, bool second_order) const {
    const int products = 2 * (active(0) + active(1)) + (second_order && has_second_order() ? 2 : 0);
    const Integers& weight = input(1).shape;
    return 2.0 * static_cast<double>(K * output().numel * weight[1] * weight[2] * weight[3]) * products;
}

at::ScalarType ConvolutionRule::operand_type(const Directions& d) const {
    const bool rounds = d.precision() == Precision::bf16 &&
                        pays_in_bf16(program_.gpu(), input(1).shape, output().numel, groups_);
    return rounds ? at::kBFloat16 : c10::typeMetaToScalarType(d.state().options().dtype());
}

Rounding ConvolutionRule::rounding(int64_t K, bool second_order) const {
    if (!pays_in_bf16(program_.gpu(), input(1).shape, output().numel, groups_)) return {};
    // In half the bytes: K directions of an operand and of the result at once, the operands that they share,
    // weights.
    const int64_t weights = together(K) ? 3 * K : 2;
    const int64_t rounded = (K + 1) * (input(0).numel + output().numel) + weights * input(1).numel;
    return {flops(K, second_order), (rounded + 1) / 2};
}

int64_t ConvolutionRule::workspace(int64_t K) const {
    // Tangents brought to channels last, and the weights' products, each direction's term before it is added.
    const int64_t reordered = active(0) && !input(0).channels_last ? K * input(0).numel : 0;
    const int64_t weights = active(1) ? K * input(1).numel : 0;
    if (!together(K)) return std::max(output().numel, input(0).numel) + reordered + weights;
    // Of all directions: an operand in its other order, the term, and what stands for the term's shape.
    return K * std::max(output().numel, 2 * input(0).numel) + reordered + 3 * weights;
}

int64_t ConvolutionRule::saved() const {
    return (active(1) && !input(0).channels_last ? input(0).numel : 0) + input(1).numel;
}

}  // namespace flatcore
