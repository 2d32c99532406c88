// Attention on a GPU by one kernel for each sweep, whose tiles never leave the processors
// (kernels/fused_attention.h). By count of bytes and operations, not measured: the tiles of attention.cpp go
// through memory some ten times, which cuBLAS in full float32 hides and tensor cores do not. So products in
// TF32 and bfloat16 take these kernels, and so do small ones in full precision: tiles start some 20 kernels
// for each direction, which takes longer than the products that these kernels compute twice.
#include <ATen/ops/empty.h>

#include <atomic>

#include "attention_policy.h"
#include "rules.h"

namespace flatcore {

namespace {

enum Kept { kMean, kDoutTo };  // from tangent to adjoint

// Multiply-adds of one product of all heads. Ten more of them, in float32 at 50 Tflop/s, are the 20 launches
// of 2 microseconds each.
constexpr int64_t kSmall = int64_t{1} << 27;

std::atomic<AttentionPolicy> policy{AttentionPolicy::choose};

ProductPrecision operands(Precision precision) {
    if (precision == Precision::bf16) return ProductPrecision::bf16;
    return precision == Precision::tf32 ? ProductPrecision::tf32 : ProductPrecision::full;
}

// Directions (K, batch, heads, length, width) as the kernels read and write them.
template <class T>
HeadArray<const T> readable(const at::Tensor& t) {
    if (!t.defined()) return {};
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
template <class T>
HeadArray<T> writable(const at::Tensor& t) {
    if (!t.defined()) return {};
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
// Have they strides that the kernels read and write?
bool has_dense_rows(const at::Tensor& t) {
    return (t.stride(4) == 1 || t.size(4) == 1) && (t.stride(3) < kFarthestRow || t.size(3) == 1);
}
at::Tensor with_dense_rows(const at::Tensor& t) {
    return !t.defined() || has_dense_rows(t) ? t : t.contiguous();
}
// Heads side by side, as the linear layers that follow have them.
at::Tensor new_heads(int64_t K, const Integers& shape, const at::TensorOptions& options) {
    return at::empty({K, shape[0], shape[2], shape[1], shape[3]}, options).transpose(2, 3);
}
template <class T>
T* writable_or_null(const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

}  // namespace

void set_attention_policy(const std::string& named) {
    if (named == "choose")
        policy = AttentionPolicy::choose;
    else if (named == "tiles")
        policy = AttentionPolicy::tiles;
    else if (named == "fused")
        policy = AttentionPolicy::fused;
    else
        throw std::invalid_argument("policy: expected choose, tiles or fused, got '" + named + "'");
}

bool AttentionRule::fuses() const {
    return program_.gpu() && policy != AttentionPolicy::tiles && fused_attention_supported(fused_shape());
}

bool AttentionRule::fuses(const State& state, Precision precision) const {
    const bool prepared = state.saved(op_).size() > kNormaliser;
    const int64_t products = input(kQuery).numel * input(kKey).shape[2] / (causal_ ? 2 : 1);
    return prepared &&
           (policy == AttentionPolicy::fused || precision != Precision::full || products <= kSmall);
}

AttentionShape AttentionRule::fused_shape() const {
    const Integers &q = input(kQuery).shape, &k = input(kKey).shape, &v = input(kValue).shape;
    return {q[0], q[1], q[2], k[2], q[3], v[3], causal_, scale_};
}

template <class T>
AttentionInputs<T> AttentionRule::fused_inputs(const State& state) const {
    const auto& saved = state.saved(op_);
    AttentionInputs<T> inputs{.shape = fused_shape(),
                              .q = saved[kQuery].const_data_ptr<T>(),
                              .k = saved[kKey].const_data_ptr<T>(),
                              .v = saved[kValue].const_data_ptr<T>()};
    const at::Tensor& mask = saved[kMask];
    if (!mask.defined()) return inputs;
    if (mask.scalar_type() == at::kBool)
        inputs.mask.keep = mask.const_data_ptr<bool>();
    else
        inputs.mask.added = mask.const_data_ptr<T>();
    for (int axis = 0; axis < 4; ++axis)
        inputs.mask.strides[axis] = mask.size(axis) == 1 ? 0 : mask.stride(axis);
    return inputs;
}

void AttentionRule::fused_forward(State& state, const at::Tensor& o) const {
    auto& saved = state.saved(op_);
    const at::Tensor normaliser = at::empty({2, o.numel() / std::max<int64_t>(o.size(-1), 1)}, o.options());
    FLATCORE_DISPATCH(o, "attention", [&] {
        FLATCORE_RUN_ON_GPU(o, fused_attention_forward<scalar_t>, fused_inputs<scalar_t>(state),
                            ProductPrecision::full, o.mutable_data_ptr<scalar_t>(),
                            normaliser.mutable_data_ptr<scalar_t>());
    });
    saved.insert(saved.end(), {o, normaliser, at::Tensor(), at::Tensor()});
}

void AttentionRule::finish_backward(State& state) const {
    auto& saved = state.saved(op_);
    if (saved.size() <= kDoutO || !has_second_order() || !state.adjoint(op_.output).defined()) return;
    saved[kDout] = state.adjoint(op_.output).contiguous();
    saved[kDoutO] = at::empty({saved[kNormaliser].size(1)}, state.options());
    FLATCORE_DISPATCH(saved[kDout], "attention", [&] {
        FLATCORE_RUN_ON_GPU(saved[kDout], fused_attention_backward<scalar_t>, fused_shape(),
                            saved[kDout].const_data_ptr<scalar_t>(),
                            saved[kOutput].const_data_ptr<scalar_t>(),
                            saved[kDoutO].mutable_data_ptr<scalar_t>());
    });
}

int64_t AttentionRule::saved() const {
    const int64_t inputs = input(kQuery).numel + input(kKey).numel + input(kValue).numel;
    const int64_t rows = input(kQuery).numel / std::max<int64_t>(input(kQuery).shape[3], 1);
    return inputs + (fuses() ? 2 * output().numel + 3 * rows : 0);
}

at::Tensor AttentionRule::fused_tangent(const Directions& d) const {
    const int64_t K = d.K();
    const auto& saved = d.state().saved(op_);
    const auto directions = [&](Input i) { return active(i) ? with_dense_rows(d.tangent(i)) : at::Tensor(); };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    const bool cross = d.second_order() && has_second_order();
    const at::TensorOptions options = d.state().options();
    const at::Tensor to = new_heads(K, output().shape, options);
    const int64_t rows = saved[kNormaliser].size(1);
    const bool p_moves = tq.defined() || tk.defined();
    const at::Tensor mean = p_moves ? at::empty({K, rows}, options) : at::Tensor();
    const at::Tensor dout_to = cross ? at::empty({K, rows}, options) : at::Tensor();
    FLATCORE_DISPATCH(to, "attention", [&] {
        const AttentionTangents<scalar_t> tangents{readable<scalar_t>(tq), readable<scalar_t>(tk),
                                                   readable<scalar_t>(tv)};
        FLATCORE_RUN_ON_GPU(to, fused_attention_tangent<scalar_t>, K, fused_inputs<scalar_t>(d.state()),
                            operands(d.precision()), saved[kOutput].const_data_ptr<scalar_t>(),
                            saved[kNormaliser].const_data_ptr<scalar_t>(), tangents, writable<scalar_t>(to),
                            writable_or_null<scalar_t>(mean),
                            cross ? saved[kDout].const_data_ptr<scalar_t>() : nullptr,
                            writable_or_null<scalar_t>(dout_to));
    });
    if (cross) d.kept() = {mean, dout_to};
    return to;
}

void AttentionRule::fused_adjoint(Directions& d, bool cross) const {
    const int64_t K = d.K();
    const State& state = d.state();
    const auto& saved = state.saved(op_);
    if (cross && d.kept().empty()) fused_tangent(d);  // where no one asked for this op's tangent
    const auto directions = [&](Input i) {
        return cross && active(i) ? with_dense_rows(d.tangent(i)) : at::Tensor();
    };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    const at::Tensor tdo = with_dense_rows(d.cotangent());
    const auto result = [&](Input i) {
        if (!d.wants(i)) return at::Tensor();
        const at::Tensor place = d.place(i);
        return place.defined() && has_dense_rows(place) ? place
                                                        : new_heads(K, input(i).shape, state.options());
    };
    const at::Tensor tdq = result(kQuery), tdk = result(kKey), tdv = result(kValue);
    const at::Tensor workspace = at::empty({K, saved[kNormaliser].size(1)}, state.options());
    FLATCORE_DISPATCH(workspace, "attention", [&] {
        AttentionAdjoint<scalar_t> a;
        a.tangents = {readable<scalar_t>(tq), readable<scalar_t>(tk), readable<scalar_t>(tv)};
        a.tdo = readable<scalar_t>(tdo);
        a.o = saved[kOutput].const_data_ptr<scalar_t>();
        a.normaliser = saved[kNormaliser].const_data_ptr<scalar_t>();
        if (cross) {
            a.dout = saved[kDout].const_data_ptr<scalar_t>();
            a.dout_o = saved[kDoutO].const_data_ptr<scalar_t>();
            a.mean = pointer_or_null<scalar_t>(d.kept()[kMean]);
            a.dout_to = pointer_or_null<scalar_t>(d.kept()[kDoutTo]);
        }
        a.workspace = workspace.mutable_data_ptr<scalar_t>();
        a.tdq = writable<scalar_t>(tdq);
        a.tdk = writable<scalar_t>(tdk);
        a.tdv = writable<scalar_t>(tdv);
        FLATCORE_RUN_ON_GPU(workspace, fused_attention_adjoint<scalar_t>, K, fused_inputs<scalar_t>(state),
                            operands(d.precision()), a);
    });
    if (tdq.defined()) d.add(kQuery, tdq, true);
    if (tdk.defined()) d.add(kKey, tdk, true);
    if (tdv.defined()) d.add(kValue, tdv, true);
}

}  // namespace flatcore
