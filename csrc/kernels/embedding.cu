// Rows of a grid are positions when gathering and distinct rows of the matrix when scattering. A thread owns
// a pack of such a row and passes over directions, so the index is read once for each slice of directions. It
// adds up its row's segment in order: no two threads write to the same place, whatever repeats in the index.
#include "embedding.h"

#include "cuda_grid.h"

namespace flatcore::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    gather_kernel(int64_t K, int64_t n, int64_t width, const int64_t* __restrict__ index, int64_t frozen,
                  const T* __restrict__ x, int64_t x_stride, T* __restrict__ out) {
    for (int64_t i = first_row(); i < n; i += row_stride()) {
        const int64_t chosen = index[i];
        for (int64_t j = first_column() * N; j < width; j += column_stride() * N)
            for (int64_t k = blockIdx.z; k < K; k += gridDim.z)
                store(out + (k * n + i) * width + j,
                      chosen == frozen ? Pack<T, N>{} : load<N>(x + k * x_stride + chosen * width + j));
    }
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    scatter_kernel(int64_t K, int64_t n, int64_t width, const int64_t* __restrict__ index,
                   RowSegments segments, int64_t frozen, const T* __restrict__ rows, T* __restrict__ x,
                   int64_t x_stride) {
    const int64_t* __restrict__ order = segments.order;
    for (int64_t segment = first_row(); segment < segments.count; segment += row_stride()) {
        const int64_t start = segments.starts[segment], end = segments.starts[segment + 1];
        const int64_t chosen = index[order[start]];
        if (chosen == frozen) continue;
        for (int64_t j = first_column() * N; j < width; j += column_stride() * N)
            for (int64_t k = blockIdx.z; k < K; k += gridDim.z) {
                T* target = x + k * x_stride + chosen * width + j;
                auto sum = load<N>(target);
                for (int64_t i = start; i < end; ++i) {
                    const auto term = load<N>(rows + (k * n + order[i]) * width + j);
                    for (int lane = 0; lane < N; ++lane) sum.lane[lane] += term.lane[lane];
                }
                store(target, sum);
            }
    }
}

}  // namespace

template <class T>
void gather_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, int64_t frozen, const T* x,
                 int64_t x_stride, T* out, void* stream) {
    if (K == 0 || n == 0 || width == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({x, out}, {width, x_stride}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, block] = rows_layout(n, width / N, K);
        launch(gather_kernel<N, T>, grid, block, stream, K, n, width, index, frozen, x, x_stride, out);
    });
}

template <class T>
void scatter_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, const RowSegments& segments,
                  int64_t frozen, const T* rows, T* x, int64_t x_stride, void* stream) {
    if (K == 0 || segments.count == 0 || width == 0) return;
    with_packs<T>(fits_packs<T>({rows, x}, {width, x_stride}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, block] = rows_layout(segments.count, width / N, K);
        launch(scatter_kernel<N, T>, grid, block, stream, K, n, width, index, segments, frozen, rows, x,
               x_stride);
    });
}

#define INSTANTIATE(T)                                                                                   \
    template void gather_rows(int64_t, int64_t, int64_t, const int64_t*, int64_t, const T*, int64_t, T*, \
                              void*);                                                                    \
    template void scatter_rows(int64_t, int64_t, int64_t, const int64_t*, const RowSegments&, int64_t,   \
                               const T*, T*, int64_t, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
