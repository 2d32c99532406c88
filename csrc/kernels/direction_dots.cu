// Two passes: a block for each piece of each direction leaves its sum in the workspace, then a warp for each
// direction adds them.
#include "direction_dots.h"

#include "cuda_grid.h"
#include "direction_dots.inl"

namespace flatcore::cuda {
namespace {

template <int N, bool Weighted, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    pieces_kernel(int64_t pieces, int64_t n, const T* __restrict__ w, const T* __restrict__ a,
                  int64_t a_stride, const T* __restrict__ b, int64_t b_stride,
                  double* __restrict__ workspace) {
    FLATCORE_SHARED(double, sums, kThreads / kWarp);
    const int64_t k = blockIdx.x / pieces, size = body::dot_piece_size(n), start = blockIdx.x % pieces * size;
    const int64_t end = start + size < n ? start + size : n;
    double sum = 0;
    for (int64_t i = start + threadIdx.x * N; i < end; i += kThreads * N) {
        const auto weight = load_or_zero<Weighted, N>(w, i);
        const auto left = load<N>(a + k * a_stride + i), right = load<N>(b + k * b_stride + i);
        for (int lane = 0; lane < N; ++lane)
            sum += Weighted ? body::dot_term(weight.lane[lane], left.lane[lane], right.lane[lane])
                            : body::dot_term(left.lane[lane], right.lane[lane]);
    }
    sum = sum_along_x(sum, sums);
    if (threadIdx.x == 0) workspace[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_pieces_kernel(int64_t K, int64_t pieces, const double* __restrict__ workspace,
                      double* __restrict__ out) {
    FLATCORE_SHARED(double, sums, kThreads / kWarp);
    const int64_t k = first_row();
    double sum = 0;
    for (int64_t i = threadIdx.x; k < K && i < pieces; i += kWarp) sum += workspace[k * pieces + i];
    sum = sum_along_x(sum, sums);
    if (k < K && threadIdx.x == 0) out[k] += sum;
}

template <bool Weighted, class T>
void add_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
              double* workspace, double* out, void* stream) {
    if (K == 0 || n == 0) return;  // an empty grid is an error
    const int64_t pieces = body::dot_piece_count(n), down = kThreads / kWarp;
    const dim3 grid(static_cast<unsigned>(K * pieces));
    with_packs<T>(fits_packs<T>({w, a, b}, {n, a_stride, b_stride}), [&](auto lanes) {
        launch(pieces_kernel<lanes.value, Weighted, T>, grid, dim3(kThreads), stream, pieces, n, w, a,
               a_stride, b, b_stride, workspace);
    });
    launch(add_pieces_kernel, dim3(static_cast<unsigned>(ceil_div(K, down))),
           dim3(kWarp, static_cast<unsigned>(down)), stream, K, pieces, workspace, out);
}

}  // namespace

template <class T>
void direction_dots(int64_t K, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                    double* workspace, double* out, void* stream) {
    const T* absent = nullptr;
    add_dots<false>(K, n, absent, a, a_stride, b, b_stride, workspace, out, stream);
}

template <class T>
void weighted_direction_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b,
                             int64_t b_stride, double* workspace, double* out, void* stream) {
    add_dots<true>(K, n, w, a, a_stride, b, b_stride, workspace, out, stream);
}

#define INSTANTIATE(T)                                                                                      \
    template void direction_dots(int64_t, int64_t, const T*, int64_t, const T*, int64_t, double*, double*,  \
                                 void*);                                                                    \
    template void weighted_direction_dots(int64_t, int64_t, const T*, const T*, int64_t, const T*, int64_t, \
                                          double*, double*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
