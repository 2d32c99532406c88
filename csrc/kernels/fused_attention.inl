// Index arithmetic and the formulas at one element of fused attention; those that need
// sums over a row are in attention.inl and softmax.inl.
#pragma once

#include <cstdint>
#include <limits>

#include "attention.inl"
#include "cuda_grid.h"
#include "fused_attention.h"
#include "macros.h"

namespace flatcore::body {

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

using cuda::ceil_div;

// A block's work: a tile of one head's queries or keys, and a few directions that share its probabilities.
// Tiles of a head follow each other, so that blocks that run at once read the same keys and values. Numbers
// of tiles and directions are 32 bits, which saves registers.
struct AttentionItem {
    int batch, head, tile, direction, directions;
};
FLATCORE_HOST_DEVICE AttentionItem attention_item(const AttentionShape& shape, int64_t index, int64_t tiles,
                                                  int64_t K, int at_once, bool last_tile_first) {
    const int64_t tile = index % tiles, rest = index / tiles, groups = ceil_div(K, at_once);
    const int64_t direction = rest % groups * at_once, left = K - direction, head = rest / groups;
    return {static_cast<int>(head / shape.heads), static_cast<int>(head % shape.heads),
            static_cast<int>(last_tile_first ? tiles - 1 - tile : tile), static_cast<int>(direction),
            left < at_once ? static_cast<int>(left) : at_once};
}

// Where rows of an item's n-th direction begin, those of its head.
template <class T>
FLATCORE_HOST_DEVICE T* rows_of(const HeadArray<T>& array, const AttentionItem& item, int n) {
    return array.data + (item.direction + n) * array.direction + item.batch * array.batch +
           item.head * array.head;
}

// A contiguous array, heads in front of rows, which all directions share.
template <class T>
FLATCORE_HOST_DEVICE HeadArray<T> contiguous_heads(T* data, const AttentionShape& shape, int64_t length,
                                                   int64_t width) {
    return {data, 0, shape.heads * length * width, length * width, width};
}

// Tiles of the other axis with which a tile of one axis has elements: [first, last). `own` and `other` are
// their numbers of rows.
struct TileRange {
    int first, last;
};
FLATCORE_HOST_DEVICE TileRange key_tiles_of(const AttentionShape& shape, int query_tile, int own, int other) {
    const int64_t end = (int64_t{query_tile} + 1) * own;  // the last query of the tile sees the keys below
    return {0, static_cast<int>(ceil_div(shape.causal && end < shape.keys ? end : shape.keys, other))};
}
FLATCORE_HOST_DEVICE TileRange query_tiles_of(const AttentionShape& shape, int key_tile, int own, int other) {
    const int tiles = static_cast<int>(ceil_div(shape.queries, other));
    if (!shape.causal) return {0, tiles};
    const int64_t first = int64_t{key_tile} * own / other;  // has the first query that sees the first key
    return {first < tiles ? static_cast<int>(first) : tiles, tiles};
}

// What is added to the logits of a tile: 0 or the mask, -infinity where the query does not see the key.
// Places within the tile and all that they are compared with are 32 bits, which saves registers and time.
template <class T>
struct TileBias {
    static constexpr int64_t kFar = int64_t{1} << 20;  // beyond any tile
    const bool* keep;
    const T* added;  // both of the tile's corner
    int64_t query_stride, key_stride;
    int queries, keys;  // that there are
    int ahead;          // query i of the tile sees its keys up to i - ahead

    FLATCORE_HOST_DEVICE TileBias(const AttentionShape& shape, const AttentionMask<T>& mask, int batch,
                                  int head, int64_t query, int64_t key)
        : keep(mask.keep), added(mask.added), query_stride(mask.strides[2]), key_stride(mask.strides[3]),
          queries(static_cast<int>(shape.queries - query < kFar ? shape.queries - query : kFar)),
          keys(static_cast<int>(shape.keys - key < kFar ? shape.keys - key : kFar)),
          ahead(static_cast<int>(!shape.causal || key - query < -kFar ? -kFar
                                 : key - query < kFar                 ? key - query
                                                                      : kFar)) {
        if (!keep && !added) return;
        const int64_t corner =
            batch * mask.strides[0] + head * mask.strides[1] + query * query_stride + key * key_stride;
        if (keep) keep += corner;
        if (added) added += corner;
    }

    // Nothing is added to a tile of this size.
    FLATCORE_HOST_DEVICE bool nothing(int tile_queries, int tile_keys) const {
        return !keep && !added && tile_queries <= queries && tile_keys <= keys && tile_keys - 1 + ahead <= 0;
    }
    FLATCORE_HOST_DEVICE T operator()(int query, int key) const {
        if (query >= queries || key >= keys || key + ahead > query) return -kInfinity<T>;
        const int64_t at = query * query_stride + key * key_stride;
        if (added) return added[at];
        return !keep || keep[at] ? T(0) : -kInfinity<T>;
    }
};

template <class T>
FLATCORE_HOST_DEVICE T attention_probability(T logit, T peak, T inverse_sum) {
    return softmax_exponential(logit, peak) * inverse_sum;
}

// Peak and sum of exp(logit - peak) of logits as they come: raise(logit), then add(logit).
template <class T>
struct RunningSum {
    T peak = -kInfinity<T>, sum = 0;

    FLATCORE_HOST_DEVICE void raise(T logit) {
        if (!(logit > peak)) return;
        sum *= softmax_exponential(peak, logit);
        peak = logit;
    }
    FLATCORE_HOST_DEVICE void add(T logit, T times = 1) {
        if (logit != -kInfinity<T>) sum += times * softmax_exponential(logit, peak);
    }
    FLATCORE_HOST_DEVICE void add(const RunningSum& part) {
        raise(part.peak);
        add(part.peak, part.sum);
    }
};

}  // namespace flatcore::body
