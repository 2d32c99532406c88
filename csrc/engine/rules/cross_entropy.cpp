// Cross-entropy per row of the last axis against constant target masses. See kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include "rules.h"

namespace flatcore {

namespace {
enum Saved { kProbability, kTotal };
}

CrossEntropyRule::CrossEntropyRule(const Program& program, const Op& op) : Rule(program, op) {
    if (active(1)) throw std::invalid_argument("the target masses must be constants");
    if (input(0).shape.empty() || input(0).shape != input(1).shape || input(0).shape.back() == 0)
        throw std::invalid_argument(
            "logits and target masses must have the same shape, with at least one class");
    classes_ = input(0).shape.back();
    rows_ = input(0).numel / classes_;
}

at::Tensor CrossEntropyRule::forward(State& state) const {
    const at::Tensor z = state.value(op_.inputs[0]).contiguous(),
                     mass = state.value(op_.inputs[1]).contiguous();
    at::Tensor loss = at::empty(output().shape, z.options()), p = at::empty(z.sizes(), z.options());
    at::Tensor total = at::empty({rows_}, z.options());
    FLATCORE_DISPATCH(z, "cross_entropy", [&] {
        cross_entropy_forward<scalar_t>(rows_, classes_, z.const_data_ptr<scalar_t>(),
                                        mass.const_data_ptr<scalar_t>(), loss.mutable_data_ptr<scalar_t>(),
                                        p.mutable_data_ptr<scalar_t>(), total.mutable_data_ptr<scalar_t>());
    });
    state.saved(op_) = {p, total};
    return loss;
}

at::Tensor CrossEntropyRule::tangent(const Directions& d) const {
    const at::Tensor mass = d.state().value(op_.inputs[1]).contiguous(), tz = d.tangent(0).contiguous();
    const auto& saved = d.state().saved(op_);
    at::Tensor tloss = new_directions(d.K(), output(), tz.options());
    FLATCORE_DISPATCH(tz, "cross_entropy", [&] {
        cross_entropy_tangent<scalar_t>(d.K(), rows_, classes_, mass.const_data_ptr<scalar_t>(),
                                        saved[kProbability].const_data_ptr<scalar_t>(),
                                        saved[kTotal].const_data_ptr<scalar_t>(),
                                        tz.const_data_ptr<scalar_t>(), tloss.mutable_data_ptr<scalar_t>());
    });
    return tloss;
}

void CrossEntropyRule::adjoint(Directions& d) const {
    if (!d.wants(0)) return;
    const State& state = d.state();
    const at::Tensor mass = state.value(op_.inputs[1]).contiguous();
    const at::Tensor tdloss = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor tz = d.second_order() ? d.tangent(0).contiguous() : at::Tensor();
    const at::Tensor dloss = d.second_order() ? state.adjoint(op_.output).contiguous() : at::Tensor();
    const auto& saved = state.saved(op_);
    at::Tensor tdz = at::empty(with_directions(d.K(), input(0).shape), state.options());
    FLATCORE_DISPATCH(tdz, "cross_entropy", [&] {
        cross_entropy_adjoint<scalar_t>(d.K(), rows_, classes_, mass.const_data_ptr<scalar_t>(),
                                        saved[kProbability].const_data_ptr<scalar_t>(),
                                        saved[kTotal].const_data_ptr<scalar_t>(),
                                        pointer_or_null<scalar_t>(tdloss), pointer_or_null<scalar_t>(dloss),
                                        pointer_or_null<scalar_t>(tz), tdz.mutable_data_ptr<scalar_t>());
    });
    d.add(0, tdz, true);
}

}  // namespace flatcore
