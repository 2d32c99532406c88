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
// Products of tile x other x width per pair of tiles and direction, where G directions (Product::kDirections)
// share what does not depend on them:
//   forward 3;  tangent 4 + 1 / G;  tdq 6 + 2 / G;  tdk and tdv 8 + 2 / G;
//   without second-derivative terms tdq 2 + 1 / G, tdk and tdv 3 + 1 / G
// tdq on one side and tdk, tdv on the other compute p, tz and tdp each for themselves: one pass for all three
// would need atomics, or memory for the sums of every tile.
//
// Plain products (tiles of 64 x 64 by 256 threads in float32, 32 x 32 in double) are limited by arithmetic.
// For a product of rows in float32 a warp reads 12 lines of 128 bytes of shared memory for 64 multiply-adds a
// thread, which take 16 cycles (sm_90; 32 on sm_80). Both operands are read anew for each product, slab by
// slab, 16 operations a byte: at the full 19.5 Tflop/s an A100's L2 cache is asked for 1.2 TB/s of its 7.
// ptxas reports 160 to 255 registers, so one block of 8 warps runs on a processor; latency is hidden by
// fetching the next slab while one is multiplied.
//
// The matrix units are so much faster that reading and waiting would be all the time there is: that way a
// product of 64 x 64 x 64 in bf16 takes 128 of their instructions, some 350 others of each warp for fetching
// and rounding both operands, and three times the latency of the L2 cache with no other block to run
// meanwhile. So there (tensor_product.h) operands are rounded once into shared memory and stay, four of the
// own side for the whole sweep and four of the other side for a tile, and sums are the next product's left
// operand in registers. By their shared memory two blocks or more run on a processor of an H200, so that one
// computes while another waits; where a processor has 100 KiB, one, but for bf16 up to a width of 32.
// For tdk and tdv in bf16 with a width of 64, 64 keys, 32 queries and one direction, each of the four warps
// issues 160 matrix instructions and reads 416 lines of 128 bytes of shared memory, and the block reads 32
// KiB from the L2 cache. On an H200 the lines take 1664 cycles; the others 960 and 1400 if mma.sync reaches
// 60 % of the documented rate and the cache gives 5.5 TB/s, which are assumptions. At best the longest hides
// the rest. With the shorter tiles of tf32 a product of rows reads 4 lines an instruction, not 3. Hopper's
// own instructions (wgmma) read shared memory without going through registers and are not used.
#include "fused_attention_tile.h"
#include "row_products.h"

namespace flatcore::cuda {
namespace {

// Peak and sum of each row: every thread over its own columns of all key tiles, then over the threads that
// share the row.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks)
    normaliser_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                      typename Product::Element* normaliser) {
    using T = typename Product::Element;
    using Pair = AttentionPair<Product, false>;
    FLATCORE_SHARED_BYTES(shared);
    const AttentionShape& shape = sweep.shape;
    const int64_t queries = shape.queries, tiles = ceil_div(queries, Product::kTile);
    Pair pair{sweep, typename Product::Tiles(shared), {}};
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        pair.take(body::attention_item(shape, index, tiles, 1, 1, shape.causal));
        body::RunningSum<T> parts[Product::kRows];
        const auto range = body::key_tiles_of(shape, pair.item.tile, Product::kTile, Product::kOther);
        FLATCORE_NO_UNROLL
        for (int tile = range.first; tile < range.last; ++tile) {
            pair.take_tile(tile);
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
            over_sharers<Product>([&](int other) {
                parts[i].add(
                    {__shfl_xor_sync(~0u, parts[i].peak, other), __shfl_xor_sync(~0u, parts[i].sum, other)});
            });
            const int64_t row = pair.own_first() + Product::row(i), at = pair.head() * queries + row;
            if (Product::sharer() != 0 || row >= queries) continue;
            const bool none = parts[i].sum == 0;
            normaliser[at] = none ? T(0) : parts[i].peak;
            normaliser[shape.batches * shape.heads * queries + at] = none ? T(0) : 1 / parts[i].sum;
        }
    }
}

// to = sum_j p (tz v + tv) - mean o, with mean = sum_j p tz.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks)
    tangent_kernel(AttentionSweep<typename Product::Element> sweep, int64_t items,
                   const typename Product::Element* o, HeadArray<typename Product::Element> to,
                   typename Product::Element* mean) {
    using T = typename Product::Element;
    using Pair = AttentionPair<Product, false>;
    FLATCORE_SHARED_BYTES(shared);
    const AttentionShape& shape = sweep.shape;
    const int64_t tiles = ceil_div(shape.queries, Product::kTile);
    const bool p_moves = sweep.queries.tpoint.data || sweep.keys.tpoint.data;
    Pair pair{sweep, typename Product::Tiles(shared), {}};
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        pair.take(body::attention_item(shape, index, tiles, sweep.K, Product::kDirections, shape.causal));
        typename Pair::Result results[Product::kDirections];
        T means[Product::kDirections][Product::kRows];
        FLATCORE_UNROLL
        for (int n = 0; n < Product::kDirections; ++n) {
            results[n].zero();
            FLATCORE_UNROLL
            for (int i = 0; i < Product::kRows; ++i) means[n][i] = 0;
        }
        const auto range = body::key_tiles_of(shape, pair.item.tile, Product::kTile, Product::kOther);
        FLATCORE_NO_UNROLL
        for (int tile = range.first; tile < range.last; ++tile) {
            pair.take_tile(tile);
            typename Pair::Logits p;
            pair.probabilities(p);
            FLATCORE_NO_UNROLL
            for (int n = 0; n < pair.directions(); ++n) {
                if (p_moves) {
                    typename Pair::Logits tz;
                    pair.logit_tangent(tz, n);
                    Pair::Logits::each([&](int i, int j) { tz.value[i][j] *= p.value[i][j]; });
                    with_result(means, n, [&](auto& of_rows, int) {
                        Pair::Logits::each([&](int i, int j) { of_rows[i] += tz.value[i][j]; });
                    });
                    pair.tiles.add_sums(
                        results, n, [&](int i, int j) { return tz.value[i][j]; }, pair.other(Operand::image));
                }
                if (pair.other_has(Operand::timage))
                    pair.tiles.add_sums(
                        results, n, [&](int i, int j) { return p.value[i][j]; },
                        pair.other(Operand::timage, n));
            }
        }
        FLATCORE_NO_UNROLL
        for (int n = 0; n < pair.directions(); ++n) {
            const int k = pair.item.direction + n;
            with_result(results, n, [&](const auto& result, int m) {
                T total[Product::kRows];
                FLATCORE_UNROLL
                for (int i = 0; i < Product::kRows; ++i) {
                    total[i] = means[m][i];
                    over_sharers<Product>(
                        [&](int other) { total[i] += __shfl_xor_sync(~0u, total[i], other); });
                    const int64_t row = pair.own_first() + Product::row(i);
                    if (p_moves && Product::sharer() == 0 && row < shape.queries)
                        mean[(k * shape.batches * shape.heads + pair.head()) * shape.queries + row] =
                            total[i];
                }
                const int width = static_cast<int>(shape.value_width);
                const T* of_rows = o + (pair.head() * shape.queries + pair.own_first()) * width;
                pair.write(result, to, n, width, [&](int i, int j, T value) {
                    const int at = Pair::Result::row(i) * width + Pair::Result::column(j);
                    return p_moves ? value - total[i] * of_rows[at] : value;
                });
            });
        }
    }
}

}  // namespace

template <class T>
void fused_attention_forward(const AttentionInputs<T>& inputs, ProductPrecision precision, T* o,
                             T* normaliser, void* stream) {
    const AttentionShape& shape = inputs.shape;
    visit_products<T>(precision, shape, [&](auto product) {
        using Product = decltype(product);
        const int64_t items = item_count<Product>(shape, shape.queries, 1);
        const AttentionSweep<T> sweep{.shape = shape,
                                      .mask = inputs.mask,
                                      .queries = {.point = query_points(inputs), .length = shape.queries},
                                      .keys = {.point = key_points(inputs), .length = shape.keys}};
        launch_tiles<Product>(normaliser_kernel<Product>, items, stream, sweep, items, normaliser);
    });
    // The tangent along tv = v, which is o.
    fused_attention_tangent<T>(1, inputs, precision, o, normaliser, {.tv = key_images(inputs)},
                               query_images(o, shape), nullptr, nullptr, nullptr, stream);
}

template <class T>
void fused_attention_backward(const AttentionShape& shape, const T* dout, const T* o, T* dout_o,
                              void* stream) {
    row_products<T>({1, shape, query_images(dout, shape), o, nullptr, dout_o}, stream);
}

template <class T>
void fused_attention_tangent(int64_t K, const AttentionInputs<T>& inputs, ProductPrecision precision,
                             const T* o, const T* normaliser, const AttentionTangents<T>& tangents,
                             HeadArray<T> to, T* mean, const T* dout, T* dout_to, void* stream) {
    const AttentionShape& shape = inputs.shape;
    const bool p_moves = tangents.tq.data || tangents.tk.data;
    visit_products<T>(precision, shape, [&](auto product) {
        using Product = decltype(product);
        const int64_t items = item_count<Product>(shape, shape.queries, K);
        const AttentionSweep<T> sweep{
            .shape = shape,
            .mask = inputs.mask,
            .queries = {.point = query_points(inputs), .tpoint = tangents.tq, .length = shape.queries},
            .keys = {key_points(inputs), p_moves ? key_images(inputs) : HeadArray<const T>{}, tangents.tk,
                     tangents.tv, shape.keys},
            .K = K,
            .normaliser = normaliser};
        launch_tiles<Product>(tangent_kernel<Product>, items, stream, sweep, items, o, to, mean);
    });
    if (dout)
        row_products<T>(
            {K, shape, {to.data, to.direction, to.batch, to.head, to.row}, dout, nullptr, dout_to}, stream);
}

#define INSTANTIATE(T)                                                                                       \
    template void fused_attention_forward(const AttentionInputs<T>&, ProductPrecision, T*, T*, void*);       \
    template void fused_attention_backward(const AttentionShape&, const T*, const T*, T*, void*);            \
    template void fused_attention_tangent(int64_t, const AttentionInputs<T>&, ProductPrecision, const T*,    \
                                          const T*, const AttentionTangents<T>&, HeadArray<T>, T*, const T*, \
                                          T*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
