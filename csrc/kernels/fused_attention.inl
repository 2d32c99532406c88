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
    int64_t head;
    int tile, direction, directions;
};
FLATCORE_HOST_DEVICE AttentionItem attention_item(int64_t index, int64_t tiles, int64_t K, int at_once,
                                                  bool last_tile_first) {
    const int64_t tile = index % tiles, rest = index / tiles, groups = ceil_div(K, at_once);
    const int64_t direction = rest % groups * at_once, left = K - direction;
    return {rest / groups, static_cast<int>(last_tile_first ? tiles - 1 - tile : tile),
            static_cast<int>(direction), left < at_once ? static_cast<int>(left) : at_once};
}

// Tiles of the other axis with which a tile of one axis has elements: [first, last).
struct TileRange {
    int first, last;
};
FLATCORE_HOST_DEVICE TileRange key_tiles_of(const AttentionShape& shape, int query_tile, int size) {
    const int64_t end = (int64_t{query_tile} + 1) * size;  // the last query of the tile sees the keys below
    return {0, static_cast<int>(ceil_div(shape.causal && end < shape.keys ? end : shape.keys, size))};
}
FLATCORE_HOST_DEVICE TileRange query_tiles_of(const AttentionShape& shape, int key_tile, int size) {
    const int tiles = static_cast<int>(ceil_div(shape.queries, size));
    return {shape.causal ? (key_tile < tiles ? key_tile : tiles) : 0, tiles};
}

// What is added to the logit: 0 or the mask, -infinity where the query does not see the key.
template <class T>
FLATCORE_HOST_DEVICE T attention_bias(const AttentionShape& shape, const AttentionMask<T>& mask, int64_t head,
                                      int64_t query, int64_t key) {
    if (query >= shape.queries || key >= shape.keys || (shape.causal && key > query)) return -kInfinity<T>;
    if (!mask.keep && !mask.added) return 0;
    const int64_t at = head / shape.heads * mask.strides[0] + head % shape.heads * mask.strides[1] +
                       query * mask.strides[2] + key * mask.strides[3];
    if (mask.added) return mask.added[at];
    return mask.keep[at] ? T(0) : -kInfinity<T>;
}

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
