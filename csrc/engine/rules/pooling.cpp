// Pooling is linear once the maxima are known, so a direction is pooled like a batch: K folds into the batch
// axis.
#include <ATen/ops/_adaptive_avg_pool2d.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/max_pool2d_with_indices.h>

#include "kernels/gather.h"
#include "rules.h"

namespace flatcore {

namespace {

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// Directions (K, N, C, H, W) as one batch (K N, C, H, W), channels last.
at::Tensor fold_batch(const at::Tensor& t) { return channels_last(t.flatten(0, 1)); }

void require_images(const Value& x) {
    if (x.shape.size() != 4) throw std::invalid_argument("x must have four axes");
}

int64_t plane(const Value& value) { return value.shape[2] * value.shape[3]; }

// An uninitialised batch of K times the value's images.
at::Tensor new_batch(int64_t K, const Value& value, const at::TensorOptions& options) {
    const Integers& s = value.shape;
    return at::empty({K * s[0], s[1], s[2], s[3]}, options, at::MemoryFormat::ChannelsLast);
}

}  // namespace

MaxPoolRule::MaxPoolRule(const Program& program, const Op& op)
    : Rule(program, op), kernel_(op.attributes.integers("kernel")), stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")), dilation_(op.attributes.integers("dilation")),
      ceil_mode_(op.attributes.flag("ceil_mode")) {
    require_images(input(0));
}

at::Tensor MaxPoolRule::forward(State& state) const {
    const at::Tensor x = channels_last(state.value(op_.inputs[0]));
    auto [y, index] = at::max_pool2d_with_indices(x, kernel_, stride_, padding_, dilation_, ceil_mode_);
    state.saved(op_) = {index.permute({0, 2, 3, 1}).contiguous()};
    return channels_last(y);
}

at::Tensor MaxPoolRule::tangent(const Directions& d) const {
    const at::Tensor tx = fold_batch(d.tangent(0));
    const Value &in = input(0), &out = output();
    at::Tensor ty = new_batch(d.K(), out, tx.options());
    FLATCORE_DISPATCH(ty, "max_pool2d", [&] {
        FLATCORE_RUN(ty, gather_pixels<scalar_t>, d.K(), {in.shape[0], plane(in), plane(out), in.shape[1]},
                     d.state().saved(op_)[0].const_data_ptr<int64_t>(), tx.const_data_ptr<scalar_t>(),
                     ty.mutable_data_ptr<scalar_t>());
    });
    return ty.unflatten(0, {d.K(), out.shape[0]});
}

void MaxPoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    const at::Tensor tdy = fold_batch(d.cotangent());
    const Value &in = input(0), &out = output();
    at::Tensor tdx = new_batch(d.K(), in, tdy.options());
    FLATCORE_DISPATCH(tdx, "max_pool2d", [&] {
        FLATCORE_RUN(tdx, scatter_pixels<scalar_t>, d.K(), {in.shape[0], plane(in), plane(out), in.shape[1]},
                     d.state().saved(op_)[0].const_data_ptr<int64_t>(), tdy.const_data_ptr<scalar_t>(),
                     tdx.mutable_data_ptr<scalar_t>());
    });
    d.add(0, tdx.unflatten(0, {d.K(), in.shape[0]}), true);
}

AveragePoolRule::AveragePoolRule(const Program& program, const Op& op)
    : Rule(program, op), kernel_(op.attributes.integers("kernel")), stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")), ceil_mode_(op.attributes.flag("ceil_mode")),
      count_include_pad_(op.attributes.flag("count_include_pad")) {
    require_images(input(0));
    if (const int64_t divisor = op.attributes.integer("divisor")) divisor_ = divisor;
}

at::Tensor AveragePoolRule::forward(State& state) const {
    return at::avg_pool2d(channels_last(state.value(op_.inputs[0])), kernel_, stride_, padding_, ceil_mode_,
                          count_include_pad_, divisor_);
}

at::Tensor AveragePoolRule::tangent(const Directions& d) const {
    return at::avg_pool2d(fold_batch(d.tangent(0)), kernel_, stride_, padding_, ceil_mode_,
                          count_include_pad_, divisor_)
        .unflatten(0, {d.K(), output().shape[0]});
}

void AveragePoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    const at::Tensor shape_only = new_batch(d.K(), input(0), d.state().options());
    d.add(0,
          at::avg_pool2d_backward(fold_batch(d.cotangent()), shape_only, kernel_, stride_, padding_,
                                  ceil_mode_, count_include_pad_, divisor_)
              .unflatten(0, {d.K(), input(0).shape[0]}),
          true);
}

AdaptiveAveragePoolRule::AdaptiveAveragePoolRule(const Program& program, const Op& op)
    : Rule(program, op), output_size_(op.attributes.integers("output_size")) {
    require_images(input(0));
}

at::Tensor AdaptiveAveragePoolRule::forward(State& state) const {
    return at::_adaptive_avg_pool2d(channels_last(state.value(op_.inputs[0])), output_size_);
}

at::Tensor AdaptiveAveragePoolRule::tangent(const Directions& d) const {
    return at::_adaptive_avg_pool2d(fold_batch(d.tangent(0)), output_size_)
        .unflatten(0, {d.K(), output().shape[0]});
}

void AdaptiveAveragePoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    const at::Tensor shape_only = new_batch(d.K(), input(0), d.state().options());
    d.add(0,
          at::_adaptive_avg_pool2d_backward(fold_batch(d.cotangent()), shape_only)
              .unflatten(0, {d.K(), input(0).shape[0]}),
          true);
}

}  // namespace flatcore
