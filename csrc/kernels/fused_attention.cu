// Attention tile by tile: forward and tangent sweeps here, the adjoint sweep in fused_attention_adjoint.cu.
// Every sweep computes p anew from peak and sum of each row, so nothing of queries x keys outlives a tile:
// Dao et al., "FlashAttention" (2022), for the first two sweeps.
//
// Row scalars, which would take a pass over the keys before the one that uses them, have closed forms, as the
// elements of tp sum to zero and dp = v dout:
//   <p, dp> = <dout, o>
//   to      = sum_j p (tz v + tv) - <p, tz> o
//   <p, w>  = <p, tdp> + <tp, dp> = <tdo, o> + <dout, sum_j p tv + tp v> = <tdo, o> + <dout, to>
// So each result takes one pass. The forward sweep is two kernels, the normaliser and then the tangent along
// tv = v: a product more than with rescaled sums, once a batch.
//
// Cost, by counting; nothing here has run on a device.
// Products of tile x tile x width per pair of tiles and direction, where G directions (1 where the width is
// above 64, else 2) share what does not depend on them:
//   forward 3;  tangent 4 + 1 / G;  tdq 6 + 2 / G;  tdk and tdv 8 + 2 / G;
//   without second-derivative terms tdq 2 + 1 / G, tdk and tdv 3 + 1 / G
// tdq on one side and tdk, tdv on the other compute p, tz and tdp each for themselves: one pass for all three
// would need atomics, or memory for the sums of every tile.
// Registers, with 256 threads and tiles of 64 in float32: 32 at most for the results of G directions (64 for
// tdk and tdv), 16 each for p, u, and tz, which becomes w and tdz. With what is on its way to
// shared memory and addresses ptxas reports 190 to 255, so one block of 8 warps runs on a processor (of the
// normaliser's two). Latency is hidden by fetching the next slab while one is multiplied, and by independent
// sums, not by other blocks. Shared memory is 19 to 48 KiB, at most what a static array may have.
// Reads: a product of two arrays takes (tile + tile) width elements for 2 tile^2 width operations, 16 a byte
// in float32 and 4 in double, whose tiles are 32; a product of a tile in shared memory half as many. Tiles of
// a head run side by side, so nearly all come from the L2 cache. An A100's gives 5120 bytes a cycle, 7 TB/s
// by its documents: plain float32 at the full 19.5 Tflop/s asks for 1.2 at most, tf32 at 156 would ask for
// 9.8.
// Shared memory: for a product of rows in plain float32 a warp reads 12 lines of 128 bytes for 64
// multiply-adds a thread, which take 16 cycles (sm_90; 32 on sm_80), so arithmetic is the limit. Where B lies
// along columns it reads 36 for 128 (W = 128), about even on sm_90. In tf32 it reads 12 for 4096
// multiply-adds of the warp, 8 cycles of sm_80's matrix units and 4 of sm_90's; in bf16 12 for twice as many,
// at twice the rate. So the matrix units stand idle for a third of the time at least on sm_80, two thirds on
// sm_90 and later, whose own instructions (wgmma, tcgen05) read shared memory without going through registers
// and are not used here.
#include "fused_attention_tile.h"
#include "row_products.h"

namespace flatcore::cuda {
namespace {

// Peak and sum of each row: every thread over its own columns of all key tiles, the threads that share a row
// in their order at the end.
template <class Product, int W>
__global__ void __launch_bounds__(kProductThreads, 2)
    normaliser_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                      typename Product::Element* normaliser) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Pair = AttentionPair<Product, W, false>;
    FLATCORE_SHARED(Word, a, Layout::kA);
    FLATCORE_SHARED(Word, b, Layout::kB);
    FLATCORE_SHARED(T, peak, Product::kTile * Product::kSharers);
    FLATCORE_SHARED(T, sum, Product::kTile * Product::kSharers);
    const AttentionShape& shape = sweep.shape;
    const int64_t queries = shape.queries, tiles = ceil_div(queries, Product::kTile);
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const auto item = body::attention_item(index, tiles, 1, 1, sweep.shape.causal);
        Pair pair{sweep, {a, b, nullptr}, item.head, item.tile};
        body::RunningSum<T> parts[Product::kRows];
        const auto range = body::key_tiles_of(sweep.shape, item.tile, Product::kTile);
        for (pair.other_tile = range.first; pair.other_tile < range.last; ++pair.other_tile) {
            typename Pair::Logits z;
            pair.logits(z);
            FLATCORE_UNROLL
            for (int i = 0; i < Product::kRows; ++i) {
                T highest = z.value[i][0];
                FLATCORE_UNROLL
                for (int j = 1; j < Pair::Logits::kColumns; ++j)
                    highest = z.value[i][j] > highest ? z.value[i][j] : highest;
                parts[i].raise(highest);
                FLATCORE_UNROLL
                for (int j = 0; j < Pair::Logits::kColumns; ++j) parts[i].add(z.value[i][j]);
            }
        }
        FLATCORE_UNROLL
        for (int i = 0; i < Product::kRows; ++i) {
            const int at = Product::row(i) * Product::kSharers + Product::sharer();
            peak[at] = parts[i].peak;
            sum[at] = parts[i].sum;
        }
        __syncthreads();
        const int row = static_cast<int>(threadIdx.x);
        if (row < Product::kTile && pair.own_first() + row < queries) {
            body::RunningSum<T> total;
            for (int s = 0; s < Product::kSharers; ++s)
                total.add({peak[row * Product::kSharers + s], sum[row * Product::kSharers + s]});
            const int64_t at = item.head * queries + pair.own_first() + row;
            const bool none = total.sum == 0;
            normaliser[at] = none ? T(0) : total.peak;
            normaliser[shape.batches * shape.heads * queries + at] = none ? T(0) : 1 / total.sum;
        }
        __syncthreads();
    }
}

// to = sum_j p (tz v + tv) - mean o, with mean = sum_j p tz.
template <class Product, int W>
__global__ void __launch_bounds__(kProductThreads, 1)
    tangent_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                   const typename Product::Element* o, DirectionArray<typename Product::Element> to,
                   typename Product::Element* mean) {
    using T = typename Product::Element;
    using Word = typename Product::Word;
    using Layout = TileLayout<Product, W>;
    using Pair = AttentionPair<Product, W, false>;
    constexpr int kGroup = kDirectionsAtOnce<W>;
    FLATCORE_SHARED(Word, a, Layout::kA);
    FLATCORE_SHARED(Word, b, Layout::kB);
    FLATCORE_SHARED(Word, factors, Layout::kTile);
    FLATCORE_SHARED(T, parts, Product::kTile * Product::kSharers);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.queries, Product::kTile);
    const bool p_moves = sweep.queries.tpoint.data || sweep.keys.tpoint.data;
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const auto item = body::attention_item(index, tiles, sweep.K, kGroup, shape.causal);
        Pair pair{sweep, {a, b, factors}, item.head, item.tile};
        Sums<Product, W> results[kGroup];
        T means[kGroup][Product::kRows];
        FLATCORE_UNROLL
        for (int n = 0; n < kGroup; ++n) {
            results[n].zero();
            FLATCORE_UNROLL
            for (int i = 0; i < Product::kRows; ++i) means[n][i] = 0;
        }
        const auto range = body::key_tiles_of(shape, item.tile, Product::kTile);
        for (pair.other_tile = range.first; pair.other_tile < range.last; ++pair.other_tile) {
            typename Pair::Logits p;
            pair.probabilities(p);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < item.directions; ++n) {
                const auto add = [&](const T* values) {
                    add_tile_product<Product, W>(results, n, pair.other_images(values), pair.memory);
                };
                if (p_moves) {
                    typename Pair::Logits tz;
                    pair.logit_tangent(tz, item.direction + n);
                    with_result(means, n, [&](auto& of_rows, int) {
                        Pair::Logits::each(
                            [&](int i, int j) { of_rows[i] += p.value[i][j] * tz.value[i][j]; });
                    });
                    write_tile<Product, W>(pair.memory,
                                           [&](int i, int j) { return p.value[i][j] * tz.value[i][j]; });
                    add(sweep.keys.image);
                }
                if (const T* tv = direction(sweep.keys.timage, item.direction + n)) {
                    write_tile<Product, W>(pair.memory, [&](int i, int j) { return p.value[i][j]; });
                    add(tv);
                }
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < item.directions; ++n) {
            const int k = item.direction + n;
            with_result(results, n, [&](const auto& result, int m) {
                T total[Product::kRows] = {};
                if (p_moves) {
                    FLATCORE_UNROLL
                    for (int i = 0; i < Product::kRows; ++i)
                        parts[Product::row(i) * Product::kSharers + Product::sharer()] = means[m][i];
                    __syncthreads();
                    FLATCORE_UNROLL
                    for (int i = 0; i < Product::kRows; ++i) {
                        for (int s = 0; s < Product::kSharers; ++s)
                            total[i] += parts[Product::row(i) * Product::kSharers + s];
                        const int64_t row = pair.own_first() + Product::row(i);
                        if (Product::sharer() == 0 && row < shape.queries)
                            mean[(k * shape.batches * shape.heads + item.head) * shape.queries + row] =
                                total[i];
                    }
                    __syncthreads();
                }
                pair.write(
                    result, to.data + k * to.stride, shape.value_width,
                    [&](int i, T value, int64_t at) { return p_moves ? value - total[i] * o[at] : value; });
            });
        }
    }
}

}  // namespace

template <class T>
void fused_attention_forward(const AttentionInputs<T>& inputs, ProductPrecision precision, T* o,
                             T* normaliser, void* stream) {
    const AttentionShape& shape = inputs.shape;
    visit_tiles<T>(precision, shape, [&](auto product, auto width) {
        using Product = decltype(product);
        const int64_t items = shape.batches * shape.heads * ceil_div(shape.queries, Product::kTile);
        if (items == 0) return;
        const AttentionSweep<T> sweep{.shape = shape,
                                      .mask = inputs.mask,
                                      .queries = {.point = inputs.q, .length = shape.queries},
                                      .keys = {.point = inputs.k, .length = shape.keys}};
        launch(normaliser_kernel<Product, width.value>, grid_for(items), dim3(kProductThreads), stream, sweep,
               items, normaliser);
    });
    // The tangent along tv = v, which is o.
    fused_attention_tangent<T>(1, inputs, precision, o, normaliser, {.tv = {inputs.v, 0}}, {o, 0}, nullptr,
                               nullptr, nullptr, stream);
}

template <class T>
void fused_attention_backward(const AttentionShape& shape, const T* dout, const T* o, T* dout_o,
                              void* stream) {
    const int64_t rows = shape.batches * shape.heads * shape.queries;
    row_products<T>({1, rows, shape.value_width, {dout, 0}, o, nullptr, dout_o}, stream);
}

template <class T>
void fused_attention_tangent(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const T* o, const T* normaliser, const AttentionTangents<T>& tangents,
                             DirectionArray<T> to, T* mean, const T* dout, T* dout_to, void* stream) {
    const AttentionShape& shape = inputs.shape;
    visit_tiles<T>(precision, shape, [&](auto product, auto width) {
        using Product = decltype(product);
        const int64_t items = shape.batches * shape.heads * ceil_div(shape.queries, Product::kTile) *
                              ceil_div(K, kDirectionsAtOnce<width.value>);
        if (items == 0) return;
        const AttentionSweep<T> sweep{
            .shape = shape,
            .mask = inputs.mask,
            .queries = {.point = inputs.q, .tpoint = tangents.tq, .length = shape.queries},
            .keys = {inputs.k, inputs.v, tangents.tk, tangents.tv, shape.keys},
            .K = K,
            .normaliser = normaliser};
        launch(tangent_kernel<Product, width.value>, grid_for(items), dim3(kProductThreads), stream, sweep,
               items, o, to, mean);
    });
    if (dout)
        row_products<T>({K,
                         shape.batches * shape.heads * shape.queries,
                         shape.value_width,
                         {to.data, to.stride},
                         dout,
                         nullptr,
                         dout_to},
                        stream);
}

#define INSTANTIATE(T)                                                                                    \
    template void fused_attention_forward(const AttentionInputs<T>&, ProductPrecision, T*, T*, void*);    \
    template void fused_attention_backward(const AttentionShape&, const T*, const T*, T*, void*);         \
    template void fused_attention_tangent(int64_t, const AttentionInputs<T>&, ProductPrecision, const T*, \
                                          const T*, const AttentionTangents<T>&, DirectionArray<T>, T*,   \
                                          const T*, T*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
