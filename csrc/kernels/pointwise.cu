// The CUDA grids over the loop bodies of pointwise.inl. A thread owns an element and passes over directions,
// so d1 and h come from memory once for each slice of directions; the grid's y axis cuts K into slices where
// n alone is too small.
#include <algorithm>

#include "cuda_launch.h"
#include "pointwise.h"
#include "pointwise.inl"

namespace flatcore::cuda {
namespace {

constexpr int64_t kThreads = 256;
// Leaves 64 registers a thread; without it ptxas stays at 32 and spills for 1/z in double.
constexpr int kBlocksPerProcessor = 4;
constexpr int64_t kBlocks = 1024;  // some waves on every device; what is left is done by striding
constexpr int64_t kMaxSlices = 65535;

FLATCORE_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int64_t first_element() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t element_stride() { return int64_t{gridDim.x} * blockDim.x; }

template <class F, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    forward_kernel(F f, int64_t n, const T* __restrict__ z, T* __restrict__ y, T* __restrict__ d1,
                   T* __restrict__ d2) {
    for (int64_t i = first_element(); i < n; i += element_stride()) body::unary_forward(i, f, z, y, d1, d2);
}

template <bool First, bool Second, bool Accumulate, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adjoint_kernel(int64_t K, int64_t n, const T* __restrict__ d1, const T* __restrict__ td,
                   const T* __restrict__ h, const T* __restrict__ t, T* __restrict__ out) {
    for (int64_t i = first_element(); i < n; i += element_stride()) {
        for (int64_t k = blockIdx.y; k < K; k += gridDim.y) {
            const int64_t offset = k * n;
            const T value = body::adjoint<First, Second>(i, d1, First ? td + offset : nullptr, h,
                                                         Second ? t + offset : nullptr);
            out[offset + i] = Accumulate ? out[offset + i] + value : value;
        }
    }
}

dim3 grid_for(int64_t n, int64_t K) {
    const int64_t x = std::min(ceil_div(n, kThreads), kBlocks);
    const int64_t y = std::min({K, ceil_div(kBlocks, x), kMaxSlices});
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

template <bool First, bool Second, bool Accumulate, class T>
void launch_adjoint(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t, T* out,
                    void* stream) {
    if (n == 0 || K == 0) return;  // an empty grid is an error
    launch(adjoint_kernel<First, Second, Accumulate, T>, grid_for(n, K), dim3(kThreads), stream, K, n, d1, td,
           h, t, out);
}

}  // namespace

template <class T>
void unary_forward(Function function, const Constants& constants, int64_t n, const T* z, T* y, T* d1, T* d2,
                   void* stream) {
    if (n == 0) return;
    visit_function(function, constants, [&](const auto& f) {
        using F = std::decay_t<decltype(f)>;
        launch(forward_kernel<F, T>, grid_for(n, 1), dim3(kThreads), stream, f, n, z, y, d1, d2);
    });
}

template <class T>
void scale_directions(int64_t K, int64_t n, const T* d, const T* t, T* out, void* stream) {
    const T* absent = nullptr;
    launch_adjoint<true, false, false>(K, n, d, t, absent, absent, out, stream);
}

template <class T>
void adjoint_directions(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t,
                        bool accumulate, T* out, void* stream) {
    const auto run = [&](auto first, auto second) {
        if (accumulate)
            launch_adjoint<first.value, second.value, true>(K, n, d1, td, h, t, out, stream);
        else
            launch_adjoint<first.value, second.value, false>(K, n, d1, td, h, t, out, stream);
    };
    if (td && h)
        run(std::true_type{}, std::true_type{});
    else if (td)
        run(std::true_type{}, std::false_type{});
    else
        run(std::false_type{}, std::true_type{});
}

#define INSTANTIATE(T)                                                                                   \
    template void unary_forward(Function, const Constants&, int64_t, const T*, T*, T*, T*, void*);       \
    template void scale_directions(int64_t, int64_t, const T*, const T*, T*, void*);                     \
    template void adjoint_directions(int64_t, int64_t, const T*, const T*, const T*, const T*, bool, T*, \
                                     void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
