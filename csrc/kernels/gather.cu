// Pixels are gathered by output element: a thread reads its index once and passes over directions.
//
// They are scattered by input channel: a thread owns a channel of an image in one direction and adds its
// output pixels one after another, as the CPU does. Any index is right, with no window assumed and no
// atomics, and the sums are the CPU's bit for bit. What this costs is a chain of dependent additions; it is
// shortened by taking kBatch output pixels at a time, whose loads wait for each other's sums in registers
// only.
#include "gather.h"

#include "cuda_grid.h"

namespace flatcore::cuda {
namespace {

constexpr int kBatch = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(int64_t K, PixelShape shape, const int64_t* __restrict__ index, const T* __restrict__ t,
                  T* __restrict__ result) {
    const int64_t C = shape.channels, in_size = shape.in * C, out_size = shape.out * C;
    const int64_t n = shape.images * out_size;
    for (int64_t i = first_element(); i < n; i += element_stride()) {
        const int64_t from = divide(i, out_size).quotient * in_size + index[i] * C + divide(i, C).remainder;
        for (int64_t k = blockIdx.y; k < K; k += gridDim.y)
            result[k * n + i] = t[k * shape.images * in_size + from];
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) zero_kernel(int64_t n, T* __restrict__ out) {
    for (int64_t i = first_element(); i < n; i += element_stride()) out[i] = T(0);
}

// Adds output pixels [0, Count) to a channel; choice and t begin at the first, result at input pixel 0.
template <int Count, class T>
__device__ void add_pixels(int64_t C, const int64_t* choice, const T* t, T* result) {
    int64_t pixel[Count];
    T sum[Count];
    for (int j = 0; j < Count; ++j) pixel[j] = choice[j * C];
    for (int j = 0; j < Count; ++j) sum[j] = result[pixel[j] * C];
    for (int j = 0; j < Count; ++j) {
        for (int before = 0; before < j; ++before)
            if (pixel[before] == pixel[j]) sum[j] = sum[before];
        sum[j] += t[j * C];
    }
    for (int j = 0; j < Count; ++j) result[pixel[j] * C] = sum[j];
}

// Blocks that follow each other take the same channels in all directions, so that the index is in the cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(int64_t K, PixelShape shape, const int64_t* __restrict__ index, const T* __restrict__ t,
                   T* __restrict__ result) {
    const int64_t C = shape.channels, columns = shape.images * C, tasks = ceil_div(columns, kThreads) * K;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int64_t k = task % K, column = task / K * kThreads + threadIdx.x;
        if (column >= columns) continue;
        const int64_t image = column / C, c = column % C, direction_image = k * shape.images + image;
        const int64_t* choice = index + image * shape.out * C + c;
        const T* source = t + direction_image * shape.out * C + c;
        T* target = result + direction_image * shape.in * C + c;
        int64_t o = 0;
        for (; o + kBatch <= shape.out; o += kBatch)
            add_pixels<kBatch>(C, choice + o * C, source + o * C, target);
        for (; o < shape.out; ++o) add_pixels<1>(C, choice + o * C, source + o * C, target);
    }
}

}  // namespace

template <class T>
void gather_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result,
                   void* stream) {
    const int64_t n = shape.images * shape.out * shape.channels;
    if (n == 0 || K == 0) return;  // an empty grid is an error
    launch(gather_kernel<T>, elements_grid(n, K), dim3(kThreads), stream, K, shape, index, t, result);
}

template <class T>
void scatter_pixels(int64_t K, const PixelShape& shape, const int64_t* index, const T* t, T* result,
                    void* stream) {
    const int64_t columns = shape.images * shape.channels, n = K * columns * shape.in;
    if (n == 0) return;
    launch(zero_kernel<T>, elements_grid(n, 1), dim3(kThreads), stream, n, result);
    const int64_t blocks = std::min(ceil_div(columns, kThreads) * K, kBlocks);
    launch(scatter_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, K, shape, index, t,
           result);
}

#define INSTANTIATE(T)                                                                            \
    template void gather_pixels(int64_t, const PixelShape&, const int64_t*, const T*, T*, void*); \
    template void scatter_pixels(int64_t, const PixelShape&, const int64_t*, const T*, T*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
