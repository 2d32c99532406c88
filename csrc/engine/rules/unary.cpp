// y = f(z), element by element. Forward saves f' and f''; the backward sweep turns f'' into h = f'' dy, the
// only other thing a product needs, so neither z, y nor dy is kept for it.
#include "kernels/direction_dots.h"
#include "kernels/pointwise.h"
#include "rules.h"

namespace flatcore {

namespace {
enum Saved { kFirst, kSecond };
}

UnaryRule::UnaryRule(const Program& program, const Op& op)
    : Rule(program, op), function_(static_cast<int>(function_named(op.attributes.text("function")))),
      a_(op.attributes.real_or("a", 0)), b_(op.attributes.real_or("b", 0)), c_(op.attributes.real_or("c", 0)),
      curved_(is_curved(static_cast<Function>(function_))) {}

at::Tensor UnaryRule::forward(State& state) const {
    const at::Tensor z = dense(state.value(op_.inputs[0]), input(0));
    at::Tensor y = new_value(output(), z.options()), first = new_value(output(), z.options());
    at::Tensor second = curved_ ? new_value(output(), z.options()) : at::Tensor();
    FLATCORE_DISPATCH(z, "unary", [&] {
        FLATCORE_RUN(z, unary_forward<scalar_t>, static_cast<Function>(function_), {a_, b_, c_}, z.numel(),
                     z.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(),
                     first.mutable_data_ptr<scalar_t>(),
                     curved_ ? second.mutable_data_ptr<scalar_t>() : nullptr);
    });
    state.saved(op_) = {first, second};
    return y;
}

void UnaryRule::finish_backward(State& state) const {
    if (!curved_) return;
    at::Tensor& second = state.saved(op_)[kSecond];
    const at::Tensor& dy = state.adjoint(op_.output);
    if (dy.defined())
        second.mul_(dy);
    else
        second.zero_();
}

at::Tensor UnaryRule::tangent(const Directions& d) const {
    const at::Tensor tz = dense_directions(d.tangent(0), input(0));
    const at::Tensor& first = d.state().saved(op_)[kFirst];
    at::Tensor ty = new_directions(d.K(), output(), tz.options());
    FLATCORE_DISPATCH(ty, "unary", [&] {
        FLATCORE_RUN(ty, scale_directions<scalar_t>, d.K(), output().numel, first.const_data_ptr<scalar_t>(),
                     tz.const_data_ptr<scalar_t>(), ty.mutable_data_ptr<scalar_t>());
    });
    return ty;
}

void UnaryRule::adjoint(Directions& d) const {
    if (!d.wants(0)) return;
    const bool cross = d.second_order() && curved_;
    const auto& saved = d.state().saved(op_);
    const at::Tensor tdy = d.cotangent().defined() ? dense_directions(d.cotangent(), output()) : at::Tensor();
    const at::Tensor tz = cross ? dense_directions(d.tangent(0), input(0)) : at::Tensor();
    at::Tensor tdz = new_directions(d.K(), input(0), d.state().options());
    FLATCORE_DISPATCH(tdz, "unary", [&] {
        FLATCORE_RUN(tdz, adjoint_directions<scalar_t>, d.K(), output().numel,
                     saved[kFirst].const_data_ptr<scalar_t>(), pointer_or_null<scalar_t>(tdy),
                     cross ? saved[kSecond].const_data_ptr<scalar_t>() : nullptr,
                     pointer_or_null<scalar_t>(tz), false, tdz.mutable_data_ptr<scalar_t>());
    });
    d.add(0, tdz, true);
}

// h holds dy: nothing of the tangent's size is formed.
bool UnaryRule::add_quadratic_form(const Directions& d, const at::Tensor& total) const {
    const at::Tensor tz = dense_directions(d.tangent(0), input(0));
    const at::Tensor& second = d.state().saved(op_)[kSecond];
    const at::Tensor workspace = at::empty({d.K(), kDotPieces}, total.options());
    FLATCORE_DISPATCH(tz, "unary", [&] {
        FLATCORE_RUN(tz, weighted_direction_dots<scalar_t>, d.K(), output().numel,
                     second.const_data_ptr<scalar_t>(), tz.const_data_ptr<scalar_t>(), tz.stride(0),
                     tz.const_data_ptr<scalar_t>(), tz.stride(0), workspace.mutable_data_ptr<double>(),
                     total.mutable_data_ptr<double>());
    });
    return true;
}

}  // namespace flatcore
