// Whether arrays are equal byte for byte: many pairs of them in one launch.
#pragma once

#include <cstdint>

#include "macros.h"

namespace flatcore {

// Of one launch, whose arguments may take 4 KB.
constexpr int64_t kPairsAtOnce = 100;

struct PairOfArrays {
    const unsigned char* first;
    const unsigned char* second;
    int64_t bytes;
};

struct PairsOfArrays {
    int64_t count = 0;
    PairOfArrays pairs[kPairsAtOnce];
};

// *different becomes 1 where the arrays of any pair differ, else it stays as it is.
void find_difference(const PairsOfArrays& arrays, int* different);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same on a device; `stream` is a cudaStream_t.
void find_difference(const PairsOfArrays& arrays, int* different, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
