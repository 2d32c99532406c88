// How sums over the rows of (K, rows, C) arrays are cut, on every device: in kRowPieces pieces that do not
// depend on the number of threads, so the result does not either. The sums of the pieces are (K, kRowPieces,
// C) in double, so that the number of rows does not enter the rounding error.
#pragma once

#include <cstdint>

#include "macros.h"

namespace flatcore {

constexpr int64_t kRowPieces = 8;

// The last pieces may have fewer rows, or none.
FLATCORE_HOST_DEVICE int64_t rows_in_piece(int64_t rows) { return (rows + kRowPieces - 1) / kRowPieces; }

}  // namespace flatcore
