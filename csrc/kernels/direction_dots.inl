// How direction_dots.h cuts n elements, on every device.
#pragma once

#include <cstdint>

#include "direction_dots.h"
#include "dots.inl"

namespace flatcore::body {

// Elements in a piece, a multiple of four, so that packs stay aligned; fewer than kSmallestPiece are not
// worth a block. The last piece may have fewer.
FLATCORE_HOST_DEVICE int64_t dot_piece_size(int64_t n) {
    constexpr int64_t kSmallestPiece = 1024;
    const int64_t size = (n + kDotPieces - 1) / kDotPieces;
    return size < kSmallestPiece ? kSmallestPiece : (size + 3) / 4 * 4;
}

// At most kDotPieces.
FLATCORE_HOST_DEVICE int64_t dot_piece_count(int64_t n) {
    const int64_t size = dot_piece_size(n);
    return (n + size - 1) / size;
}

}  // namespace flatcore::body
