// Softmax over rows of C elements through the sweeps; p = softmax(z), <.,.> the inner product over a row.
//   tp  = p (tz - <p, tz>)
//   dz  = p (dp - <p, dp>)
//   tdz = p (tdp - <p, tdp> - <tp, dp>) + tp (dp - <p, dp>)
// p, dp are (rows, C); directions (K, rows, C); all contiguous.
#pragma once

#include <cstdint>

namespace flatcore {

// p may be z. log_sum, (rows), is logsumexp of each row; may be null. A row of -infinities alone becomes
// zeros.
template <class T>
void softmax_forward(int64_t rows, int64_t C, const T* z, T* p, T* log_sum);

// tp may be tz.
template <class T>
void softmax_tangent(int64_t K, int64_t rows, int64_t C, const T* p, const T* tz, T* tp);

// tdp may be null (zero); dp and tz may be null together (no second-derivative terms). tdz may be tdp or tz.
template <class T>
void softmax_adjoint(int64_t K, int64_t rows, int64_t C, const T* p, const T* tdp, const T* dp, const T* tz,
                     T* tdz);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same three on a device; `stream` is a cudaStream_t.
template <class T>
void softmax_forward(int64_t rows, int64_t C, const T* z, T* p, T* log_sum, void* stream);
template <class T>
void softmax_tangent(int64_t K, int64_t rows, int64_t C, const T* p, const T* tz, T* tp, void* stream);
template <class T>
void softmax_adjoint(int64_t K, int64_t rows, int64_t C, const T* p, const T* tdp, const T* dp, const T* tz,
                     T* tdz, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
