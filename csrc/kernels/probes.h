// Counter-based random rows (counter.h): an element depends on (seed, row, element) alone.
#pragma once

#include <cstdint>

namespace flatcore {

// out (K, P), contiguous: independent signs, +1 or -1 with probability 1/2 each; row k is probe number
// first + k.
template <class T>
void rademacher_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out);

// out (K, P), contiguous: independent standard normal numbers (Box-Muller); row k is row number first + k.
template <class T>
void normal_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same two on a device; `stream` is a cudaStream_t. Signs are the CPU's bit for bit. Normal numbers come
// from the same bits, but through the device's log, sqrt, sin and cos, each within a few ulp of the CPU's in
// double, so they may differ in the last digits.
template <class T>
void rademacher_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out, void* stream);
template <class T>
void normal_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
