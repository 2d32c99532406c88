// The CUDA grids over the loop bodies of pointwise.inl. A thread owns a pack of elements, 16 bytes where
// sizes and pointers allow and one element otherwise, and passes over directions, so d1 and h come from
// memory once for each slice of directions.
#include "pointwise.h"

#include "cuda_grid.h"
#include "pointwise.inl"

namespace flatcore::cuda {
namespace {

template <int N, class F, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    forward_kernel(F f, int64_t n, const T* __restrict__ z, T* __restrict__ y, T* __restrict__ d1,
                   T* __restrict__ d2) {
    for (int64_t i = first_element() * N; i < n; i += element_stride() * N) {
        const Pack<T, N> z_pack = load<N>(z + i);
        Pack<T, N> y_pack, d1_pack, d2_pack;
        for (int lane = 0; lane < N; ++lane)
            body::unary_forward(lane, f, z_pack.lane, y_pack.lane, d1_pack.lane, d2_pack.lane);
        store(y + i, y_pack);
        store(d1 + i, d1_pack);
        if constexpr (F::curved) store(d2 + i, d2_pack);
    }
}

template <int N, bool First, bool Second, bool Accumulate, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    adjoint_kernel(int64_t K, int64_t n, const T* __restrict__ d1, const T* __restrict__ td,
                   const T* __restrict__ h, const T* __restrict__ t, T* __restrict__ out) {
    for (int64_t i = first_element() * N; i < n; i += element_stride() * N) {
        const auto d1_pack = load_or_zero<First, N>(d1, i), h_pack = load_or_zero<Second, N>(h, i);
        for (int64_t k = blockIdx.y; k < K; k += gridDim.y) {
            const int64_t at = k * n + i;
            const auto td_pack = load_or_zero<First, N>(td, at), t_pack = load_or_zero<Second, N>(t, at);
            auto out_pack = load_or_zero<Accumulate, N>(out, at);
            for (int lane = 0; lane < N; ++lane) {
                const T value =
                    body::adjoint<First, Second>(lane, d1_pack.lane, td_pack.lane, h_pack.lane, t_pack.lane);
                out_pack.lane[lane] = Accumulate ? out_pack.lane[lane] + value : value;
            }
            store(out + at, out_pack);
        }
    }
}

template <bool First, bool Second, bool Accumulate, class T>
void launch_adjoint(int64_t K, int64_t n, const T* d1, const T* td, const T* h, const T* t, T* out,
                    void* stream) {
    if (n == 0 || K == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({d1, td, h, t, out}, {n}), [&](auto lanes) {
        constexpr int N = lanes.value;
        launch(adjoint_kernel<N, First, Second, Accumulate, T>, elements_grid(n / N, K), dim3(kThreads),
               stream, K, n, d1, td, h, t, out);
    });
}

}  // namespace

template <class T>
void unary_forward(Function function, const Constants& constants, int64_t n, const T* z, T* y, T* d1, T* d2,
                   void* stream) {
    if (n == 0) return;
    const bool fit = fits_packs<T>({z, y, d1, d2}, {n});
    visit_function(function, constants, [&](const auto& f) {
        using F = std::decay_t<decltype(f)>;
        with_packs<T>(fit, [&](auto lanes) {
            constexpr int N = lanes.value;
            launch(forward_kernel<N, F, T>, elements_grid(n / N, 1), dim3(kThreads), stream, f, n, z, y, d1,
                   d2);
        });
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
