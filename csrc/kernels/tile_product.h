// Products of tiles by a block of threads: what its two ways have in common, with sums in registers. For .cu
// files.
//
//   sums (tile x other) += A (tile x inner) B' (other x inner)
//   sums (tile x width) += S (tile x other) B (other x width)
//
// where A and B are rows of matrices in global memory and S are sums of before. A block owns `kTile` rows of
// one side and passes over tiles of `kOther` rows of the other. How numbers are kept, multiplied and added is
// a type, PlainProduct<T, W> (plain_product.h) or TensorProduct<Format, W> (tensor_product.h), for rows of up
// to W elements. It has
//
//   Element, kTile, kOther; kThreads of a block and kBlocks that a processor should hold
//   kDirections, how many at once share what does not depend on them
//   kRows, kColumns<N>, row(i), column(j): which elements of the sums a thread owns, so that the caller works
//       on them where they are; kSharers, neighbouring lanes that have the same rows, of which this is
//       sharer()
//   Tiles: the memory of a block, kBytes of it, and the products
#pragma once

#include <algorithm>

#include "cuda_grid.h"

namespace flatcore::cuda {

// What every device since compute capability 8.0 lets a block have: 8.6, 8.9 and 12.0 no more.
inline constexpr int kLargestShared = 99 * 1024;

inline constexpr int kOperands = 4;  // that a side has at most

// A thread's part of (tile, N) sums.
template <class Product, int N>
struct Sums {
    using Element = typename Product::Element;
    static constexpr int kRows = Product::kRows, kColumns = Product::template kColumns<N>;
    Element value[kRows][kColumns];

    static __device__ int row(int i) { return Product::row(i); }
    static __device__ int column(int j) { return Product::template column<N>(j); }

    // f(i, j) for all elements
    template <class F>
    static __device__ void each(const F& f) {
        FLATCORE_UNROLL
        for (int i = 0; i < kRows; ++i) {
            FLATCORE_UNROLL
            for (int j = 0; j < kColumns; ++j) f(i, j);
        }
    }
    __device__ void zero() {
        each([&](int i, int j) { value[i][j] = 0; });
    }
};

// Up to `tile` rows of a (count, width) matrix in global memory, `stride` apart, from row `first` on. What
// lies outside is zero. Places within a tile are 32 bits, which saves registers.
template <class T>
struct MatrixRows {
    static constexpr int kPack = 16 / sizeof(T);
    using Elements = Pack<T, kPack>;
    const T* data;  // of row `first`
    int rows, width, stride;
    bool aligned;  // rows are whole packs of 16 bytes

    __device__ MatrixRows(const T* matrix, int64_t first, int64_t count, int64_t row_width,
                          int64_t row_stride, int tile)
        : data(matrix + first * row_stride),
          rows(count - first < tile ? static_cast<int>(count - first) : tile),
          width(static_cast<int>(row_width)), stride(static_cast<int>(row_stride)),
          aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % kPack == 0 && stride % kPack == 0) {}

    __device__ Elements pack(int row, int column) const {
        Elements result{};
        if (row >= rows || column >= width) return result;
        const T* from = data + (row * stride + column);
        if (aligned) return load<kPack>(from);
        FLATCORE_UNROLL
        for (int l = 0; l < kPack; ++l)
            if (column + l < width) result.lane[l] = from[l];
        return result;
    }
};

// Units of work dealt out to the threads: f(u, unit) for the u-th of this thread.
template <int Threads, int Units, class F>
__device__ void each_unit(const F& f) {
    FLATCORE_UNROLL
    for (int u = 0; u * Threads < Units; ++u) {
        const int unit = static_cast<int>(threadIdx.x) + u * Threads;
        if ((u + 1) * Threads <= Units || unit < Units) f(u, unit);
    }
}

// f(x) for the lanes of this warp, this one's number xor x, with which those that share its rows exchange
// what they have, so that each ends with the whole. All lanes must call it.
template <class Product, class F>
__device__ void over_sharers(const F& f) {
    FLATCORE_UNROLL
    for (int other = Product::kSharers / 2; other > 0; other /= 2) f(other);
}

// f(results[n], n), where n is known at run time and the results lie in registers.
template <class Result, int Count, class F>
__device__ void with_result(Result (&results)[Count], int n, const F& f) {
    FLATCORE_UNROLL
    for (int i = 0; i < Count; ++i)
        if (i == n) f(results[i], i);
}

}  // namespace flatcore::cuda
