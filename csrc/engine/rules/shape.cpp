// Views: the same numbers under other strides, in every sweep.
#include <ATen/TensorUtils.h>

#include "rules.h"

namespace flatcore {

at::Tensor ViewRule::forward(State& state) const {
    return state.value(op_.inputs[0]).reshape(output().shape);
}

at::Tensor ViewRule::view(const at::Tensor& directions) const {
    const Integers shape = with_directions(directions.size(0), output().shape);
    const bool same_memory =
        at::detail::computeStride(directions.sizes(), directions.strides(), shape).has_value();
    return same_memory ? directions.view(shape) : at::Tensor();
}

at::Tensor ViewRule::tangent(const Directions& d) const {
    return d.tangent(0).reshape(with_directions(d.K(), output().shape));
}

void ViewRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined())
        d.add(0, d.cotangent().reshape(with_directions(d.K(), input(0).shape)), false);
}

PermuteRule::PermuteRule(const Program& program, const Op& op)
    : Rule(program, op), dims_(op.attributes.integers("dims")) {
    const auto rank = static_cast<int64_t>(input(0).shape.size());
    inverse_.assign(dims_.size(), -1);
    for (size_t i = 0; i < dims_.size(); ++i) {
        if (dims_[i] < 0) dims_[i] += rank;
        if (dims_[i] < 0 || dims_[i] >= rank || inverse_[static_cast<size_t>(dims_[i])] >= 0)
            throw std::invalid_argument("dims must be a permutation of the axes");
        inverse_[static_cast<size_t>(dims_[i])] = static_cast<int64_t>(i);
    }
    if (static_cast<int64_t>(dims_.size()) != rank) throw std::invalid_argument("dims must name every axis");
}

namespace {

Integers behind_directions(const Integers& dims) {
    Integers result{0};
    for (int64_t dim : dims) result.push_back(dim + 1);
    return result;
}

}  // namespace

Integers PermuteRule::output_order() const {
    if (input(0).channels_last) return {};
    Integers order = input(0).order;
    if (order.empty()) return inverse_;
    for (int64_t& axis : order) axis = inverse_[static_cast<size_t>(axis)];
    return order;
}

at::Tensor PermuteRule::forward(State& state) const { return state.value(op_.inputs[0]).permute(dims_); }

at::Tensor PermuteRule::view(const at::Tensor& directions) const {
    return directions.permute(behind_directions(dims_));
}

at::Tensor PermuteRule::tangent(const Directions& d) const { return view(d.tangent(0)); }

void PermuteRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined())
        d.add(0, d.cotangent().permute(behind_directions(inverse_)), false);
}

at::Tensor ExpandRule::forward(State& state) const {
    return state.value(op_.inputs[0]).expand(output().shape);
}

at::Tensor ExpandRule::tangent(const Directions& d) const {
    return align_directions(d.tangent(0), static_cast<int64_t>(output().shape.size()))
        .expand(with_directions(d.K(), output().shape));
}

void ExpandRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined())
        d.add(0, reduce_directions(d.cotangent(), input(0).shape), false);
}

}  // namespace flatcore
