// Row passes between the matrix products of attention: one tile of logits, in place, in buffers that the
// products write and read. <.,.> is the inner product over a row of C elements.
//   u = dp - <p, dp>,  dz = p u
//   tp = p (tz - <p, tz>),  tdz = p (w - <p, w>)  with  w = tdp + (tz - <p, tz>) u
// The last is tdz of softmax.h with <tp, dp> = <tp, u>, which holds because the elements of tp sum to zero.
#pragma once

#include <cstdint>

namespace flatcore {

// z is (heads, rows, C), the rows those from `first` on: row i keeps its first i + 1 logits, the rest becomes
// -infinity.
template <class T>
void causal_mask(int64_t heads, int64_t rows, int64_t C, int64_t first, T* z);

// What all directions share. dp becomes u.
template <class T>
void attention_backward(int64_t rows, int64_t C, const T* p, T* dp, T* dz);

// One direction. tz becomes tp; tdp becomes tdz, and is not read where `tdp_is_zero`.
template <class T>
void attention_second_order(int64_t rows, int64_t C, const T* p, const T* u, bool tdp_is_zero, T* tz, T* tdp);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same three on a device; `stream` is a cudaStream_t.
template <class T>
void causal_mask(int64_t heads, int64_t rows, int64_t C, int64_t first, T* z, void* stream);
template <class T>
void attention_backward(int64_t rows, int64_t C, const T* p, T* dp, T* dz, void* stream);
template <class T>
void attention_second_order(int64_t rows, int64_t C, const T* p, const T* u, bool tdp_is_zero, T* tz, T* tdp,
                            void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
