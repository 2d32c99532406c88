// How the sums of tall.h are cut, and the step of each, shared by CPU and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "macros.h"

namespace flatcore::body {

// Rows of Y beside `tall` rows of X in a tile, whose sums one thread keeps: what the registers hold, with a
// pointer for each row. The rows' ends are padded to whole tiles.
template <int Tall>
constexpr int kTileWidth = Tall == 1 ? 8 : 16 / Tall;

constexpr int64_t kTileThreads = 128;
// Column blocks depend on the sizes alone, so that a sum is the same on every device.
constexpr int64_t kMostColumnBlocks = 1024;
constexpr int64_t kColumnsPerThread = 16;  // at least, so that the reduction of a block is worth it

struct GramTiles {
    int tall, wide;  // rows of X and of Y in a tile
    int64_t down, across, column_blocks;
};

// Wide tiles: X is the narrow one.
inline GramTiles gram_tiles(int64_t p, int64_t m, int64_t P) {
    const int tall = p <= 1 ? 1 : p <= 2 ? 2 : 4;
    const int wide = tall == 1 ? kTileWidth<1> : tall == 2 ? kTileWidth<2> : kTileWidth<4>;
    const int64_t columns = kTileThreads * kColumnsPerThread;
    return {tall, wide, (p + tall - 1) / tall, (m + wide - 1) / wide,
            std::clamp<int64_t>((P + columns - 1) / columns, 1, kMostColumnBlocks)};
}

template <bool Update, class T>
FLATCORE_HOST_DEVICE T combined(T before, T sum) {
    return Update ? before - sum : sum;
}

}  // namespace flatcore::body
