// Softmax and logsumexp over the last axis. See kernels/softmax.h.
#include "kernels/softmax.h"

#include "rules.h"

namespace flatcore {

namespace {

template <class T>
const T* data_of(const at::Tensor& t) {
    return t.const_data_ptr<T>();
}

void require_columns(const Value& x) {
    if (x.shape.empty() || x.shape.back() == 0)
        throw std::invalid_argument("the last axis of x must not be empty");
}

}  // namespace

SoftmaxRule::SoftmaxRule(const Program& program, const Op& op) : Rule(program, op) {
    require_columns(input(0));
    columns_ = input(0).shape.back();
    rows_ = input(0).numel / columns_;
}

at::Tensor SoftmaxRule::forward(State& state) const {
    const at::Tensor z = state.value(op_.inputs[0]).contiguous();
    at::Tensor p = at::empty(z.sizes(), z.options());
    FLATCORE_DISPATCH(z, "softmax", [&] {
        FLATCORE_RUN(p, softmax_forward<scalar_t>, rows_, columns_, data_of<scalar_t>(z),
                     p.mutable_data_ptr<scalar_t>(), nullptr);
    });
    state.saved(op_) = {p};
    return p;
}

at::Tensor SoftmaxRule::tangent(const Directions& d) const {
    const at::Tensor tz = d.tangent(0).contiguous();
    at::Tensor tp = at::empty(tz.sizes(), tz.options());
    FLATCORE_DISPATCH(tp, "softmax", [&] {
        FLATCORE_RUN(tp, softmax_tangent<scalar_t>, d.K(), rows_, columns_,
                     data_of<scalar_t>(d.state().saved(op_)[0]), data_of<scalar_t>(tz),
                     tp.mutable_data_ptr<scalar_t>());
    });
    return tp;
}

void SoftmaxRule::adjoint(Directions& d) const {
    if (!d.wants(0)) return;
    const bool cross = d.second_order();
    const at::Tensor tdp = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor dp = cross ? d.state().adjoint(op_.output).contiguous() : at::Tensor();
    const at::Tensor tz = cross ? d.tangent(0).contiguous() : at::Tensor();
    // Contiguous, as the kernel writes, whatever layout z is kept in.
    at::Tensor tdz = at::empty(with_directions(d.K(), input(0).shape), d.state().options());
    FLATCORE_DISPATCH(tdz, "softmax", [&] {
        FLATCORE_RUN(tdz, softmax_adjoint<scalar_t>, d.K(), rows_, columns_,
                     data_of<scalar_t>(d.state().saved(op_)[0]), pointer_or_null<scalar_t>(tdp),
                     pointer_or_null<scalar_t>(dp), pointer_or_null<scalar_t>(tz),
                     tdz.mutable_data_ptr<scalar_t>());
    });
    d.add(0, tdz, true);
}

// y = log sum exp z, the last axis kept with one element:
//   ty = <p, tz> ;  dz = dy p ;  tdz = tdy p + dy p (tz - <p, tz>)
LogSumExpRule::LogSumExpRule(const Program& program, const Op& op) : Rule(program, op) {
    require_columns(input(0));
    columns_ = input(0).shape.back();
    rows_ = input(0).numel / columns_;
}

at::Tensor LogSumExpRule::forward(State& state) const {
    const at::Tensor z = state.value(op_.inputs[0]).contiguous();
    at::Tensor p = at::empty(z.sizes(), z.options()), y = at::empty(output().shape, z.options());
    FLATCORE_DISPATCH(z, "logsumexp", [&] {
        FLATCORE_RUN(p, softmax_forward<scalar_t>, rows_, columns_, data_of<scalar_t>(z),
                     p.mutable_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>());
    });
    state.saved(op_) = {p};
    return y;
}

at::Tensor LogSumExpRule::tangent(const Directions& d) const {
    return (d.tangent(0) * d.state().saved(op_)[0]).sum(-1, /*keepdim=*/true);
}

void LogSumExpRule::adjoint(Directions& d) const {
    if (!d.wants(0)) return;
    const at::Tensor& p = d.state().saved(op_)[0];
    at::Tensor tdz;
    if (d.cotangent().defined()) tdz = d.cotangent() * p;
    if (d.second_order()) {
        const at::Tensor tz = d.tangent(0);
        const at::Tensor term =
            (tz - (tz * p).sum(-1, /*keepdim=*/true)).mul_(p).mul_(d.state().adjoint(op_.output));
        tdz = tdz.defined() ? tdz.add_(term) : term;
    }
    if (tdz.defined()) d.add(0, tdz, true);
}

}  // namespace flatcore
