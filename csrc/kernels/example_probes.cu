// The CUDA grids over example_probes.inl. The rows of a grid are (probe, example), or (probe, example, row of
// the index); a thread makes its row's key once and the words it needs, each for itself.
//
// A dot product belongs to one warp, or, where it is long, to one block. Which of them depends on the width
// alone, and so does the order of the additions.
#include "example_probes.h"

#include "cuda_grid.h"
#include "dots.inl"
#include "example_probes.inl"

namespace flatcore::cuda {
namespace {

constexpr int64_t kShortRow = 1024;  // up to here a warp takes a row

// The signs of `count` (at most 64) elements from `element` on, in the lowest bits.
__device__ inline uint64_t sign_bits(uint64_t key, int64_t element, int64_t count) {
    const int64_t bit = element % 64;
    uint64_t bits = word(key, element / 64) >> bit;
    if (bit + count > 64) bits |= word(key, element / 64 + 1) << (64 - bit);
    return bits;
}

template <int N, class T>
__device__ inline Pack<T, N> signs(uint64_t key, int64_t element) {
    const uint64_t bits = sign_bits(key, element, N);
    Pack<T, N> result;
    for (int lane = 0; lane < N; ++lane) result.lane[lane] = body::example_sign<T>(bits >> lane);
    return result;
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    signs_kernel(ExampleBlock block, int64_t first, int64_t count, T* __restrict__ out) {
    for (int64_t row = first_row(); row < block.probes * block.examples; row += row_stride()) {
        const uint64_t key = body::example_key(block, row / block.examples, row % block.examples);
        for (int64_t j = first_column() * N; j < count; j += column_stride() * N)
            store(out + row * count + j, signs<N, T>(key, first + j));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    signs_at_kernel(ExampleBlock block, int64_t offset, const int64_t* __restrict__ elements, int64_t count,
                    T* __restrict__ out) {
    for (int64_t row = first_row(); row < block.probes * block.examples; row += row_stride()) {
        const uint64_t key = body::example_key(block, row / block.examples, row % block.examples);
        for (int64_t j = first_column(); j < count; j += column_stride())
            store(out + row * count + j, signs<1, T>(key, offset + elements[j]));
    }
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    row_signs_kernel(ExampleBlock block, int64_t offset, const int64_t* __restrict__ index, int64_t rows,
                     int64_t width, int64_t frozen, T* __restrict__ out) {
    const int64_t count = block.probes * block.examples * rows, read = block.examples * rows;
    for (int64_t row = first_row(); row < count; row += row_stride()) {
        const int64_t probe = row / read, chosen = index[row % read];
        const uint64_t key = body::example_key(block, probe, row % read / rows);
        for (int64_t j = first_column() * N; j < width; j += column_stride() * N)
            store(out + row * width + j,
                  chosen == frozen ? Pack<T, N>{} : signs<N, T>(key, offset + chosen * width + j));
    }
}

// The threads along x of a block take a row's packs in turn.
template <int N, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    row_dots_kernel(int64_t rows, int64_t width, const T* __restrict__ a, const T* __restrict__ b,
                    double* __restrict__ out) {
    FLATCORE_SHARED(double, sums, kThreads / kWarp);
    for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += row_stride()) {
        const int64_t row = first + threadIdx.y;
        double sum = 0;
        if (row < rows)
            for (int64_t j = threadIdx.x * N; j < width; j += int64_t{blockDim.x} * N) {
                const auto left = load<N>(a + row * width + j), right = load<N>(b + row * width + j);
                for (int lane = 0; lane < N; ++lane) sum += body::dot_term(left.lane[lane], right.lane[lane]);
            }
        sum = sum_along_x(sum, sums);
        if (threadIdx.x == 0 && row < rows) out[row] = sum;
    }
}

}  // namespace

template <class T>
void example_signs(const ExampleBlock& block, int64_t first, int64_t count, T* out, void* stream) {
    const int64_t rows = block.probes * block.examples;
    if (rows == 0 || count == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({out}, {count}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, threads] = rows_layout(rows, count / N, 1);
        launch(signs_kernel<N, T>, grid, threads, stream, block, first, count, out);
    });
}

template <class T>
void example_signs_at(const ExampleBlock& block, int64_t offset, const int64_t* elements, int64_t count,
                      T* out, void* stream) {
    const int64_t rows = block.probes * block.examples;
    if (rows == 0 || count == 0) return;
    const auto [grid, threads] = rows_layout(rows, count, 1);
    launch(signs_at_kernel<T>, grid, threads, stream, block, offset, elements, count, out);
}

template <class T>
void example_row_signs(const ExampleBlock& block, int64_t offset, const int64_t* index, int64_t rows,
                       int64_t width, int64_t frozen, T* out, void* stream) {
    const int64_t count = block.probes * block.examples * rows;
    if (count == 0 || width == 0) return;
    with_packs<T>(fits_packs<T>({out}, {width}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, threads] = rows_layout(count, width / N, 1);
        launch(row_signs_kernel<N, T>, grid, threads, stream, block, offset, index, rows, width, frozen, out);
    });
}

template <class T>
void row_dots(int64_t rows, int64_t width, const T* a, const T* b, double* out, void* stream) {
    if (rows == 0) return;  // a width of 0 gives zeros
    const int64_t across = width <= kShortRow ? kWarp : kThreads, down = kThreads / across;
    const dim3 threads(static_cast<unsigned>(across), static_cast<unsigned>(down));
    const dim3 grid(static_cast<unsigned>(std::min(ceil_div(rows, down), kBlocks)));
    with_packs<T>(fits_packs<T>({a, b}, {width}), [&](auto lanes) {
        launch(row_dots_kernel<lanes.value, T>, grid, threads, stream, rows, width, a, b, out);
    });
}

#define INSTANTIATE(T)                                                                                   \
    template void example_signs<T>(const ExampleBlock&, int64_t, int64_t, T*, void*);                    \
    template void example_signs_at<T>(const ExampleBlock&, int64_t, const int64_t*, int64_t, T*, void*); \
    template void example_row_signs<T>(const ExampleBlock&, int64_t, const int64_t*, int64_t, int64_t,   \
                                       int64_t, T*, void*);                                              \
    template void row_dots<T>(int64_t, int64_t, const T*, const T*, double*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
