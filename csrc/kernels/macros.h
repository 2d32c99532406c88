// Markers that let one formula serve the CPU and CUDA, and one CPU loop serve several instruction sets.
#pragma once

#if defined(__CUDACC__)
#define FLATCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLATCORE_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The compiler emits the function three times and picks at load time, so one binary serves every x86-64
// machine. A lambda is not cloned: put the mark on leaf functions over raw pointers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FLATCORE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FLATCORE_CLONES
#endif
