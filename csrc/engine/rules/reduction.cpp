// y = scale * sum of x over `dims`; a mean has scale 1 / count.
#include <algorithm>

#include "rules.h"

namespace flatcore {

SumRule::SumRule(const Program& program, const Op& op)
    : Rule(program, op), dims_(op.attributes.integers("dims")), keepdim_(op.attributes.flag("keepdim")),
      scale_(op.attributes.real("scale")) {
    const auto rank = static_cast<int64_t>(input(0).shape.size());
    for (int64_t& dim : dims_) {
        if (dim < -rank || dim >= rank)
            throw std::invalid_argument("dims: axis " + std::to_string(dim) + " does not exist");
        if (dim < 0) dim += rank;
    }
    std::sort(dims_.begin(), dims_.end());
}

at::Tensor SumRule::forward(State& state) const {
    const at::Tensor& x = state.value(op_.inputs[0]);
    // An empty list of axes means "all" to torch and "none" here.
    const at::Tensor total = dims_.empty() ? x : x.sum(dims_, keepdim_);
    return scale_ == 1 && !dims_.empty() ? total : total * scale_;
}

at::Tensor SumRule::tangent(const Directions& d) const {
    Integers axes = dims_;
    for (int64_t& axis : axes) ++axis;
    const at::Tensor total = axes.empty() ? d.tangent(0) : d.tangent(0).sum(axes, keepdim_);
    return total * scale_;
}

void SumRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    Integers shape = with_directions(d.K(), input(0).shape);
    for (int64_t dim : dims_) shape[static_cast<size_t>(dim + 1)] = 1;
    const at::Tensor scaled = (d.cotangent() * scale_).reshape(shape);
    d.add(0, scaled.expand(with_directions(d.K(), input(0).shape)), false);
}

}  // namespace flatcore
