// Adjoint sweep of attention.
#include "fused_attention_tile.h"
#include "row_products.h"

namespace flatcore::cuda {
namespace {

// A block owns queries: tdq = scale sum_j (tdz k + dz tk).
template <class Product, int W, bool SecondOrder>
__global__ void __launch_bounds__(kProductThreads, 1)
    query_adjoint_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                         DirectionArray<typename Product::Element> tdq) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Pair = AttentionPair<Product, W, false>;
    using Logits = typename Pair::Logits;
    constexpr int kGroup = kDirectionsAtOnce<W>;
    FLATCORE_SHARED(Word, a, Layout::kA);
    FLATCORE_SHARED(Word, b, Layout::kB);
    FLATCORE_SHARED(Word, factors, Layout::kTile);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.queries, Product::kTile);
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const auto item = body::attention_item(index, tiles, sweep.K, kGroup, shape.causal);
        Pair pair{sweep, {a, b, factors}, item.head, item.tile};
        Sums<Product, W> results[kGroup];
        FLATCORE_UNROLL
        for (int n = 0; n < kGroup; ++n) results[n].zero();
        const auto range = body::key_tiles_of(shape, item.tile, Product::kTile);
        for (pair.other_tile = range.first; pair.other_tile < range.last; ++pair.other_tile) {
            Logits p, u;
            pair.probabilities(p);
            if constexpr (SecondOrder) pair.centred_dp(u);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < item.directions; ++n) {
                const int k = item.direction + n;
                const auto add = [&](const T* points) {
                    add_tile_product<Product, W>(results, n, pair.other_points(points), pair.memory);
                };
                Logits tdz;
                if constexpr (SecondOrder) {
                    pair.logit_tangent(tdz, k);
                    pair.second_order(tdz, u, k);
                } else {
                    tdz.zero();
                }
                pair.adjoint_logits(tdz, p, k);
                write_tile<Product, W>(pair.memory, [&](int i, int j) { return tdz.value[i][j]; });
                add(sweep.keys.point);
                if constexpr (SecondOrder)
                    if (const T* tk = direction(sweep.keys.tpoint, k)) {
                        write_tile<Product, W>(pair.memory,
                                               [&](int i, int j) { return p.value[i][j] * u.value[i][j]; });
                        add(tk);
                    }
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < item.directions; ++n)
            with_result(results, n, [&](const auto& result, int) {
                pair.write(result, tdq.data + (item.direction + n) * tdq.stride, shape.width,
                           [&](int, T value, int64_t) { return static_cast<T>(shape.scale) * value; });
            });
    }
}

// A block owns keys: tdk = scale sum_i (tdz' q + dz' tq), tdv = sum_i (p' tdo + tp' dout). Either may be
// null.
template <class Product, int W, bool SecondOrder>
__global__ void __launch_bounds__(kProductThreads, 1)
    key_adjoint_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                       DirectionArray<typename Product::Element> tdk,
                       DirectionArray<typename Product::Element> tdv) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Pair = AttentionPair<Product, W, true>;
    using Logits = typename Pair::Logits;
    constexpr int kGroup = kDirectionsAtOnce<W>;
    FLATCORE_SHARED(Word, a, Layout::kA);
    FLATCORE_SHARED(Word, b, Layout::kB);
    FLATCORE_SHARED(Word, factors, Layout::kTile);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.keys, Product::kTile);
    const bool p_moves = sweep.queries.tpoint.data || sweep.keys.tpoint.data;
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const auto item = body::attention_item(index, tiles, sweep.K, kGroup, false);
        Pair pair{sweep, {a, b, factors}, item.head, item.tile};
        Sums<Product, W> of_points[kGroup], of_images[kGroup];
        FLATCORE_UNROLL
        for (int n = 0; n < kGroup; ++n) {
            of_points[n].zero();
            of_images[n].zero();
        }
        const auto range = body::query_tiles_of(shape, item.tile, Product::kTile);
        for (pair.other_tile = range.first; pair.other_tile < range.last; ++pair.other_tile) {
            Logits p, u;
            pair.probabilities(p);
            if constexpr (SecondOrder) pair.centred_dp(u);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < item.directions; ++n) {
                const int k = item.direction + n;
                const auto add = [&](auto& results, const MatrixRows<Product>& rows) {
                    add_tile_product<Product, W>(results, n, rows, pair.memory);
                };
                const T* tdo = direction(sweep.queries.timage, k);
                if (tdv.data && tdo) {
                    write_tile<Product, W>(pair.memory, [&](int i, int j) { return p.value[i][j]; });
                    add(of_images, pair.other_images(tdo));
                }
                Logits tdz;
                if constexpr (SecondOrder) {
                    pair.logit_tangent(tdz, k);
                    if (tdv.data && p_moves) {
                        const auto mean = pair.mean_tz(k);
                        write_tile<Product, W>(pair.memory, [&](int i, int j) {
                            return body::softmax_centred(p.value[i][j], tdz.value[i][j], mean(i, j));
                        });
                        add(of_images, pair.other_images(sweep.queries.image));
                    }
                    pair.second_order(tdz, u, k);
                } else {
                    tdz.zero();
                }
                if (!tdk.data) continue;
                pair.adjoint_logits(tdz, p, k);
                write_tile<Product, W>(pair.memory, [&](int i, int j) { return tdz.value[i][j]; });
                add(of_points, pair.other_points(sweep.queries.point));
                if constexpr (SecondOrder)
                    if (const T* tq = direction(sweep.queries.tpoint, k)) {
                        write_tile<Product, W>(pair.memory,
                                               [&](int i, int j) { return p.value[i][j] * u.value[i][j]; });
                        add(of_points, pair.other_points(tq));
                    }
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < item.directions; ++n) {
            const int k = item.direction + n;
            if (tdk.data)
                with_result(of_points, n, [&](const auto& result, int) {
                    pair.write(result, tdk.data + k * tdk.stride, shape.width,
                               [&](int, T value, int64_t) { return static_cast<T>(shape.scale) * value; });
                });
            if (tdv.data)
                with_result(of_images, n, [&](const auto& result, int) {
                    pair.write(result, tdv.data + k * tdv.stride, shape.value_width,
                               [](int, T value, int64_t) { return value; });
                });
        }
    }
}

template <class Product, int W, bool SecondOrder, class T>
void launch_adjoint(const AttentionSweep<T>& sweep, const AttentionAdjoint<T>& adjoint, void* stream) {
    const AttentionShape& shape = sweep.shape;
    const auto items = [&](int64_t length) {
        return shape.batches * shape.heads * ceil_div(length, Product::kTile) *
               ceil_div(sweep.K, kDirectionsAtOnce<W>);
    };
    if (const int64_t count = items(shape.queries); adjoint.tdq.data && count > 0)
        launch(query_adjoint_kernel<Product, W, SecondOrder>, grid_for(count), dim3(kProductThreads), stream,
               sweep, count, adjoint.tdq);
    if (const int64_t count = items(shape.keys); (adjoint.tdk.data || adjoint.tdv.data) && count > 0)
        launch(key_adjoint_kernel<Product, W, SecondOrder>, grid_for(count), dim3(kProductThreads), stream,
               sweep, count, adjoint.tdk, adjoint.tdv);
}

}  // namespace

template <class T>
void fused_attention_adjoint(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const AttentionAdjoint<T>& adjoint, void* stream) {
    const AttentionShape& shape = inputs.shape;
    const bool second_order = adjoint.dout;
    // <p, w> = <tdo, o> + <dout, to>
    row_products<T>({K, shape.batches * shape.heads * shape.queries, shape.value_width, adjoint.tdo,
                     adjoint.o, second_order ? adjoint.dout_to : nullptr, adjoint.workspace},
                    stream);
    AttentionSweep<T> sweep{.shape = shape,
                            .mask = inputs.mask,
                            .queries = {.point = inputs.q, .timage = adjoint.tdo, .length = shape.queries},
                            .keys = {.point = inputs.k, .image = inputs.v, .length = shape.keys},
                            .K = K,
                            .normaliser = adjoint.normaliser,
                            .mean_w = adjoint.workspace};
    if (second_order) {
        sweep.queries.image = adjoint.dout;
        sweep.queries.tpoint = adjoint.tangents.tq;
        sweep.keys.tpoint = adjoint.tangents.tk;
        sweep.keys.timage = adjoint.tangents.tv;
        sweep.dout_o = adjoint.dout_o;
        sweep.mean = adjoint.mean;
    }
    visit_tiles<T>(precision, shape, [&](auto product, auto width) {
        using Product = decltype(product);
        if (second_order)
            launch_adjoint<Product, width.value, true>(sweep, adjoint, stream);
        else
            launch_adjoint<Product, width.value, false>(sweep, adjoint, stream);
    });
}

#define INSTANTIATE(T)                                                                          \
    template void fused_attention_adjoint(int64_t, const AttentionInputs<T>&, ProductPrecision, \
                                          const AttentionAdjoint<T>&, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
