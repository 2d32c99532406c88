#include "bf16.h"

#include "macros.h"
#include "rounding.h"

namespace flatcore {

namespace {

// Tiles of 16 x 16 pairs: one vector register a row.
constexpr int64_t kTile = 16;

// A tile whose elements lie side by side along k: tile[i][p].
FLATCORE_CLONES void load_along_k(const float* x, int64_t stride_i, uint32_t* tile) {
    uint16_t* elements = reinterpret_cast<uint16_t*>(tile);
    for (int64_t i = 0; i < kTile; ++i)
        for (int64_t k = 0; k < 2 * kTile; ++k)
            elements[i * 2 * kTile + k] = static_cast<uint16_t>(rounded_to_bf16(x[i * stride_i + k]) >> 16);
}

// Side by side along i: tile[p][i].
FLATCORE_CLONES void load_along_i(const float* x, int64_t stride_k, uint32_t* tile) {
    for (int64_t p = 0; p < kTile; ++p)
        for (int64_t i = 0; i < kTile; ++i)
            tile[p * kTile + i] = bf16_pair(x[2 * p * stride_k + i], x[(2 * p + 1) * stride_k + i]);
}

FLATCORE_CLONES void store(const uint32_t* tile, uint32_t* out, int64_t stride) {
    for (int64_t row = 0; row < kTile; ++row)
        for (int64_t column = 0; column < kTile; ++column)
            out[row * stride + column] = tile[row * kTile + column];
}

FLATCORE_CLONES void store_transposed(const uint32_t* tile, uint32_t* out, int64_t stride) {
    for (int64_t row = 0; row < kTile; ++row)
        for (int64_t column = 0; column < kTile; ++column)
            out[row * stride + column] = tile[column * kTile + row];
}

void round_tile(const float* x, const PairSource& source, uint32_t* out, const PairTarget& target) {
    alignas(64) uint32_t tile[kTile * kTile];
    const bool along_k = source.stride_k == 1, out_along_k = target.stride_p == 1;
    if (along_k)
        load_along_k(x, source.stride_i, tile);
    else
        load_along_i(x, source.stride_k, tile);
    const int64_t stride = out_along_k ? target.stride_i : target.stride_p;
    if (along_k == out_along_k)
        store(tile, out, stride);
    else
        store_transposed(tile, out, stride);
}

}  // namespace

void round_to_pairs(int64_t count_i, int64_t count_k, const PairSource& source, const PairTarget& target) {
    const bool tiled =
        (source.stride_i == 1 || source.stride_k == 1) && (target.stride_i == 1 || target.stride_p == 1);
    const int64_t whole_i = tiled ? count_i / kTile * kTile : 0;
    const int64_t pairs = count_k / 2, whole_p = tiled ? pairs / kTile * kTile : 0;
    for (int64_t i = 0; i < whole_i; i += kTile)
        for (int64_t p = 0; p < whole_p; p += kTile)
            round_tile(source.data + i * source.stride_i + 2 * p * source.stride_k, source,
                       target.data + i * target.stride_i + p * target.stride_p, target);
    for (int64_t i = 0; i < count_i; ++i) {
        const float* x = source.data + i * source.stride_i;
        uint32_t* out = target.data + i * target.stride_i;
        for (int64_t p = i < whole_i ? whole_p : 0; p < pairs; ++p)
            out[p * target.stride_p] =
                bf16_pair(x[2 * p * source.stride_k], x[(2 * p + 1) * source.stride_k]);
        if (count_k % 2) out[pairs * target.stride_p] = bf16_pair(x[(count_k - 1) * source.stride_k], 0);
    }
}

}  // namespace flatcore
