// o = softmax(scale q k^T + mask) v per head, without a T x T tensor that outlives a tile and with none that
// carries K.
//   z = scale q k^T + mask,  p = softmax(z),  o = p v
//   tz = scale (tq k^T + q tk^T),  tp = p (tz - <p, tz>),  to = tp v + p tv
//   dp = do v^T,  dz = p (dp - <p, dp>),  dq = scale dz k,  dk = scale dz^T q,  dv = p^T do
//   tdp = tdo v^T + do tv^T,  tdz as in kernels/softmax.h
//   tdq = scale (tdz k + dz tk),  tdk = scale (tdz^T q + dz^T tq),  tdv = p^T tdo + tp^T do
// A tile is a group of heads times a range of query rows times the keys those rows may see. Every sweep
// recomputes p for its tile, so the memory is linear in the sequence: Rabe and Staats, "Self-attention does
// not need O(n^2) memory" (2021), and Dao et al., "FlashAttention" (2022), for the first two sweeps.
#include <ATen/ops/arange.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "kernels/softmax.h"
#include "rules.h"

namespace flatcore {

namespace {

enum Input { kQuery, kKey, kValue, kMask };  // and, heads flattened, what forward saves

constexpr int64_t kTileRows = 128;          // query rows of a tile
constexpr int64_t kTileElements = 1 << 20;  // of one tile of z, over its group of heads

using Tile = AttentionTile;

// c (+)= scale a b, batched over heads.
void batched_gemm(at::Tensor c, const at::Tensor& a, const at::Tensor& b, double scale, bool accumulate) {
    at::baddbmm_out(c, c, a, b, accumulate ? 1 : 0, scale);
}

at::Tensor transposed(const at::Tensor& t) { return t.transpose(-2, -1); }

at::Tensor empty_tile(const Tile& tile, const at::TensorOptions& options) {
    return at::empty({tile.heads, tile.rows, tile.keys}, options);
}

}  // namespace

AttentionRule::AttentionRule(const Program& program, const Op& op)
    : Rule(program, op), causal_(op.attributes.flag("causal")), scale_(op.attributes.real("scale")) {
    for (int i : {kQuery, kKey, kValue})
        if (input(i).shape.size() != 4 || input(i).shape[0] != input(0).shape[0] ||
            input(i).shape[1] != input(0).shape[1])
            throw std::invalid_argument(
                "query, key and value must be (batch, heads, length, width) with equal batch and heads");
    if (active(kMask)) throw std::invalid_argument("the mask must be a constant");
    heads_ = input(0).shape[0] * input(0).shape[1];
    queries_ = input(kQuery).shape[2];
    keys_ = input(kKey).shape[2];
    if (input(kValue).shape[2] != keys_ || input(kKey).shape[3] != input(kQuery).shape[3])
        throw std::invalid_argument("key must have the width of query and the length of value");
}

// Calls body(tile) for each tile, in order.
template <class Body>
void AttentionRule::for_each_tile(const Body& body) const {
    const int64_t rows = std::min(queries_, kTileRows);
    const int64_t group = std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, rows * keys_), 1,
                                              std::max<int64_t>(heads_, 1));
    for (int64_t head = 0; head < heads_; head += group)
        for (int64_t row = 0; row < queries_; row += rows) {
            const int64_t end = std::min(queries_, row + rows);
            // A causal row i sees the keys up to i.
            const int64_t keys = causal_ ? std::min(keys_, end) : keys_;
            body(Tile{head, std::min(group, heads_ - head), row, end - row, keys});
        }
}

namespace {

// (B, H, L, w) or (K, B, H, L, w) as (heads, L, w) or (K, heads, L, w).
at::Tensor by_head(const at::Tensor& t) {
    return t.dim() == 5 ? t.contiguous().flatten(1, 2) : t.contiguous().flatten(0, 1);
}

at::Tensor query_part(const at::Tensor& t, const Tile& tile) {
    return t.narrow(0, tile.head, tile.heads).narrow(1, tile.row, tile.rows);
}

at::Tensor key_part(const at::Tensor& t, const Tile& tile) {
    return t.narrow(0, tile.head, tile.heads).narrow(1, 0, tile.keys);
}

template <class T>
const T* data_or_null(const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

at::Tensor softmax_tile_tangent(const Tile& tile, const at::Tensor& p, const at::Tensor& tz) {
    at::Tensor tp = at::empty(p.sizes(), p.options());
    FLATCORE_DISPATCH(p, "attention", [&] {
        softmax_tangent<scalar_t>(1, tile.heads * tile.rows, tile.keys, p.const_data_ptr<scalar_t>(),
                                  tz.const_data_ptr<scalar_t>(), tp.mutable_data_ptr<scalar_t>());
    });
    return tp;
}

// In place of tdp where that is defined.
at::Tensor softmax_tile_adjoint(const Tile& tile, const at::Tensor& p, const at::Tensor& tdp,
                                const at::Tensor& dp, const at::Tensor& tz) {
    at::Tensor out = tdp.defined() ? tdp : at::empty(p.sizes(), p.options());
    FLATCORE_DISPATCH(p, "attention", [&] {
        softmax_adjoint<scalar_t>(1, tile.heads * tile.rows, tile.keys, p.const_data_ptr<scalar_t>(),
                                  data_or_null<scalar_t>(tdp), data_or_null<scalar_t>(dp),
                                  data_or_null<scalar_t>(tz), out.mutable_data_ptr<scalar_t>());
    });
    return out;
}

}  // namespace

// The mask's rows and keys of the tile, (heads or 1, rows or 1, keys or 1).
at::Tensor AttentionRule::mask_part(const at::Tensor& mask, const Tile& tile) const {
    const int64_t H = input(0).shape[1];
    const auto clip = [](const at::Tensor& t, int64_t axis, int64_t start, int64_t length) {
        return t.size(axis) == 1 ? t : t.narrow(axis, start, length);
    };
    const at::Tensor part = clip(clip(mask, 2, tile.row, tile.rows), 3, 0, tile.keys);
    if (mask.size(0) == 1 && mask.size(1) == 1) return part.select(0, 0);
    // Rows of the flattened (batch, heads) axes, where either may be broadcast.
    const at::Tensor head =
        at::arange(tile.head, tile.head + tile.heads, at::TensorOptions(mask.device()).dtype(at::kLong));
    const at::Tensor batch = mask.size(0) == 1 ? at::zeros_like(head) : head.div(H, "floor");
    const at::Tensor place = mask.size(1) == 1 ? batch : batch * H + head.remainder(H);
    return part.flatten(0, 1).index_select(0, place);
}

at::Tensor AttentionRule::probabilities(const State& state, const Tile& tile) const {
    const at::Tensor q = query_part(state.saved(op_)[kQuery], tile);
    const at::Tensor k = key_part(state.saved(op_)[kKey], tile);
    at::Tensor z = empty_tile(tile, q.options());
    batched_gemm(z, q, transposed(k), scale_, false);
    const double masked = -std::numeric_limits<double>::infinity();
    if (causal_) {
        const auto index = at::TensorOptions(z.device()).dtype(at::kLong);
        const at::Tensor rows = at::arange(tile.row, tile.row + tile.rows, index).unsqueeze(1);
        z.masked_fill_(at::arange(tile.keys, index) > rows, masked);
    }
    if (has(kMask)) {
        const at::Tensor part = mask_part(state.saved(op_)[kMask], tile);
        if (part.scalar_type() == at::kBool)
            z.masked_fill_(part.logical_not(), masked);
        else
            z.add_(part);
    }
    FLATCORE_DISPATCH(z, "attention", [&] {
        softmax_forward<scalar_t>(tile.heads * tile.rows, tile.keys, z.const_data_ptr<scalar_t>(),
                                  z.mutable_data_ptr<scalar_t>(), nullptr);
    });
    return z;
}

// tz for one direction; undefined where neither query nor key is active.
at::Tensor AttentionRule::logit_tangent(const State& state, const Tile& tile, const at::Tensor& tq,
                                        const at::Tensor& tk) const {
    if (!tq.defined() && !tk.defined()) return {};
    const at::Tensor q = query_part(state.saved(op_)[kQuery], tile);
    const at::Tensor k = key_part(state.saved(op_)[kKey], tile);
    at::Tensor tz = empty_tile(tile, q.options());
    if (tq.defined()) batched_gemm(tz, query_part(tq, tile), transposed(k), scale_, false);
    if (tk.defined()) batched_gemm(tz, q, transposed(key_part(tk, tile)), scale_, tq.defined());
    return tz;
}

at::Tensor AttentionRule::forward(State& state) const {
    at::Tensor mask = has(kMask) ? state.value(op_.inputs[kMask]) : at::Tensor();
    while (mask.defined() && mask.dim() < 4) mask = mask.unsqueeze(0);
    const at::Tensor v = by_head(state.value(op_.inputs[kValue]));
    state.saved(op_) = {by_head(state.value(op_.inputs[kQuery])), by_head(state.value(op_.inputs[kKey])), v,
                        mask};
    at::Tensor o = at::empty({heads_, queries_, v.size(2)}, v.options());
    for_each_tile([&](const Tile& tile) {
        batched_gemm(query_part(o, tile), probabilities(state, tile), key_part(v, tile), 1, false);
    });
    return o.view(output().shape);
}

at::Tensor AttentionRule::tangent(const Directions& d) const {
    const State& state = d.state();
    const auto directions = [&](int i) { return active(i) ? by_head(d.tangent(i)) : at::Tensor(); };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    const at::Tensor& v = state.saved(op_)[kValue];
    at::Tensor to = at::empty({d.K(), heads_, queries_, v.size(2)}, v.options());
    const auto of = [](const at::Tensor& t, int64_t k) {
        return t.defined() ? t.select(0, k) : at::Tensor();
    };
    for_each_tile([&](const Tile& tile) {
        const at::Tensor p = probabilities(state, tile);
        for (int64_t k = 0; k < d.K(); ++k) {
            const at::Tensor out = query_part(to.select(0, k), tile);
            const at::Tensor tz = logit_tangent(state, tile, of(tq, k), of(tk, k));
            if (tz.defined())
                batched_gemm(out, softmax_tile_tangent(tile, p, tz), key_part(v, tile), 1, false);
            if (tv.defined()) batched_gemm(out, p, key_part(tv.select(0, k), tile), 1, tz.defined());
        }
    });
    return to.view(with_directions(d.K(), output().shape));
}

void AttentionRule::adjoint(Directions& d) const {
    const State& state = d.state();
    const bool cross = d.second_order() && has_second_order();
    if (!d.cotangent().defined() && !cross) return;
    const at::Tensor &q = state.saved(op_)[kQuery], &k = state.saved(op_)[kKey],
                     &v = state.saved(op_)[kValue];
    const at::Tensor tdo = d.cotangent().defined() ? by_head(d.cotangent()) : at::Tensor();
    const at::Tensor dout = cross ? by_head(state.adjoint(op_.output)) : at::Tensor();
    const auto directions = [&](int i) { return cross && active(i) ? by_head(d.tangent(i)) : at::Tensor(); };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    const auto result = [&](int i) {
        if (!d.wants(i)) return at::Tensor();
        const Integers& s = input(i).shape;
        return at::zeros({d.K(), heads_, s[2], s[3]}, state.options());
    };
    const at::Tensor tdq = result(kQuery), tdk = result(kKey), tdv = result(kValue);
    const auto of = [](const at::Tensor& t, int64_t n) {
        return t.defined() ? t.select(0, n) : at::Tensor();
    };
    for_each_tile([&](const Tile& tile) {
        const at::Tensor p = probabilities(state, tile);
        const at::Tensor q_part = query_part(q, tile), k_part = key_part(k, tile), v_part = key_part(v, tile);
        at::Tensor dp, dz, do_part;
        if (cross) {
            do_part = query_part(dout, tile);
            dp = empty_tile(tile, p.options());
            batched_gemm(dp, do_part, transposed(v_part), 1, false);
            dz = softmax_tile_tangent(tile, p, dp);  // p (dp - <p, dp>)
        }
        for (int64_t n = 0; n < d.K(); ++n) {
            const at::Tensor tz = logit_tangent(state, tile, of(tq, n), of(tk, n));
            const at::Tensor tdo_part = tdo.defined() ? query_part(tdo.select(0, n), tile) : at::Tensor();
            if (tdv.defined()) {
                const at::Tensor out = key_part(tdv.select(0, n), tile);
                if (tdo.defined()) batched_gemm(out, transposed(p), tdo_part, 1, true);
                if (tz.defined())
                    batched_gemm(out, transposed(softmax_tile_tangent(tile, p, tz)), do_part, 1, true);
            }
            if (!tdq.defined() && !tdk.defined()) continue;
            at::Tensor tdp;
            if (tdo.defined() || tv.defined()) {
                tdp = empty_tile(tile, p.options());
                if (tdo.defined()) batched_gemm(tdp, tdo_part, transposed(v_part), 1, false);
                if (tv.defined())
                    batched_gemm(tdp, do_part, transposed(key_part(tv.select(0, n), tile)), 1, tdo.defined());
            }
            const at::Tensor tdz = softmax_tile_adjoint(tile, p, tdp, tz.defined() ? dp : at::Tensor(), tz);
            if (tdq.defined()) {
                const at::Tensor out = query_part(tdq.select(0, n), tile);
                batched_gemm(out, tdz, k_part, scale_, true);
                if (tk.defined()) batched_gemm(out, dz, key_part(tk.select(0, n), tile), scale_, true);
            }
            if (tdk.defined()) {
                const at::Tensor out = key_part(tdk.select(0, n), tile);
                batched_gemm(out, transposed(tdz), q_part, scale_, true);
                if (tq.defined())
                    batched_gemm(out, transposed(dz), query_part(tq.select(0, n), tile), scale_, true);
            }
        }
    });
    for (const auto& [i, t] : {std::pair{kQuery, tdq}, std::pair{kKey, tdk}, std::pair{kValue, tdv}})
        if (t.defined()) d.add(i, t.view(with_directions(d.K(), input(i).shape)), true);
}

double AttentionRule::flops(int64_t K, bool second_order) const {
    // Products of (queries, width) by (width, keys), per head: half of them under a causal mask.
    const int tangent = 1 + active(kQuery) + active(kKey) + active(kQuery) + active(kValue);
    const int adjoint =
        second_order ? 1 + tangent + 2 * (active(kQuery) + active(kKey)) + 2 + active(kValue) : 5;
    const double one =
        2.0 * static_cast<double>(heads_ * queries_ * keys_ * input(kQuery).shape[3]) * (causal_ ? 0.5 : 1.0);
    return one * static_cast<double>(K) * (tangent + adjoint);
}

int64_t AttentionRule::workspace(int64_t) const {
    const int64_t rows = std::min(queries_, kTileRows);
    return 6 * std::min(heads_ * rows * keys_, std::max(kTileElements, rows * keys_));
}

}  // namespace flatcore
