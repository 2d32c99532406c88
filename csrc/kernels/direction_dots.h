// Dot products of K pairs of vectors, added to K numbers in double: the terms of quadratic forms. a and b are
// (K, n), contiguous within a direction, with a stride between directions each (0 where all directions share
// one); they may be the same array. The result depends on the numbers alone, not on threads or the grid: each
// vector is cut in at most kDotPieces pieces, by n alone, whose sums are added in a second pass.
#pragma once

#include <cstdint>

namespace flatcore {

constexpr int64_t kDotPieces = 256;  // the workspace holds as many doubles for each direction

// out[k] += sum_i a[k, i] b[k, i]
template <class T>
void direction_dots(int64_t K, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                    double* workspace, double* out);

// out[k] += sum_i w[i] a[k, i] b[k, i], the form of an elementwise second derivative w
template <class T>
void weighted_direction_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b,
                             int64_t b_stride, double* workspace, double* out);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same two on a device; `stream` is a cudaStream_t. Within a piece terms are added in another order.
template <class T>
void direction_dots(int64_t K, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                    double* workspace, double* out, void* stream);
template <class T>
void weighted_direction_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b,
                             int64_t b_stride, double* workspace, double* out, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
