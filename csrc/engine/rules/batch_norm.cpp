// Batch normalisation with fixed statistics: an affine map per channel (axis 1). See kernels/channel_affine.h.
#include "../../kernels/channel_affine.h"
#include "rules.h"

namespace flatcore {

namespace {
enum Input { kX, kWeight, kBias, kMean, kVariance };
enum Saved { kInverseStd, kScale, kMeanSaved };
}  // namespace

BatchNormRule::BatchNormRule(const Program& program, const Op& op) : Rule(program, op), eps_(op.attributes.real("eps")) {
    if (input(kX).shape.size() < 2) throw std::invalid_argument("x must have a channel axis");
    if (active(kMean) || active(kVariance)) throw std::invalid_argument("mean and variance must be constants");
}

namespace {

template <class T>
ChannelAffine<T> kernel_of(const State& state, const Op& op, const Value& x) {
    const auto& saved = state.saved(op);
    const int64_t N = x.shape[0], C = x.shape[1];
    return {{N, C, N * C == 0 ? 0 : x.numel / (N * C)},
            saved[kMeanSaved].const_data_ptr<T>(),
            saved[kInverseStd].const_data_ptr<T>(),
            saved[kScale].const_data_ptr<T>(),
            op.inputs[kBias] >= 0 ? state.value(op.inputs[kBias]).const_data_ptr<T>() : nullptr,
            pointer_or_null<T>(state.value(op.inputs[kX]))};
}

}  // namespace

at::Tensor BatchNormRule::forward(State& state) const {
    const at::Tensor x = state.value(op_.inputs[kX]).contiguous();
    const at::Tensor inverse_std = (state.value(op_.inputs[kVariance]) + eps_).rsqrt_();
    const at::Tensor scale = has(kWeight) ? inverse_std * state.value(op_.inputs[kWeight]) : inverse_std;
    state.saved(op_) = {inverse_std, scale, state.value(op_.inputs[kMean]).contiguous()};
    at::Tensor y = at::empty(output().shape, x.options());
    FLATCORE_DISPATCH(y, "batch_norm", [&] {
        auto kernel = kernel_of<scalar_t>(state, op_, input(kX));
        kernel.x = x.const_data_ptr<scalar_t>();
        channel_affine_forward(kernel, y.mutable_data_ptr<scalar_t>());
    });
    return y;
}

at::Tensor BatchNormRule::tangent(const Directions& d) const {
    at::Tensor ty = new_directions(d.K(), output().shape, d.state().options());
    const at::Tensor tx = active(kX) ? d.tangent(kX).contiguous() : at::Tensor();
    const at::Tensor x = active(kWeight) ? d.state().value(op_.inputs[kX]).contiguous() : at::Tensor();
    const at::Tensor tweight = active(kWeight) ? d.tangent(kWeight) : at::Tensor();
    const at::Tensor tbias = active(kBias) ? d.tangent(kBias) : at::Tensor();
    FLATCORE_DISPATCH(ty, "batch_norm", [&] {
        auto kernel = kernel_of<scalar_t>(d.state(), op_, input(kX));
        kernel.x = pointer_or_null<scalar_t>(x);
        channel_affine_tangent(kernel, d.K(), pointer_or_null<scalar_t>(tx), pointer_or_null<scalar_t>(tweight),
                               tweight.defined() ? tweight.stride(0) : 0, pointer_or_null<scalar_t>(tbias),
                               tbias.defined() ? tbias.stride(0) : 0, ty.mutable_data_ptr<scalar_t>());
    });
    return ty;
}

void BatchNormRule::adjoint(Directions& d) const {
    const State& state = d.state();
    const bool cross = d.second_order() && has_second_order();
    const at::Tensor tdy = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor dy = cross ? state.adjoint(op_.output).contiguous() : at::Tensor();
    const at::Tensor x = active(kWeight) ? state.value(op_.inputs[kX]).contiguous() : at::Tensor();
    const at::Tensor tx = cross ? d.tangent(kX).contiguous() : at::Tensor();
    const at::Tensor tweight = cross ? d.tangent(kWeight) : at::Tensor();
    const bool wants_x = d.wants(kX) && (tdy.defined() || cross);
    at::Tensor tdx = wants_x ? new_directions(d.K(), input(kX).shape, state.options()) : at::Tensor();
    const auto sums = [&](int i) {  // the kernel adds
        if (!d.wants(i)) return at::Tensor();
        auto [buffer, fresh] = d.accumulator(i);
        return fresh ? buffer.zero_() : buffer;
    };
    at::Tensor tdweight = sums(kWeight), tdbias = sums(kBias);
    FLATCORE_DISPATCH(state.value(op_.inputs[kMean]), "batch_norm", [&] {
        auto kernel = kernel_of<scalar_t>(state, op_, input(kX));
        kernel.x = pointer_or_null<scalar_t>(x);
        const auto writable = [](at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr; };
        channel_affine_adjoint(
            kernel, d.K(),
            {pointer_or_null<scalar_t>(tdy), pointer_or_null<scalar_t>(dy), pointer_or_null<scalar_t>(tx),
             pointer_or_null<scalar_t>(tweight), tweight.defined() ? tweight.stride(0) : 0, writable(tdx),
             writable(tdweight), tdweight.defined() ? tdweight.stride(0) : 0, writable(tdbias),
             tdbias.defined() ? tdbias.stride(0) : 0});
    });
    if (tdx.defined()) d.add(kX, tdx, true);
}

}  // namespace flatcore
