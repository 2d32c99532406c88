// o = softmax(scale q k^T + mask) v per head, without a T x T tensor that outlives a tile and with none that
// carries K.
//   z = scale q k^T + mask,  p = softmax(z),  o = p v
//   tz = scale (tq k^T + q tk^T),  tp = p (tz - <p, tz>),  to = tp v + p tv
//   dp = do v^T,  dz = p (dp - <p, dp>),  dq = scale dz k,  dk = scale dz^T q,  dv = p^T do
//   tdp = tdo v^T + do tv^T,  tdz as in kernels/attention.h
//   tdq = scale (tdz k + dz tk),  tdk = scale (tdz^T q + dz^T tq),  tdv = p^T tdo + tp^T do
// Every sweep recomputes p tile by tile, so the memory is linear in the sequence: Rabe and Staats,
// "Self-attention does not need O(n^2) memory" (2021), and Dao et al., "FlashAttention" (2022), for the first
// two sweeps. A tile's buffers stay in the cache between its matrix products and row passes, and the threads
// share units of work, not the small products.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/attention.h"
#include "kernels/softmax.h"
#include "rules.h"

namespace flatcore {

namespace {

// The tiles that a unit of work holds: p alone forward, then as many as the sweep reaches down the list.
enum Buffer { kP, kTz, kTdz, kDp, kDz };
constexpr int64_t kForward = 1, kTangent = 2, kFirstOrder = 3, kSecondOrder = 5;

// c (+)= scale a b, batched over heads.
void batched_gemm(at::Tensor c, const at::Tensor& a, const at::Tensor& b, double scale, bool accumulate) {
    at::baddbmm_out(c, c, a, b, accumulate ? 1 : 0, scale);
}

at::Tensor transposed(const at::Tensor& t) { return t.transpose(-2, -1); }

// Of (..., length, width), the tile's rows and keys.
at::Tensor rows_of(const at::Tensor& t, const AttentionTile& tile) {
    return t.narrow(-2, tile.row, tile.rows);
}
at::Tensor keys_of(const at::Tensor& t, const AttentionTile& tile) { return t.narrow(-2, 0, tile.keys); }

at::Tensor direction_of(const at::Tensor& t, int64_t n) { return t.defined() ? t.select(0, n) : t; }

// The tile's part of the mask, (batch or 1, heads or 1, rows or 1, keys or 1).
at::Tensor mask_part(const at::Tensor& mask, const HeadGroup& group, const AttentionTile& tile) {
    const auto clip = [](const at::Tensor& t, int64_t axis, int64_t start, int64_t length) {
        return t.size(axis) == 1 ? t : t.narrow(axis, start, length);
    };
    const at::Tensor of_group = clip(clip(mask, 0, group.batch, group.batches), 1, group.head, group.heads);
    return clip(clip(of_group, 2, tile.row, tile.rows), 3, 0, tile.keys);
}

void softmax_tangent_in_place(const at::Tensor& p, const at::Tensor& tz) {
    FLATCORE_DISPATCH(p, "attention", [&] {
        scalar_t* data = tz.mutable_data_ptr<scalar_t>();
        FLATCORE_RUN(p, softmax_tangent<scalar_t>, 1, p.size(0) * p.size(1), p.size(2),
                     p.const_data_ptr<scalar_t>(), data, data);
    });
}

void backward_in_place(const at::Tensor& p, const at::Tensor& dp, const at::Tensor& dz) {
    FLATCORE_DISPATCH(p, "attention", [&] {
        FLATCORE_RUN(p, attention_backward<scalar_t>, p.size(0) * p.size(1), p.size(2),
                     p.const_data_ptr<scalar_t>(), dp.mutable_data_ptr<scalar_t>(),
                     dz.mutable_data_ptr<scalar_t>());
    });
}

void second_order_in_place(const at::Tensor& p, const at::Tensor& u, bool tdp_is_zero, const at::Tensor& tz,
                           const at::Tensor& tdp) {
    FLATCORE_DISPATCH(p, "attention", [&] {
        FLATCORE_RUN(p, attention_second_order<scalar_t>, p.size(0) * p.size(1), p.size(2),
                     p.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(), tdp_is_zero,
                     tz.mutable_data_ptr<scalar_t>(), tdp.mutable_data_ptr<scalar_t>());
    });
}

}  // namespace

// What a unit reads in every sweep, and its memory for tiles. Its heads are one axis, in front of (length,
// width).
struct AttentionWork {
    AttentionUnit unit;
    at::Tensor q, k, v, mask;  // the mask whole
    at::Tensor memory;         // (buffers, elements)

    // (heads, rows, keys)
    at::Tensor buffer(Buffer i, const AttentionTile& tile) const {
        const int64_t heads = unit.group.size();
        return memory.select(0, i)
            .narrow(0, 0, heads * tile.rows * tile.keys)
            .view({heads, tile.rows, tile.keys});
    }
    // Of directions (K, batch, heads, length, width); undefined for undefined.
    at::Tensor part(const at::Tensor& t) const {
        return t.defined() ? group_part(t.narrow(0, unit.direction, unit.directions), unit.group) : t;
    }
    // The same with dense matrices, which the products read 2 to 5 % faster.
    at::Tensor dense_part(const at::Tensor& t) const {
        const at::Tensor own = part(t);
        const bool dense = !own.defined() || (own.stride(-1) == 1 && own.stride(-2) == own.size(-1));
        return dense ? own : own.contiguous();
    }
};

// What a unit reads and writes in the adjoint sweep. Undefined: zero, or not asked for.
struct AttentionTileAdjoint {
    at::Tensor tq, tk, tv, tdo;  // (directions, heads, length, width)
    at::Tensor dout;             // defined where there are second-derivative terms
    at::Tensor tdq;              // like tq, a view of the result
    // (directions, heads, width, keys): with the tile on the left, transposed, the same products run at two
    // thirds of the rate.
    at::Tensor tdk, tdv;
};

AttentionRule::AttentionRule(const Program& program, const Op& op)
    : Rule(program, op), causal_(op.attributes.flag("causal")), scale_(op.attributes.real("scale")) {
    for (int i : {kQuery, kKey, kValue})
        if (input(i).shape.size() != 4 || input(i).shape[0] != input(0).shape[0] ||
            input(i).shape[1] != input(0).shape[1])
            throw std::invalid_argument(
                "query, key and value must be (batch, heads, length, width) with equal batch and heads");
    if (active(kMask)) throw std::invalid_argument("the mask must be a constant");
    const Integers &q = input(kQuery).shape, &k = input(kKey).shape, &v = input(kValue).shape;
    if (v[2] != k[2] || k[3] != q[3])
        throw std::invalid_argument("key must have the width of query and the length of value");
    tiling_ = AttentionTiling(q[0], q[1], q[2], k[2], causal_, program.gpu());
}

// Calls body(work) for each unit, over the threads.
template <class Body>
void AttentionRule::for_each_unit(const State& state, int64_t K, int64_t buffers, const Body& body) const {
    const std::vector<AttentionUnit> units = tiling_.units(K);
    const std::vector<at::Tensor>& saved = state.saved(op_);
    const auto some = [&](int64_t first, int64_t last) {
        at::AutoDispatchBelowADInplaceOrView guard;  // as in the calling thread
        for (int64_t i = first; i < last; ++i) {
            const AttentionUnit& unit = units[static_cast<size_t>(i)];
            const auto part = [&](Input input) { return group_part(saved[input], unit.group); };
            body(AttentionWork{
                unit, part(kQuery), part(kKey), part(kValue), saved[kMask],
                at::empty({buffers, unit.group.size() * tiling_.tile_elements()}, state.options())});
        }
    };
    const auto count = static_cast<int64_t>(units.size());
    if (program_.gpu())
        some(0, count);
    else
        at::parallel_for(0, count, 1, some);
}

at::Tensor AttentionRule::probabilities(const AttentionWork& work, const AttentionTile& tile) const {
    const HeadGroup& group = work.unit.group;
    const at::Tensor z = work.buffer(kP, tile);
    batched_gemm(z, rows_of(work.q, tile), transposed(keys_of(work.k, tile)), scale_, false);
    if (work.mask.defined()) {
        const at::Tensor mask = mask_part(work.mask, group, tile);
        const at::Tensor logits = z.view({group.batches, group.heads, tile.rows, tile.keys});
        if (mask.scalar_type() == at::kBool)
            logits.masked_fill_(mask.logical_not(), -std::numeric_limits<double>::infinity());
        else
            logits.add_(mask);
    }
    FLATCORE_DISPATCH(z, "attention", [&] {
        scalar_t* data = z.mutable_data_ptr<scalar_t>();
        if (causal_) FLATCORE_RUN(z, causal_mask, group.size(), tile.rows, tile.keys, tile.row, data);
        FLATCORE_RUN(z, softmax_forward<scalar_t>, group.size() * tile.rows, tile.keys, data, data, nullptr);
    });
    return z;
}

// tz for one direction, of which tq or tk may be undefined.
at::Tensor AttentionRule::logit_tangent(const AttentionWork& work, const AttentionTile& tile,
                                        const at::Tensor& tq, const at::Tensor& tk) const {
    const at::Tensor tz = work.buffer(kTz, tile);
    if (tq.defined()) batched_gemm(tz, rows_of(tq, tile), transposed(keys_of(work.k, tile)), scale_, false);
    if (tk.defined())
        batched_gemm(tz, rows_of(work.q, tile), transposed(keys_of(tk, tile)), scale_, tq.defined());
    return tz;
}

at::Tensor AttentionRule::forward(State& state) const {
    at::Tensor mask = has(kMask) ? state.value(op_.inputs[kMask]) : at::Tensor();
    while (mask.defined() && mask.dim() < 4) mask = mask.unsqueeze(0);
    if (mask.defined() && mask.scalar_type() != at::kBool) mask = mask.to(state.options().dtype());
    const auto dense = [&](Input i) { return state.value(op_.inputs[i]).contiguous(); };
    state.saved(op_) = {dense(kQuery), dense(kKey), dense(kValue), mask};
    at::Tensor o = at::empty(output().shape, state.options());
    if (fuses()) {
        fused_forward(state, o);
        return o;
    }
    for_each_unit(state, 1, kForward, [&](const AttentionWork& work) {
        const at::Tensor out = group_part(o, work.unit.group);
        for (const AttentionTile& tile : tiling_.tiles())
            batched_gemm(rows_of(out, tile), probabilities(work, tile), keys_of(work.v, tile), 1, false);
    });
    return o;
}

at::Tensor AttentionRule::tangent(const Directions& d) const {
    if (fuses(d.state(), d.precision())) return fused_tangent(d);
    const auto directions = [&](Input i) { return active(i) ? d.tangent(i) : at::Tensor(); };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    const bool p_moves = tq.defined() || tk.defined();
    at::Tensor to = at::empty(with_directions(d.K(), output().shape), d.state().options());
    for_each_unit(d.state(), d.K(), kTangent, [&](const AttentionWork& work) {
        const at::Tensor tq_part = work.dense_part(tq), tk_part = work.dense_part(tk),
                         tv_part = work.dense_part(tv), to_part = work.part(to);
        for (const AttentionTile& tile : tiling_.tiles()) {
            const at::Tensor p = probabilities(work, tile);
            for (int64_t n = 0; n < work.unit.directions; ++n) {
                const at::Tensor out = rows_of(direction_of(to_part, n), tile);
                if (p_moves) {
                    const at::Tensor tz =
                        logit_tangent(work, tile, direction_of(tq_part, n), direction_of(tk_part, n));
                    softmax_tangent_in_place(p, tz);
                    batched_gemm(out, tz, keys_of(work.v, tile), 1, false);
                }
                if (tv.defined()) batched_gemm(out, p, keys_of(direction_of(tv_part, n), tile), 1, p_moves);
            }
        }
    });
    return to;
}

void AttentionRule::adjoint_of_tile(const AttentionWork& work, const AttentionTile& tile,
                                    const AttentionTileAdjoint& a) const {
    const at::Tensor q = rows_of(work.q, tile), k = keys_of(work.k, tile), v = keys_of(work.v, tile);
    const bool cross = a.dout.defined(), wants_tdz = a.tdq.defined() || a.tdk.defined();
    const at::Tensor p = probabilities(work, tile);
    at::Tensor dout, u, dz;
    if (cross) {
        dout = rows_of(a.dout, tile);
        u = work.buffer(kDp, tile);
        dz = work.buffer(kDz, tile);
        batched_gemm(u, dout, transposed(v), 1, false);
        backward_in_place(p, u, dz);
    }
    for (int64_t n = 0; n < work.unit.directions; ++n) {
        const at::Tensor tq = direction_of(a.tq, n), tk = direction_of(a.tk, n), tv = direction_of(a.tv, n);
        const at::Tensor tdo = a.tdo.defined() ? rows_of(a.tdo.select(0, n), tile) : at::Tensor();
        const auto add_to_keys = [&](const at::Tensor& all, const at::Tensor& rows, const at::Tensor& factor,
                                     double scale) {
            batched_gemm(all.select(0, n).narrow(-1, 0, tile.keys), transposed(rows), factor, scale, true);
        };
        if (a.tdv.defined() && tdo.defined()) add_to_keys(a.tdv, tdo, p, 1);
        if (!cross && !wants_tdz) continue;
        const at::Tensor tdz = work.buffer(kTdz, tile);
        if (tdo.defined()) batched_gemm(tdz, tdo, transposed(v), 1, false);
        if (tv.defined()) batched_gemm(tdz, dout, transposed(keys_of(tv, tile)), 1, tdo.defined());
        if (cross) {
            const at::Tensor tz = logit_tangent(work, tile, tq, tk);
            second_order_in_place(p, u, !tdo.defined() && !tv.defined(), tz, tdz);
            if (a.tdv.defined()) add_to_keys(a.tdv, dout, tz, 1);
        } else {
            softmax_tangent_in_place(p, tdz);
        }
        if (a.tdq.defined()) {
            const at::Tensor out = rows_of(a.tdq.select(0, n), tile);
            batched_gemm(out, tdz, k, scale_, false);
            if (tk.defined()) batched_gemm(out, dz, keys_of(tk, tile), scale_, true);
        }
        if (a.tdk.defined()) {
            add_to_keys(a.tdk, q, tdz, scale_);
            if (tq.defined()) add_to_keys(a.tdk, rows_of(tq, tile), dz, scale_);
        }
    }
}

void AttentionRule::adjoint(Directions& d) const {
    const bool cross = d.second_order() && has_second_order();
    const at::Tensor tdo = d.cotangent(), dout = cross ? d.state().adjoint(op_.output) : at::Tensor();
    if (!tdo.defined() && !cross) return;
    if (fuses(d.state(), d.precision())) return fused_adjoint(d, cross);
    const auto directions = [&](Input i) { return cross && active(i) ? d.tangent(i) : at::Tensor(); };
    const at::Tensor tq = directions(kQuery), tk = directions(kKey), tv = directions(kValue);
    std::array<at::Tensor, 3> results;
    for (int i : {kQuery, kKey, kValue})
        if (d.wants(i))
            results[static_cast<size_t>(i)] =
                at::empty(with_directions(d.K(), input(i).shape), d.state().options());
    const auto& [tdq, tdk, tdv] = results;
    const int64_t seen = tiling_.seen_keys();
    for_each_unit(d.state(), d.K(), cross ? kSecondOrder : kFirstOrder, [&](const AttentionWork& work) {
        const AttentionUnit& unit = work.unit;
        const auto sum = [&](const at::Tensor& result) {
            if (!result.defined()) return result;
            return at::zeros({unit.directions, unit.group.size(), result.size(-1), seen}, result.options());
        };
        const AttentionTileAdjoint a{.tq = work.dense_part(tq),
                                     .tk = work.dense_part(tk),
                                     .tv = work.dense_part(tv),
                                     .tdo = work.dense_part(tdo),
                                     .dout = cross ? group_part(dout, unit.group).contiguous() : dout,
                                     .tdq = work.part(tdq),
                                     .tdk = sum(tdk),
                                     .tdv = sum(tdv)};
        for (const AttentionTile& tile : tiling_.tiles()) adjoint_of_tile(work, tile, a);
        const auto write = [&](const at::Tensor& result, const at::Tensor& sums) {
            if (!result.defined()) return;
            const at::Tensor out = work.part(result);
            out.narrow(-2, 0, seen).copy_(transposed(sums));
            out.narrow(-2, seen, out.size(-2) - seen).zero_();
        };
        write(tdk, a.tdk);
        write(tdv, a.tdv);
    });
    for (int i : {kQuery, kKey, kValue})
        if (results[static_cast<size_t>(i)].defined()) d.add(i, results[static_cast<size_t>(i)], true);
}

double AttentionRule::flops(int64_t K, bool second_order) const {
    // Products of (queries, width) by (width, keys): per direction, and once for all. Half under a causal
    // mask.
    const bool cross = second_order && has_second_order();
    const int q = active(kQuery), k = active(kKey), v = active(kValue);
    const int tz = q + k, tangent = tz + (q || k) + v;
    const int first_order = v + (q || k) + q + k, adjoint = first_order + (cross ? tz + v + v + k + q : 0);
    const int once = 1 + 1 + cross;
    const double one =
        2.0 * static_cast<double>(input(kQuery).numel * input(kKey).shape[2]) * (causal_ ? 0.5 : 1.0);
    return one * static_cast<double>(K * (tangent + adjoint) + once);
}

int64_t AttentionRule::workspace(int64_t K) const {
    const std::vector<AttentionUnit> units = tiling_.units(K);
    if (units.empty()) return 0;
    const AttentionUnit& unit = units.front();
    const Integers &q = input(kQuery).shape, &v = input(kValue).shape;
    const int64_t rows = q[2], keys = v[2], width = q[3], value_width = v[3], seen = tiling_.seen_keys();
    // Dense parts of tq, tk, tv, tdo and the sums for tdk, tdv.
    const int64_t directions = (active(kQuery) ? rows * width : 0) + rows * value_width +
                               (active(kKey) ? (keys + seen) * width : 0) +
                               (active(kValue) ? (keys + seen) * value_width : 0);
    const int64_t heads = kSecondOrder * tiling_.tile_elements() + rows * value_width +  // dout
                          unit.directions * directions;
    // Results for parameters are copied into the product.
    int64_t results = 0;
    for (int i : {kQuery, kKey, kValue})
        if (active(i) && input(i).kind == ValueKind::parameter) results += K * input(i).numel;
    const int64_t threads = program_.gpu() ? 1 : at::get_num_threads();
    return std::min<int64_t>(threads, static_cast<int64_t>(units.size())) * unit.group.size() * heads +
           results;
}

}  // namespace flatcore
