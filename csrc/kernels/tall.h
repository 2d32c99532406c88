// Inner products and combinations of a few long rows, X (p, P) and Y (m, P) with P in the millions. An
// entry's neighbours in its row lie beside it; from row to row it is a stride. X and Y are apart or, in
// tall_gram, the same. Sums over P are kept in double; those over m are not, which is small.
#pragma once

#include <cstdint>

namespace flatcore {

// Numbers that tall_gram needs room for.
int64_t tall_gram_workspace(int64_t p, int64_t m, int64_t P);

// out = X Yᵀ, (p, m), contiguous.
template <class T>
void tall_gram(int64_t p, int64_t m, int64_t P, const T* X, int64_t X_stride, const T* Y, int64_t Y_stride,
               double* workspace, double* out);

// X -= B Y, with B (p, m), contiguous.
template <class T>
void tall_update(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                 int64_t X_stride);

// X = B Y
template <class T>
void tall_combine(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                  int64_t X_stride);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same three on a device; `stream` is a cudaStream_t.
template <class T>
void tall_gram(int64_t p, int64_t m, int64_t P, const T* X, int64_t X_stride, const T* Y, int64_t Y_stride,
               double* workspace, double* out, void* stream);
template <class T>
void tall_update(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                 int64_t X_stride, void* stream);
template <class T>
void tall_combine(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                  int64_t X_stride, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
