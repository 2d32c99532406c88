// The sums of row_sums.h on a device. A block owns a piece of one direction's rows and a few columns: eight
// floats are the 32 bytes that memory gives at least, and no more than that, so that even 64 columns of one
// direction make 64 blocks. Threads down a block take rows in turn; their sums are added as a binary tree, in
// the same order whatever the grid.
#pragma once

#include "cuda_grid.h"
#include "row_pieces.h"

namespace flatcore::cuda {

constexpr int kSumColumns = 8;
constexpr int kSumRows = 64;

// first[k, piece, c] and second[k, piece, c] (either may be null) become the sums of what
// add(k, row, c, one, two) adds to its last two arguments.
template <class Add>
__global__ void __launch_bounds__(kSumColumns* kSumRows, 1)
    sum_rows_kernel(int64_t rows, int64_t C, double* first, double* second, Add add) {
    FLATCORE_SHARED(double, ones, kSumColumns* kSumRows);
    FLATCORE_SHARED(double, twos, kSumColumns* kSumRows);
    const int t = static_cast<int>(threadIdx.y * kSumColumns + threadIdx.x);
    const int64_t tiles = ceil_div(C, kSumColumns), task = blockIdx.x / tiles;
    const int64_t c = blockIdx.x % tiles * kSumColumns + threadIdx.x;
    const int64_t piece_rows = rows_in_piece(rows), start = task % kRowPieces * piece_rows;
    const int64_t last = start + piece_rows < rows ? start + piece_rows : rows;
    double one = 0, two = 0;
    if (c < C)
        for (int64_t row = start + threadIdx.y; row < last; row += kSumRows)
            add(task / kRowPieces, row, c, one, two);
    ones[t] = one;
    twos[t] = two;
    for (int half = kSumColumns * kSumRows / 2; half >= kSumColumns; half /= 2) {
        __syncthreads();
        if (t < half) {
            ones[t] += ones[t + half];
            twos[t] += twos[t + half];
        }
    }
    if (threadIdx.y == 0 && c < C) {
        if (first) first[task * C + c] = ones[t];
        if (second) second[task * C + c] = twos[t];
    }
}

template <class Add>
void sum_rows(int64_t K, int64_t rows, int64_t C, double* first, double* second, const Add& add,
              void* stream) {
    if (K == 0 || C == 0) return;  // an empty grid is an error
    const auto blocks = static_cast<unsigned>(K * kRowPieces * ceil_div(C, kSumColumns));
    launch(sum_rows_kernel<Add>, dim3(blocks), dim3(kSumColumns, kSumRows), stream, rows, C, first, second,
           add);
}

}  // namespace flatcore::cuda
