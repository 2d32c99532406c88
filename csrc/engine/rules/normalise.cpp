// Row normalisation over the last axes (layer norm; RMS norm where not centred). See kernels/normalise.h.
#include "kernels/normalise.h"

#include "row_sums.h"
#include "rules.h"

namespace flatcore {

namespace {

enum Input { kX, kWeight, kBias };
enum Saved { kNormalised, kInverse };

template <class T>
T* writable_or_null(const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

int64_t stride_or_zero(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

}  // namespace

NormaliseRule::NormaliseRule(const Program& program, const Op& op)
    : Rule(program, op), eps_(op.attributes.real("eps")), centred_(op.attributes.flag("centred")),
      columns_(1) {
    const int64_t axes = op.attributes.integer("axes");
    const Integers& shape = input(kX).shape;
    if (axes < 1 || axes > static_cast<int64_t>(shape.size()))
        throw std::invalid_argument("axes must count the normalised axes of x, at least one");
    for (auto size = shape.end() - axes; size != shape.end(); ++size) columns_ *= *size;
    rows_ = columns_ == 0 ? 0 : input(kX).numel / columns_;
    for (int i : {kWeight, kBias})
        if (has(i) && input(i).numel != columns_)
            throw std::invalid_argument("weight and bias must have the shape of the normalised axes");
}

at::Tensor NormaliseRule::forward(State& state) const {
    const at::Tensor x = state.value(op_.inputs[kX]).contiguous();
    const at::Tensor weight = has(kWeight) ? state.value(op_.inputs[kWeight]).contiguous() : at::Tensor();
    const at::Tensor bias = has(kBias) ? state.value(op_.inputs[kBias]).contiguous() : at::Tensor();
    at::Tensor y = at::empty(x.sizes(), x.options()), normalised = at::empty(x.sizes(), x.options());
    at::Tensor inverse = at::empty({rows_}, x.options());
    FLATCORE_DISPATCH(x, "normalise", [&] {
        FLATCORE_RUN(y, normalise_forward<scalar_t>, {rows_, columns_, centred_}, eps_,
                     x.const_data_ptr<scalar_t>(), pointer_or_null<scalar_t>(weight),
                     pointer_or_null<scalar_t>(bias), normalised.mutable_data_ptr<scalar_t>(),
                     inverse.mutable_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>());
    });
    state.saved(op_) = {normalised, inverse};
    return y;
}

at::Tensor NormaliseRule::tangent(const Directions& d) const {
    const auto& saved = d.state().saved(op_);
    const at::Tensor weight = has(kWeight) ? d.state().value(op_.inputs[kWeight]).contiguous() : at::Tensor();
    const at::Tensor tx = active(kX) ? d.tangent(kX).contiguous() : at::Tensor();
    const at::Tensor tweight = active(kWeight) ? each_contiguous(d.tangent(kWeight)) : at::Tensor();
    const at::Tensor tbias = active(kBias) ? each_contiguous(d.tangent(kBias)) : at::Tensor();
    at::Tensor ty = new_directions(d.K(), output(), d.state().options());
    FLATCORE_DISPATCH(ty, "normalise", [&] {
        FLATCORE_RUN(ty, normalise_tangent<scalar_t>, {rows_, columns_, centred_}, d.K(),
                     saved[kNormalised].const_data_ptr<scalar_t>(),
                     saved[kInverse].const_data_ptr<scalar_t>(), pointer_or_null<scalar_t>(weight),
                     pointer_or_null<scalar_t>(tx), pointer_or_null<scalar_t>(tweight),
                     stride_or_zero(tweight), pointer_or_null<scalar_t>(tbias), stride_or_zero(tbias),
                     ty.mutable_data_ptr<scalar_t>());
    });
    return ty;
}

void NormaliseRule::adjoint(Directions& d) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const auto& saved = state.saved(op_);
    const bool cross = d.second_order() && has_second_order();
    if (!d.cotangent().defined() && !cross) return;
    const at::Tensor weight = has(kWeight) ? state.value(op_.inputs[kWeight]).contiguous() : at::Tensor();
    const at::Tensor tdy = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor dy = cross ? state.adjoint(op_.output).contiguous() : at::Tensor();
    const at::Tensor tx = cross && active(kX) ? d.tangent(kX).contiguous() : at::Tensor();
    const at::Tensor tweight = cross && active(kWeight) ? each_contiguous(d.tangent(kWeight)) : at::Tensor();
    const auto sums = [&](int i) {
        return d.wants(i) ? at::empty({K, kRowPieces, columns_}, state.options().dtype(at::kDouble))
                          : at::Tensor();
    };
    const at::Tensor weight_sums = sums(kWeight), bias_sums = sums(kBias);
    // Contiguous, as the kernel writes, whatever layout x is kept in. What a residual connection brought is
    // added on the way.
    const at::Tensor tdx =
        d.wants(kX) ? at::empty(with_directions(K, input(kX).shape), state.options()) : at::Tensor();
    at::Tensor so_far = tdx.defined() ? d.so_far(kX) : at::Tensor();
    if (so_far.defined() && !so_far.is_contiguous()) so_far = at::Tensor();
    FLATCORE_DISPATCH(saved[kNormalised], "normalise", [&] {
        const NormaliseAdjoint<scalar_t> terms{saved[kNormalised].const_data_ptr<scalar_t>(),
                                               saved[kInverse].const_data_ptr<scalar_t>(),
                                               pointer_or_null<scalar_t>(weight),
                                               pointer_or_null<scalar_t>(tdy),
                                               pointer_or_null<scalar_t>(dy),
                                               pointer_or_null<scalar_t>(tx),
                                               pointer_or_null<scalar_t>(tweight),
                                               stride_or_zero(tweight),
                                               pointer_or_null<scalar_t>(so_far)};
        const NormShape shape{rows_, columns_, centred_};
        if (tdx.defined())
            FLATCORE_RUN(tdx, normalise_adjoint<scalar_t>, shape, K, terms, tdx.mutable_data_ptr<scalar_t>());
        if (weight_sums.defined() || bias_sums.defined())
            FLATCORE_RUN(saved[kNormalised], normalise_sums<scalar_t>, shape, K, terms,
                         writable_or_null<double>(weight_sums), writable_or_null<double>(bias_sums));
    });
    if (so_far.defined())
        d.replace(kX, tdx);
    else if (tdx.defined())
        d.add(kX, tdx, true);
    add_row_sums(d, {kWeight, weight_sums}, {kBias, tdy.defined() ? bias_sums : at::Tensor()});
}

}  // namespace flatcore
