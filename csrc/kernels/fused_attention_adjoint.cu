// Adjoint sweep of attention.
#include "fused_attention_tile.h"
#include "row_products.h"

namespace flatcore::cuda {
namespace {

// A block owns queries: tdq = scale sum_j (tdz k + dz tk).
template <class Product, bool SecondOrder>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks)
    query_adjoint_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                         HeadArray<typename Product::Element> tdq) {
    using T = typename Product::Element;
    using Pair = AttentionPair<Product, false>;
    using Logits = typename Pair::Logits;
    FLATCORE_SHARED_BYTES(shared);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.queries, Product::kTile);
    Pair pair{sweep, typename Product::Tiles(shared), {}};
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        pair.take(body::attention_item(shape, index, tiles, sweep.K, Product::kDirections, shape.causal));
        typename Pair::Result results[Product::kDirections];
        FLATCORE_UNROLL
        for (int n = 0; n < Product::kDirections; ++n) results[n].zero();
        const auto range = body::key_tiles_of(shape, pair.item.tile, Product::kTile, Product::kOther);
        FLATCORE_NO_UNROLL
        for (int tile = range.first; tile < range.last; ++tile) {
            pair.take_tile(tile);
            Logits p, u;
            pair.probabilities(p);
            if constexpr (SecondOrder) pair.centred_dp(u);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < pair.directions(); ++n) {
                Logits tdz;
                if constexpr (SecondOrder) {
                    pair.logit_tangent(tdz, n);
                    pair.second_order(tdz, u, n);
                } else {
                    tdz.zero();
                }
                pair.adjoint_logits(tdz, p, n);
                pair.tiles.add_sums(
                    results, n, [&](int i, int j) { return tdz.value[i][j]; }, pair.other(Operand::point));
                if constexpr (SecondOrder)
                    if (pair.other_has(Operand::tpoint))
                        pair.tiles.add_sums(
                            results, n, [&](int i, int j) { return p.value[i][j] * u.value[i][j]; },
                            pair.other(Operand::tpoint, n));
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < pair.directions(); ++n)
            with_result(results, n, [&](const auto& result, int) {
                pair.write(result, tdq, n, shape.width,
                           [&](int, int, T value) { return static_cast<T>(shape.scale) * value; });
            });
    }
}

// A block owns keys: tdk = scale sum_i (tdz' q + dz' tq), tdv = sum_i (p' tdo + tp' dout). Either may be
// null.
template <class Product, bool SecondOrder>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks)
    key_adjoint_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                       HeadArray<typename Product::Element> tdk, HeadArray<typename Product::Element> tdv) {
    using T = typename Product::Element;
    using Pair = AttentionPair<Product, true>;
    using Logits = typename Pair::Logits;
    FLATCORE_SHARED_BYTES(shared);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.keys, Product::kTile);
    const bool p_moves = sweep.queries.tpoint.data || sweep.keys.tpoint.data;
    Pair pair{sweep, typename Product::Tiles(shared), {}};
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        pair.take(body::attention_item(shape, index, tiles, sweep.K, Product::kDirections, false));
        typename Pair::Result of_points[Product::kDirections], of_images[Product::kDirections];
        FLATCORE_UNROLL
        for (int n = 0; n < Product::kDirections; ++n) {
            of_points[n].zero();
            of_images[n].zero();
        }
        const auto range = body::query_tiles_of(shape, pair.item.tile, Product::kTile, Product::kOther);
        FLATCORE_NO_UNROLL
        for (int tile = range.first; tile < range.last; ++tile) {
            pair.take_tile(tile);
            Logits p, u;
            pair.probabilities(p);
            if constexpr (SecondOrder) pair.centred_dp(u);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < pair.directions(); ++n) {
                if (tdv.data && pair.other_has(Operand::timage))
                    pair.tiles.add_sums(
                        of_images, n, [&](int i, int j) { return p.value[i][j]; },
                        pair.other(Operand::timage, n));
                Logits tdz;
                if constexpr (SecondOrder) {
                    pair.logit_tangent(tdz, n);
                    if (tdv.data && p_moves) {
                        const auto mean = pair.mean_tz(n);
                        pair.tiles.add_sums(
                            of_images, n,
                            [&](int i, int j) {
                                return body::softmax_centred(p.value[i][j], tdz.value[i][j], mean(i, j));
                            },
                            pair.other(Operand::image));
                    }
                    pair.second_order(tdz, u, n);
                } else {
                    tdz.zero();
                }
                if (!tdk.data) continue;
                pair.adjoint_logits(tdz, p, n);
                pair.tiles.add_sums(
                    of_points, n, [&](int i, int j) { return tdz.value[i][j]; }, pair.other(Operand::point));
                if constexpr (SecondOrder)
                    if (pair.other_has(Operand::tpoint))
                        pair.tiles.add_sums(
                            of_points, n, [&](int i, int j) { return p.value[i][j] * u.value[i][j]; },
                            pair.other(Operand::tpoint, n));
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < pair.directions(); ++n) {
            if (tdk.data)
                with_result(of_points, n, [&](const auto& result, int) {
                    pair.write(result, tdk, n, shape.width,
                               [&](int, int, T value) { return static_cast<T>(shape.scale) * value; });
                });
            if (tdv.data)
                with_result(of_images, n, [&](const auto& result, int) {
                    pair.write(result, tdv, n, shape.value_width, [](int, int, T value) { return value; });
                });
        }
    }
}

template <class Product, bool SecondOrder, class T>
void launch_adjoint(const AttentionSweep<T>& sweep, const AttentionAdjoint<T>& adjoint, void* stream) {
    const AttentionShape& shape = sweep.shape;
    if (adjoint.tdq.data) {
        const int64_t items = item_count<Product>(shape, shape.queries, sweep.K);
        launch_tiles<Product>(query_adjoint_kernel<Product, SecondOrder>, items, stream, sweep, items,
                              adjoint.tdq);
    }
    if (adjoint.tdk.data || adjoint.tdv.data) {
        const int64_t items = item_count<Product>(shape, shape.keys, sweep.K);
        launch_tiles<Product>(key_adjoint_kernel<Product, SecondOrder>, items, stream, sweep, items,
                              adjoint.tdk, adjoint.tdv);
    }
}

}  // namespace

template <class T>
void fused_attention_adjoint(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const AttentionAdjoint<T>& adjoint, void* stream) {
    const AttentionShape& shape = inputs.shape;
    const bool second_order = adjoint.dout;
    // <p, w> = <tdo, o> + <dout, to>
    row_products<T>(
        {K, shape, adjoint.tdo, adjoint.o, second_order ? adjoint.dout_to : nullptr, adjoint.workspace},
        stream);
    AttentionSweep<T> sweep{
        .shape = shape,
        .mask = inputs.mask,
        .queries = {.point = query_points(inputs), .timage = adjoint.tdo, .length = shape.queries},
        .keys = {.point = key_points(inputs), .image = key_images(inputs), .length = shape.keys},
        .K = K,
        .normaliser = adjoint.normaliser,
        .mean_w = adjoint.workspace};
    if (second_order) {
        sweep.queries.image = query_images(adjoint.dout, shape);
        sweep.queries.tpoint = adjoint.tangents.tq;
        sweep.keys.tpoint = adjoint.tangents.tk;
        sweep.keys.timage = adjoint.tangents.tv;
        sweep.dout_o = adjoint.dout_o;
        sweep.mean = adjoint.mean;
    }
    visit_products<T>(precision, shape, [&](auto product) {
        using Product = decltype(product);
        if (second_order)
            launch_adjoint<Product, true>(sweep, adjoint, stream);
        else
            launch_adjoint<Product, false>(sweep, adjoint, stream);
    });
}

#define INSTANTIATE(T)                                                                          \
    template void fused_attention_adjoint(int64_t, const AttentionInputs<T>&, ProductPrecision, \
                                          const AttentionAdjoint<T>&, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
