// Rows of a matrix chosen by an index (an embedding) and the transpose, for K directions at once. Arrays of
// rows are (K, n, width), contiguous. The matrix is (vocabulary, width), contiguous, with a stride between
// directions, for it lies in the flat vector. Row `frozen` (an embedding's padding; -1 for none) is a
// constant. The index is not checked; no array overlaps another.
#pragma once

#include <cstdint>

namespace flatcore {

// Where each row of the matrix is read, prepared once for an index and used in every sweep: `order` lists the
// positions 0 ... n - 1 sorted by their index, equal ones in ascending order (a stable sort's permutation),
// and order[starts[s]] ... order[starts[s + 1] - 1] are those of one row, the s-th of `count` distinct ones.
// `starts` has count + 1 elements, from 0 to n.
struct RowSegments {
    int64_t count;
    const int64_t* order;
    const int64_t* starts;
};

// out[k, i, :] = x[k, index[i], :], zeros where the index is `frozen`
template <class T>
void gather_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, int64_t frozen, const T* x,
                 int64_t x_stride, T* out);

// x[k, index[i], :] += rows[k, i, :] in the order of i, nothing where the index is `frozen`
template <class T>
void scatter_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, const RowSegments& segments,
                  int64_t frozen, const T* rows, T* x, int64_t x_stride);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same two on a device; `stream` is a cudaStream_t. The additions are the CPU's in the CPU's order.
template <class T>
void gather_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, int64_t frozen, const T* x,
                 int64_t x_stride, T* out, void* stream);
template <class T>
void scatter_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, const RowSegments& segments,
                  int64_t frozen, const T* rows, T* x, int64_t x_stride, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
