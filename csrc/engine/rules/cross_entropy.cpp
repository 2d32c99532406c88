// Cross-entropy per row of the last axis against constant targets. See kernels/cross_entropy.h.
#include "kernels/cross_entropy.h"

#include "losses.h"

namespace flatcore {

namespace {

enum Input { kLogits, kMass, kIndex };
enum Saved { kProbability, kTotal };

}  // namespace

CrossEntropyRule::CrossEntropyRule(const Program& program, const Op& op) : Rule(program, op) {
    if (active(kMass) || active(kIndex)) throw std::invalid_argument("the targets must be constants");
    if (input(kLogits).shape.empty() || input(kLogits).shape.back() == 0)
        throw std::invalid_argument("logits must have at least one class");
    if (input(kMass).shape != (has(kIndex) ? output().shape : input(kLogits).shape) ||
        (has(kIndex) && input(kIndex).shape != output().shape))
        throw std::invalid_argument(
            "masses must have the shape of the logits, or with an index that of the rows");
    classes_ = input(kLogits).shape.back();
    rows_ = input(kLogits).numel / classes_;
}

// Calls body(target, total) with the pointers that the kernels take; total is null before it is known.
template <class T, class Body>
void CrossEntropyRule::with_target(const State& state, const Body& body) const {
    const at::Tensor mass = state.value(op_.inputs[kMass]).contiguous();
    if (has(kIndex)) {
        const at::Tensor index = state.value(op_.inputs[kIndex]).contiguous();
        body(OneClass<T>{index.const_data_ptr<int64_t>(), mass.const_data_ptr<T>()},
             mass.const_data_ptr<T>());
    } else {
        const auto& saved = state.saved(op_);
        body(ClassMasses<T>{mass.const_data_ptr<T>()},
             saved.empty() ? nullptr : saved[kTotal].template const_data_ptr<T>());
    }
}

at::Tensor CrossEntropyRule::forward(State& state) const {
    const at::Tensor z = state.value(op_.inputs[kLogits]).contiguous();
    at::Tensor loss = at::empty(output().shape, z.options()), p = at::empty(z.sizes(), z.options());
    const at::Tensor total = has(kIndex) ? at::Tensor() : at::empty({rows_}, z.options());
    FLATCORE_DISPATCH(z, "cross_entropy", [&] {
        with_target<scalar_t>(state, [&](auto target, const scalar_t*) {
            FLATCORE_RUN(z, cross_entropy_forward, rows_, classes_, z.const_data_ptr<scalar_t>(), target,
                         loss.mutable_data_ptr<scalar_t>(), p.mutable_data_ptr<scalar_t>(),
                         total.defined() ? total.mutable_data_ptr<scalar_t>() : nullptr);
        });
    });
    state.saved(op_) = {p, total};
    return loss;
}

at::Tensor CrossEntropyRule::tangent(const Directions& d) const {
    const at::Tensor tz = d.tangent(kLogits).contiguous();
    const at::Tensor& p = d.state().saved(op_)[kProbability];
    at::Tensor tloss = new_directions(d.K(), output(), tz.options());
    FLATCORE_DISPATCH(tz, "cross_entropy", [&] {
        with_target<scalar_t>(d.state(), [&](auto target, const scalar_t* total) {
            FLATCORE_RUN(tz, cross_entropy_tangent, d.K(), rows_, classes_, target,
                         p.const_data_ptr<scalar_t>(), total, tz.const_data_ptr<scalar_t>(),
                         tloss.mutable_data_ptr<scalar_t>());
        });
    });
    return tloss;
}

void CrossEntropyRule::adjoint(Directions& d) const {
    if (!d.wants(kLogits)) return;
    const State& state = d.state();
    const at::Tensor tdloss = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor tz = d.second_order() ? d.tangent(kLogits).contiguous() : at::Tensor();
    const at::Tensor dloss = d.second_order() ? state.adjoint(op_.output).contiguous() : at::Tensor();
    const at::Tensor& p = state.saved(op_)[kProbability];
    at::Tensor tdz = at::empty(with_directions(d.K(), input(kLogits).shape), state.options());
    FLATCORE_DISPATCH(tdz, "cross_entropy", [&] {
        with_target<scalar_t>(state, [&](auto target, const scalar_t* total) {
            FLATCORE_RUN(tdz, cross_entropy_adjoint, d.K(), rows_, classes_, target,
                         p.const_data_ptr<scalar_t>(), total, pointer_or_null<scalar_t>(tdloss),
                         pointer_or_null<scalar_t>(dloss), pointer_or_null<scalar_t>(tz),
                         tdz.mutable_data_ptr<scalar_t>());
        });
    });
    d.add(kLogits, tdz, true);
}

}  // namespace flatcore
