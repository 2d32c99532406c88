// Sums, products and affine maps with broadcasting.
#include "rules.h"

namespace flatcore {

AddRule::AddRule(const Program& program, const Op& op)
    : Rule(program, op), alpha_(op.attributes.real("alpha")) {}

at::Tensor AddRule::forward(State& state) const {
    return state.value(op_.inputs[0]).add(state.value(op_.inputs[1]), alpha_);
}

at::Tensor AddRule::tangent(const Directions& d) const {
    const auto rank = static_cast<int64_t>(output().shape.size());
    const auto aligned = [&](int i) { return align_directions(d.tangent(i), rank); };
    if (active(0) && active(1)) return aligned(0).add(aligned(1), alpha_);
    const at::Tensor only = active(0) ? aligned(0) : aligned(1) * alpha_;
    return only.expand(with_directions(d.K(), output().shape));
}

void AddRule::adjoint(Directions& d) const {
    const at::Tensor tdy = d.cotangent();
    if (!tdy.defined()) return;
    if (d.wants(0)) d.add(0, reduce_directions(tdy, input(0).shape), false);
    if (!d.wants(1)) return;
    const at::Tensor reduced = reduce_directions(tdy, input(1).shape);
    if (alpha_ == 1)
        d.add(1, reduced, false);
    else
        d.add(1, reduced * alpha_, true);
}

at::Tensor MulRule::forward(State& state) const {
    return state.value(op_.inputs[0]) * state.value(op_.inputs[1]);
}

at::Tensor MulRule::tangent(const Directions& d) const {
    const auto rank = static_cast<int64_t>(output().shape.size());
    at::Tensor ty;
    for (int i : {0, 1}) {
        if (!active(i)) continue;
        const at::Tensor t = align_directions(d.tangent(i), rank);
        const at::Tensor& other = d.state().value(op_.inputs[1 - i]);
        ty = ty.defined() ? ty.addcmul_(t, other) : t * other;
    }
    return ty;
}

void MulRule::adjoint(Directions& d) const {
    const auto rank = static_cast<int64_t>(output().shape.size());
    const bool cross = d.second_order() && has_second_order();
    for (int i : {0, 1}) {
        if (!d.wants(i)) continue;
        at::Tensor result;
        if (d.cotangent().defined()) result = d.cotangent() * d.state().value(op_.inputs[1 - i]);
        if (cross) {
            const at::Tensor t = align_directions(d.tangent(1 - i), rank);
            const at::Tensor& dy = d.state().adjoint(op_.output);
            result = result.defined() ? result.addcmul_(t, dy) : t * dy;
        }
        if (result.defined()) d.add(i, reduce_directions(result, input(i).shape), true);
    }
}

AffineRule::AffineRule(const Program& program, const Op& op)
    : Rule(program, op), scale_(op.attributes.real("scale")), shift_(op.attributes.real("shift")) {}

at::Tensor AffineRule::forward(State& state) const {
    const at::Tensor y = state.value(op_.inputs[0]) * scale_;
    return shift_ == 0 ? y : y + shift_;
}

at::Tensor AffineRule::tangent(const Directions& d) const { return d.tangent(0) * scale_; }

void AffineRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined()) d.add(0, d.cotangent() * scale_, true);
}

}  // namespace flatcore
