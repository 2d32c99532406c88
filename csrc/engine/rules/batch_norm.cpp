// Batch normalisation with fixed statistics: an affine map per channel (axis 1). See
// kernels/channel_affine.h.
#include <ATen/ops/empty.h>

#include "kernels/channel_affine.h"
#include "row_sums.h"
#include "rules.h"

namespace flatcore {

namespace {

enum Input { kX, kWeight, kBias, kMean, kVariance };
enum Saved { kInverseStd, kScale, kMeanSaved };

template <class T>
T* writable_or_null(const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

int64_t stride_or_zero(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

template <class T>
ChannelAffine<T> kernel_of(const State& state, const Op& op, int64_t rows, int64_t channels,
                           const at::Tensor& bias, const at::Tensor& x) {
    const auto& saved = state.saved(op);
    return {rows,
            channels,
            saved[kMeanSaved].const_data_ptr<T>(),
            saved[kInverseStd].const_data_ptr<T>(),
            saved[kScale].const_data_ptr<T>(),
            pointer_or_null<T>(bias),
            pointer_or_null<T>(x)};
}

}  // namespace

BatchNormRule::BatchNormRule(const Program& program, const Op& op)
    : Rule(program, op), eps_(op.attributes.real("eps")) {
    if (input(kX).shape.size() < 2) throw std::invalid_argument("x must have a channel axis");
    if (active(kMean) || active(kVariance))
        throw std::invalid_argument("mean and variance must be constants");
    channels_ = input(kX).shape[1];
    rows_ = channels_ == 0 ? 0 : input(kX).numel / channels_;
}

// Channels moved to the end: free for images stored channels last and for (N, C).
at::Tensor BatchNormRule::rows_of(const at::Tensor& t) const {
    const bool directions = t.dim() > static_cast<int64_t>(input(kX).shape.size());
    return t.movedim(directions ? 2 : 1, -1).contiguous();
}

at::Tensor BatchNormRule::value_of(const at::Tensor& rows, int64_t K) const {
    Integers shape = input(kX).shape;
    shape.erase(shape.begin() + 1);
    shape.push_back(channels_);
    if (K > 0) shape = with_directions(K, shape);
    return rows.view(shape).movedim(-1, K > 0 ? 2 : 1);
}

at::Tensor BatchNormRule::forward(State& state) const {
    const at::Tensor x = rows_of(state.value(op_.inputs[kX]));
    const at::Tensor inverse_std = (state.value(op_.inputs[kVariance]) + eps_).rsqrt_();
    const at::Tensor scale = has(kWeight) ? inverse_std * state.value(op_.inputs[kWeight]) : inverse_std;
    state.saved(op_) = {inverse_std, scale, state.value(op_.inputs[kMean]).contiguous()};
    const at::Tensor bias = has(kBias) ? state.value(op_.inputs[kBias]).contiguous() : at::Tensor();
    at::Tensor y = at::empty({rows_, channels_}, x.options());
    FLATCORE_DISPATCH(y, "batch_norm", [&] {
        FLATCORE_RUN(y, channel_affine_forward, kernel_of<scalar_t>(state, op_, rows_, channels_, bias, x),
                     y.mutable_data_ptr<scalar_t>());
    });
    return value_of(y, 0);
}

at::Tensor BatchNormRule::tangent(const Directions& d) const {
    const int64_t K = d.K();
    at::Tensor ty = at::empty({K * rows_, channels_}, d.state().options());
    const at::Tensor tx = active(kX) ? rows_of(d.tangent(kX)) : at::Tensor();
    const at::Tensor x = active(kWeight) ? rows_of(d.state().value(op_.inputs[kX])) : at::Tensor();
    const at::Tensor tweight = active(kWeight) ? each_contiguous(d.tangent(kWeight)) : at::Tensor();
    const at::Tensor tbias = active(kBias) ? each_contiguous(d.tangent(kBias)) : at::Tensor();
    FLATCORE_DISPATCH(ty, "batch_norm", [&] {
        FLATCORE_RUN(ty, channel_affine_tangent, kernel_of<scalar_t>(d.state(), op_, rows_, channels_, {}, x),
                     K, pointer_or_null<scalar_t>(tx), pointer_or_null<scalar_t>(tweight),
                     stride_or_zero(tweight), pointer_or_null<scalar_t>(tbias), stride_or_zero(tbias),
                     ty.mutable_data_ptr<scalar_t>());
    });
    return value_of(ty, K);
}

void BatchNormRule::adjoint(Directions& d) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const bool cross = d.second_order() && has_second_order();
    if (!d.cotangent().defined() && !cross) return;
    const at::Tensor tdy = d.cotangent().defined() ? rows_of(d.cotangent()) : at::Tensor();
    const at::Tensor dy = cross ? rows_of(state.adjoint(op_.output)) : at::Tensor();
    const at::Tensor x = active(kWeight) ? rows_of(state.value(op_.inputs[kX])) : at::Tensor();
    const at::Tensor tx = cross ? rows_of(d.tangent(kX)) : at::Tensor();
    const at::Tensor tweight = cross ? each_contiguous(d.tangent(kWeight)) : at::Tensor();
    const auto sums = [&](int i) {
        return d.wants(i) ? at::empty({K, kRowPieces, channels_}, state.options().dtype(at::kDouble))
                          : at::Tensor();
    };
    const at::Tensor weight_sums = sums(kWeight), bias_sums = sums(kBias);
    const at::Tensor tdx = d.wants(kX) ? at::empty({K * rows_, channels_}, state.options()) : at::Tensor();
    FLATCORE_DISPATCH(state.saved(op_)[kScale], "batch_norm", [&] {
        const auto kernel = kernel_of<scalar_t>(state, op_, rows_, channels_, {}, x);
        const scalar_t *tdy_data = pointer_or_null<scalar_t>(tdy), *dy_data = pointer_or_null<scalar_t>(dy);
        if (tdx.defined())
            FLATCORE_RUN(tdx, channel_affine_adjoint, kernel, K, tdy_data, dy_data,
                         pointer_or_null<scalar_t>(tweight), stride_or_zero(tweight),
                         tdx.mutable_data_ptr<scalar_t>());
        if (weight_sums.defined() || bias_sums.defined())
            FLATCORE_RUN(state.saved(op_)[kScale], channel_affine_sums, kernel, K, tdy_data, dy_data,
                         pointer_or_null<scalar_t>(tx), writable_or_null<double>(weight_sums),
                         writable_or_null<double>(bias_sums));
    });
    if (tdx.defined()) d.add(kX, value_of(tdx, K), true);
    add_row_sums(d, {kWeight, weight_sums}, {kBias, tdy.defined() ? bias_sums : at::Tensor()});
}

}  // namespace flatcore
