// Pointwise functions y = f(z) through the four sweeps, for K directions at once.
//   forward          y = f(z), d1 = f'(z), d2 = f''(z)                                  arrays of n
//   tangent          ty_k = d1 tz_k                                                     (K, n)
//   adjoint-tangent  tdz_k = d1 tdy_k + h tz_k, with h = d2 dy from the backward sweep  (K, n)
// d1 and h are read once for all K. All arrays are contiguous; K is the slow axis.
#pragma once

#include <cstdint>

#include "functions.h"

namespace flatcore {

// True where f'' is not identically zero, so that d2 must be stored.
bool is_curved(Function function);

// d2 may be null when the function is not curved.
template <class T>
void unary_forward(Function function, const Constants& constants, int64_t n, const T* z, T* y, T* d1, T* d2);

// out_k = d t_k
template <class T>
void scale_directions(int64_t K, int64_t n, const T* d, const T* t, T* out);

// out_k (+)= d1 td_k + h t_k. Either pair (d1, td) or (h, t) may be null, not both.
template <class T>
void adjoint_directions(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t,
                        bool accumulate, T* out);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same three on a device; `stream` is a cudaStream_t.
template <class T>
void unary_forward(Function function, const Constants& constants, int64_t n, const T* z, T* y, T* d1, T* d2,
                   void* stream);
template <class T>
void scale_directions(int64_t K, int64_t n, const T* d, const T* t, T* out, void* stream);
template <class T>
void adjoint_directions(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t,
                        bool accumulate, T* out, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
