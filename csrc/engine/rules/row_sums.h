// Sums over rows that a kernel left in pieces (kernels/row_pieces.h), on their way to the inputs they are of.
#pragma once

#include "engine/rule.h"

namespace flatcore {

struct RowSums {
    int input;
    at::Tensor pieces;  // (K, kRowPieces, C), double; undefined: nothing
};

// Adds the sums of the pieces to the adjoint-tangents of two inputs (C), by one kernel for both.
void add_row_sums(Directions& d, const RowSums& first, const RowSums& second);

}  // namespace flatcore
