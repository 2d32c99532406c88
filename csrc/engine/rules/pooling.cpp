// Pooling is linear once the maxima are known, so a direction is pooled like a batch: K folds into the batch axis.
#include <ATen/ops/_adaptive_avg_pool2d.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/max_pool2d_with_indices.h>

#include "../../kernels/gather.h"
#include "rules.h"

namespace flatcore {

namespace {

at::Tensor fold_batch(const at::Tensor& t) {
    return t.reshape({t.size(0) * t.size(1), t.size(2), t.size(3), t.size(4)});
}

void require_images(const Value& x) {
    if (x.shape.size() != 4) throw std::invalid_argument("x must have four axes");
}

int64_t plane(const Value& value) { return value.shape[2] * value.shape[3]; }

}  // namespace

MaxPoolRule::MaxPoolRule(const Program& program, const Op& op)
    : Rule(program, op),
      kernel_(op.attributes.integers("kernel")),
      stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")),
      dilation_(op.attributes.integers("dilation")),
      ceil_mode_(op.attributes.flag("ceil_mode")) {
    require_images(input(0));
}

at::Tensor MaxPoolRule::forward(State& state) const {
    const at::Tensor x = state.value(op_.inputs[0]).contiguous();
    auto [y, index] = at::max_pool2d_with_indices(x, kernel_, stride_, padding_, dilation_, ceil_mode_);
    state.saved(op_) = {index.contiguous()};
    return y;
}

at::Tensor MaxPoolRule::tangent(const Directions& d) const {
    const at::Tensor tx = d.tangent(0).contiguous();
    const Value &in = input(0), &out = output();
    at::Tensor ty = new_directions(d.K(), out.shape, tx.options());
    FLATCORE_DISPATCH(ty, "max_pool2d", [&] {
        gather_planes<scalar_t>(d.K(), in.shape[0] * in.shape[1], plane(in), plane(out),
                                d.state().saved(op_)[0].const_data_ptr<int64_t>(), tx.const_data_ptr<scalar_t>(),
                                ty.mutable_data_ptr<scalar_t>());
    });
    return ty;
}

void MaxPoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    const at::Tensor tdy = d.cotangent().contiguous();
    const Value &in = input(0), &out = output();
    at::Tensor tdx = new_directions(d.K(), in.shape, tdy.options());
    FLATCORE_DISPATCH(tdx, "max_pool2d", [&] {
        scatter_planes<scalar_t>(d.K(), in.shape[0] * in.shape[1], plane(in), plane(out),
                                 d.state().saved(op_)[0].const_data_ptr<int64_t>(), tdy.const_data_ptr<scalar_t>(),
                                 tdx.mutable_data_ptr<scalar_t>());
    });
    d.add(0, tdx, true);
}

AveragePoolRule::AveragePoolRule(const Program& program, const Op& op)
    : Rule(program, op),
      kernel_(op.attributes.integers("kernel")),
      stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")),
      ceil_mode_(op.attributes.flag("ceil_mode")),
      count_include_pad_(op.attributes.flag("count_include_pad")) {
    require_images(input(0));
    if (const int64_t divisor = op.attributes.integer("divisor")) divisor_ = divisor;
}

at::Tensor AveragePoolRule::forward(State& state) const {
    return at::avg_pool2d(state.value(op_.inputs[0]).contiguous(), kernel_, stride_, padding_, ceil_mode_,
                          count_include_pad_, divisor_);
}

at::Tensor AveragePoolRule::tangent(const Directions& d) const {
    return at::avg_pool2d(fold_batch(d.tangent(0)).contiguous(), kernel_, stride_, padding_, ceil_mode_,
                          count_include_pad_, divisor_)
        .view(with_directions(d.K(), output().shape));
}

void AveragePoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    Integers folded = input(0).shape;
    folded[0] *= d.K();
    const at::Tensor shape_only = at::empty(folded, d.state().options());
    d.add(0,
          at::avg_pool2d_backward(fold_batch(d.cotangent()).contiguous(), shape_only, kernel_, stride_, padding_, ceil_mode_,
                                  count_include_pad_, divisor_)
              .view(with_directions(d.K(), input(0).shape)),
          true);
}

AdaptiveAveragePoolRule::AdaptiveAveragePoolRule(const Program& program, const Op& op)
    : Rule(program, op), output_size_(op.attributes.integers("output_size")) {
    require_images(input(0));
}

at::Tensor AdaptiveAveragePoolRule::forward(State& state) const {
    return at::_adaptive_avg_pool2d(state.value(op_.inputs[0]).contiguous(), output_size_);
}

at::Tensor AdaptiveAveragePoolRule::tangent(const Directions& d) const {
    return at::_adaptive_avg_pool2d(fold_batch(d.tangent(0)).contiguous(), output_size_)
        .view(with_directions(d.K(), output().shape));
}

void AdaptiveAveragePoolRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    Integers folded = input(0).shape;
    folded[0] *= d.K();
    const at::Tensor shape_only = at::empty(folded, d.state().options());
    d.add(0,
          at::_adaptive_avg_pool2d_backward(fold_batch(d.cotangent()).contiguous(), shape_only)
              .view(with_directions(d.K(), input(0).shape)),
          true);
}

}  // namespace flatcore
