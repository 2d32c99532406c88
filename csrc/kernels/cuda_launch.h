// Starts a __global__ function: on the device under nvcc, in emulated threads on the host under
// FLATCORE_CUDA_SHIM. Kernel files include this and nothing else of CUDA, so the same text is compiled both
// ways.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// An array of a constant size in the memory of a block, which packs of 16 bytes may be read from: its
// elements' own alignment would leave where it begins to chance.
#define FLATCORE_SHARED(T, name, count) __shared__ __align__(16) T name[count]

// In front of a loop over arrays in registers, whose indices must be known when compiling; and of one that
// must stay a loop.
#define FLATCORE_UNROLL _Pragma("unroll")
#define FLATCORE_NO_UNROLL _Pragma("unroll 1")

namespace flatcore::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    cudaError_t status = cudaGetLastError();
#if defined(FLATCORE_SYNCHRONOUS)  // tests: the host reads the results next
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
#endif
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(status));
}

}  // namespace flatcore::cuda

#elif defined(FLATCORE_CUDA_SHIM)
#include "cuda_shim.h"
#define FLATCORE_UNROLL
#define FLATCORE_NO_UNROLL
#endif
