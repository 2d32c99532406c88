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
// The memory of a block that launch_with gave it, aligned to 16 bytes.
#define FLATCORE_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]

// In front of a loop over arrays in registers, whose indices must be known when compiling; of one that
// must stay a loop; and of one whose whole would be too long.
#define FLATCORE_UNROLL _Pragma("unroll")
#define FLATCORE_NO_UNROLL _Pragma("unroll 1")
#define FLATCORE_UNROLL_SOME _Pragma("unroll 4")

namespace flatcore::cuda {

inline void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would take it for its own
    throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(status));
}

// Each block has `bytes` of shared memory beyond the kernel's arrays of constant size.
template <class... Parameters, class... Arguments>
void launch_with(size_t bytes, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
                 Arguments... arguments) {
    constexpr size_t kWithoutAsking = 48 << 10;
    // Of a kernel and a device, so asked for at every launch: nothing has to be kept.
    if (bytes > kWithoutAsking)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
    kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
#if defined(FLATCORE_SYNCHRONOUS)  // tests: the host reads the results next
    check(cudaDeviceSynchronize());
#endif
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
    launch_with(0, kernel, grid, block, stream, arguments...);
}

}  // namespace flatcore::cuda

#elif defined(FLATCORE_CUDA_SHIM)
#include "cuda_shim.h"
#define FLATCORE_UNROLL
#define FLATCORE_NO_UNROLL
#define FLATCORE_UNROLL_SOME
#endif
