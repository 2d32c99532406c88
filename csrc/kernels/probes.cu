// The CUDA grids over probes.inl. Any thread can make any element: a word costs three multiplications, so
// threads that share one make it each for itself, and stores are coalesced. Normal numbers take a thread for
// each pair; their arithmetic in double, not the stores, takes the time.
#include "probes.h"

#include "cuda_grid.h"
#include "probes.inl"

namespace flatcore::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads)
    rademacher_kernel(uint64_t seed, int64_t first, int64_t K, int64_t P, T* __restrict__ out) {
    for (int64_t k = first_row(); k < K; k += row_stride()) {
        const uint64_t key = row_key(seed, Stream::signs, first + k);
        for (int64_t i = first_column() * N; i < P; i += column_stride() * N) {
            const uint64_t bits = word(key, i / 64);  // a pack does not cross a word: N divides 64 and i
            Pack<T, N> signs;
            for (int lane = 0; lane < N; ++lane)
                signs.lane[lane] = body::rademacher_sign<T>(bits, i % 64 + lane);
            store(out + k * P + i, signs);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(uint64_t seed, int64_t first, int64_t K, int64_t P, T* __restrict__ out) {
    for (int64_t k = first_row(); k < K; k += row_stride()) {
        const uint64_t key = row_key(seed, Stream::normals, first + k);
        for (int64_t pair = first_column(); 2 * pair < P; pair += column_stride()) {
            const auto numbers = body::normal_pair(key, pair);
            T* target = out + k * P + 2 * pair;
            target[0] = static_cast<T>(numbers.even);
            if (2 * pair + 1 < P) target[1] = static_cast<T>(numbers.odd);
        }
    }
}

}  // namespace

template <class T>
void rademacher_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out, void* stream) {
    if (K == 0 || P == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({out}, {P}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, block] = rows_layout(K, P / N, 1);
        launch(rademacher_kernel<N, T>, grid, block, stream, seed, first, K, P, out);
    });
}

template <class T>
void normal_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out, void* stream) {
    if (K == 0 || P == 0) return;
    const auto [grid, block] = rows_layout(K, ceil_div(P, 2), 1);
    launch(normal_kernel<T>, grid, block, stream, seed, first, K, P, out);
}

template void rademacher_rows<float>(uint64_t, int64_t, int64_t, int64_t, float*, void*);
template void rademacher_rows<double>(uint64_t, int64_t, int64_t, int64_t, double*, void*);
template void normal_rows<float>(uint64_t, int64_t, int64_t, int64_t, float*, void*);
template void normal_rows<double>(uint64_t, int64_t, int64_t, int64_t, double*, void*);

}  // namespace flatcore::cuda
