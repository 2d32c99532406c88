// How threads are laid over arrays of elements or rows, and 16-byte accesses; shared by the kernel files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda_launch.h"
#include "macros.h"

namespace flatcore::cuda {

constexpr int64_t kThreads = 256;
constexpr int kWarp = 32;
// Leaves 64 registers a thread, 128 where it computes in double; without it ptxas stays at 32 and spills for
// 1/z in double.
template <class T>
constexpr int kBlocksPerProcessor = sizeof(T) == 8 ? 2 : 4;
constexpr int64_t kBlocks = 1024;  // some waves on every device; what is left is done by striding
constexpr int64_t kMaxSlices = 65535;

FLATCORE_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads along x own elements; the y axis cuts the K directions into slices where n alone is too small.
inline dim3 elements_grid(int64_t n, int64_t K) {
    const int64_t x = std::min(ceil_div(n, kThreads), kBlocks);
    const int64_t y = std::min({K, ceil_div(kBlocks, x), kMaxSlices});
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

__device__ inline int64_t first_element() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t element_stride() { return int64_t{gridDim.x} * blockDim.x; }

// Rows of `width` items (packs or elements), K times: x of a block goes along a row, as wide as one row can
// use, so that short rows share a block; y of a block and x of the grid go over rows, y of the grid over the
// rest of a long row, z over slices of the K directions. No thread has to divide.
struct RowsLayout {
    dim3 grid, block;
};

inline RowsLayout rows_layout(int64_t rows, int64_t width, int64_t K) {
    int64_t across = 1;
    while (across < width && across < kThreads) across *= 2;
    const int64_t down = kThreads / across;
    const int64_t x = std::min(ceil_div(rows, down), kBlocks);
    const int64_t y = std::min(ceil_div(width, across), ceil_div(kBlocks, x));
    const int64_t z = std::min({K, ceil_div(kBlocks, x * y), kMaxSlices});
    return {dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)),
            dim3(static_cast<unsigned>(across), static_cast<unsigned>(down))};
}

__device__ inline int64_t first_row() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ inline int64_t row_stride() { return int64_t{gridDim.x} * blockDim.y; }
__device__ inline int64_t first_column() { return int64_t{blockIdx.y} * blockDim.x + threadIdx.x; }
__device__ inline int64_t column_stride() { return int64_t{gridDim.y} * blockDim.x; }

// The sum over the threads along x of a block, a multiple of a warp, where x is 0: lanes add as a binary
// tree, then warps in their order. All threads of the block must call it; `sums` is shared, a place for each
// warp.
__device__ inline double sum_along_x(double sum, double* sums) {
    const int x = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
    double* of_row = sums + static_cast<int>(threadIdx.y) * warps;
    for (int step = kWarp / 2; step > 0; step /= 2)
        sum += __shfl_down_sync(~0u, sum, static_cast<unsigned>(step));
    if (x % kWarp == 0) of_row[x / kWarp] = sum;
    __syncthreads();
    if (x == 0)
        for (int warp = 1; warp < warps; ++warp) sum += of_row[warp];
    __syncthreads();  // what comes next must not arrive before these are read
    return sum;
}

// Neighbours that one instruction loads or stores.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T lane[N];
};

template <int N, class T>
__device__ inline Pack<T, N> load(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}

// Nothing but zeros where the array is absent.
template <bool Present, int N, class T>
__device__ inline Pack<T, N> load_or_zero(const T* p, int64_t i) {
    if constexpr (Present) return load<N>(p + i);
    return {};
}

// From any address.
template <int N, class T>
__device__ inline Pack<T, N> load_singly(const T* p) {
    Pack<T, N> result;
    for (int lane = 0; lane < N; ++lane) result.lane[lane] = p[lane];
    return result;
}

template <class T, int N>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Whether packs of 16 bytes may be used: every pointer (null ones are not accessed) and every length or
// stride that offsets are multiples of must be a multiple of a pack.
template <class T>
bool fits_packs(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> lengths) {
    return std::ranges::all_of(pointers, [](auto* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }) &&
           std::ranges::all_of(lengths, [](int64_t n) { return n % int64_t{16 / sizeof(T)} == 0; });
}

struct Division {
    int64_t quotient, remainder;
};
// Of numbers that are not negative. That of 64 bits is slow, and not done where 32 hold them.
FLATCORE_HOST_DEVICE Division divide(int64_t a, int64_t b) {
    const bool narrow = (a | b) >> 32 == 0;
    const int64_t quotient = narrow ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
    return {quotient, a - quotient * b};
}

// body(std::integral_constant<int, N>) with N elements in a pack: 16 bytes where they fit, else one.
template <class T, class Body>
void with_packs(bool fit, const Body& body) {
    if (fit)
        body(std::integral_constant<int, 16 / sizeof(T)>{});
    else
        body(std::integral_constant<int, 1>{});
}

}  // namespace flatcore::cuda
