// Inner products of rows, for .cu files.
#pragma once

#include <algorithm>

#include "cuda_launch.h"
#include "fused_attention.h"

namespace flatcore::cuda {

inline constexpr int kRowThreads = 256;

// out_n = <a_n, b> of each row + base_n, a warp a row. a or base may be null.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    row_products_kernel(int64_t K, int64_t rows, int64_t width, DirectionArray<const T> a,
                        const T* __restrict__ b, const T* base, T* out) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t warps = int64_t{gridDim.x} * (kRowThreads / 32);
    for (int64_t i = int64_t{blockIdx.x} * (kRowThreads / 32) + threadIdx.x / 32; i < K * rows; i += warps) {
        T sum = 0;
        if (a.data) {
            const T* of_a = a.data + i / rows * a.stride + i % rows * width;
            const T* of_b = b + i % rows * width;
            for (int64_t c = lane; c < width; c += 32) sum += of_a[c] * of_b[c];
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        }
        if (lane == 0) out[i] = base ? sum + base[i] : sum;
    }
}

template <class T>
void row_products(int64_t K, int64_t rows, int64_t width, DirectionArray<const T> a, const T* b,
                  const T* base, T* out, void* stream) {
    constexpr int64_t kWarps = kRowThreads / 32, kBlocks = 4096;
    if (K * rows == 0) return;
    const int64_t blocks = std::min((K * rows + kWarps - 1) / kWarps, kBlocks);
    launch(row_products_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads), stream, K, rows,
           width, a, b, base, out);
}

}  // namespace flatcore::cuda
