// Sums over the rows of (K, rows, C) arrays, for gradients of per-column weights and biases, in the pieces of
// row_pieces.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "row_pieces.h"

namespace flatcore {

// For every direction k and piece, first[k, piece, :] and second[k, piece, :] (C each; either may be null)
// become the sums that add(k, row, first, second) makes by adding to them, row after row.
template <class Add>
void sum_rows(int64_t K, int64_t rows, int64_t C, double* first, double* second, const Add& add) {
    const int64_t piece_rows = rows_in_piece(rows);
    parallel_for(0, K * kRowPieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t k = task / kRowPieces, piece = task % kRowPieces;
            double* one = first ? first + task * C : nullptr;
            double* two = second ? second + task * C : nullptr;
            if (one) std::fill(one, one + C, 0.0);
            if (two) std::fill(two, two + C, 0.0);
            const int64_t last = std::min(rows, (piece + 1) * piece_rows);
            for (int64_t row = piece * piece_rows; row < last; ++row) add(k, row, one, two);
        }
    });
}

}  // namespace flatcore
