// The CUDA grids of tall.h. All are bound by the reading of Y, of which a thread takes packs of 16 bytes
// where pointers, sizes and strides allow, neighbours beside each other, straight into registers: no entry is
// used by two threads of a block, so there is nothing to share.
//
// tall_gram: a thread keeps the sums of a tile of rows of X and rows of Y over the columns that it strides
// through, in the rows' precision over short runs and in double over those. Then a block adds up its threads,
// and a second launch the blocks, both in a fixed order. Tiles go along x of the grid, columns along y:
// blocks that run together read the same columns of different rows, so what the tiles have in common comes
// from the L2 cache.
//
// tall_update, tall_combine: a thread holds packs of some rows of X and goes through the rows of Y once for
// all of them; their factors lie in shared memory.
#include "tall.h"

#include "cuda_grid.h"
#include "tall.inl"

namespace flatcore::cuda {
namespace {

using body::GramTiles;

constexpr int kTileThreads = static_cast<int>(body::kTileThreads);
constexpr int kRun = 16;              // columns summed in the rows' precision
constexpr int64_t kFactorRows = 128;  // rows of Y whose factors are in shared memory at once
constexpr int64_t kMostRowsOfX = 8;

// partial[(tile, sum of the tile, column block)]. Fewer threads than elsewhere leave each the registers for
// its sums and for a pack of every row of a tile, so that all loads are under way at once.
template <int N, int Tall, class T>
__global__ void __launch_bounds__(kTileThreads, 3)
    gram_kernel(GramTiles tiles, int64_t p, int64_t m, int64_t P, const T* __restrict__ X, int64_t X_stride,
                const T* __restrict__ Y, int64_t Y_stride, double* __restrict__ partial) {
    constexpr int Wide = body::kTileWidth<Tall>, Sums = Tall * Wide, Parts = kTileThreads / Sums;
    FLATCORE_SHARED(double, of_threads, Sums* kTileThreads);
    FLATCORE_SHARED(double, of_parts, kTileThreads);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first = (int64_t{blockIdx.y} * kTileThreads + thread) * N;
    const int64_t stride = int64_t{gridDim.y} * kTileThreads * N;
    for (int64_t tile = blockIdx.x; tile < tiles.down * tiles.across; tile += gridDim.x) {
        const int64_t i = tile / tiles.across * Tall, j = tile % tiles.across * Wide;
        double sums[Sums] = {};
        for (int64_t column = first; column < P;) {
            T run[Sums] = {};
#if defined(__CUDACC__)
#pragma unroll 1  // the loads of one tile fill the registers
#endif
            for (int taken = 0; taken < kRun && column < P; taken += N, column += stride) {
                Pack<T, N> x[Tall], y[Wide];
                // What is beyond the last row is the last row again, and left out in the end.
                for (int a = 0; a < Tall; ++a)
                    x[a] = load<N>(X + (i + a < p ? i + a : p - 1) * X_stride + column);
                for (int b = 0; b < Wide; ++b)
                    y[b] = load<N>(Y + (j + b < m ? j + b : m - 1) * Y_stride + column);
                for (int a = 0; a < Tall; ++a)
                    for (int b = 0; b < Wide; ++b)
                        for (int lane = 0; lane < N; ++lane)
                            run[a * Wide + b] += x[a].lane[lane] * y[b].lane[lane];
            }
            for (int s = 0; s < Sums; ++s) sums[s] += double{run[s]};
        }
        for (int s = 0; s < Sums; ++s) of_threads[s * kTileThreads + thread] = sums[s];
        __syncthreads();
        double sum = 0.0;
        for (int other = thread % Parts; other < kTileThreads; other += Parts)
            sum += of_threads[thread / Parts * kTileThreads + other];
        of_parts[thread] = sum;
        __syncthreads();
        if (thread < Sums) {
            sum = 0.0;
            for (int part = 0; part < Parts; ++part) sum += of_parts[thread * Parts + part];
            partial[(tile * Sums + thread) * gridDim.y + blockIdx.y] = sum;
        }
    }
}

constexpr int64_t kWarps = kThreads / 32;

// A warp to an entry of the result.
__global__ void __launch_bounds__(kThreads)
    gram_of_blocks(GramTiles tiles, int64_t p, int64_t m, const double* __restrict__ partial,
                   double* __restrict__ out) {
    const int64_t lane = threadIdx.x % 32, warps = int64_t{gridDim.x} * kWarps;
    for (int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; at < p * m; at += warps) {
        const int64_t i = at / m, j = at % m;
        const int64_t tile = i / tiles.tall * tiles.across + j / tiles.wide;
        const int64_t entry = tile * tiles.tall * tiles.wide + i % tiles.tall * tiles.wide + j % tiles.wide;
        double sum = 0.0;
        for (int64_t block = lane; block < tiles.column_blocks; block += 32)
            sum += partial[entry * tiles.column_blocks + block];
        for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        if (lane == 0) out[at] = sum;
    }
}

// x of the grid goes over columns, y over groups of rows of X.
template <int N, int Rows, bool Update, class T>
__global__ void __launch_bounds__(kThreads, 2)
    combine_kernel(int64_t p, int64_t m, int64_t P, const T* __restrict__ B, const T* __restrict__ Y,
                   int64_t Y_stride, T* __restrict__ X, int64_t X_stride) {
    FLATCORE_SHARED(T, factors, Rows * kFactorRows);
    for (int64_t i = int64_t{blockIdx.y} * Rows; i < p; i += int64_t{gridDim.y} * Rows)
        for (int64_t j = 0; j == 0 || j < m; j += kFactorRows) {
            const int64_t count = m - j < kFactorRows ? m - j : kFactorRows;
            __syncthreads();
            for (int64_t at = threadIdx.x; at < Rows * count; at += blockDim.x) {
                const int64_t row = i + at % Rows;
                factors[at] = row < p ? B[row * m + j + at / Rows] : T(0);
            }
            __syncthreads();
            for (int64_t column = first_element() * N; column < P; column += element_stride() * N) {
                T sums[Rows][N] = {};
#if defined(__CUDACC__)
#pragma unroll 4  // loads of four rows are under way at once
#endif
                for (int64_t row = 0; row < count; ++row) {
                    const Pack<T, N> y = load<N>(Y + (j + row) * Y_stride + column);
                    for (int a = 0; a < Rows; ++a)
                        for (int lane = 0; lane < N; ++lane)
                            sums[a][lane] += factors[row * Rows + a] * y.lane[lane];
                }
                for (int a = 0; a < Rows; ++a) {
                    if (i + a >= p) continue;
                    T* const target = X + (i + a) * X_stride + column;
                    Pack<T, N> x = {};
                    if (Update || j > 0) x = load<N>(target);
                    for (int lane = 0; lane < N; ++lane)
                        x.lane[lane] = j > 0 && !Update ? x.lane[lane] + sums[a][lane]
                                                        : body::combined<Update>(x.lane[lane], sums[a][lane]);
                    store(target, x);
                }
            }
        }
}

// body(std::integral_constant<int, R>) with the least R of 1, 2, 4, ... `most` that holds `rows`, or `most`.
template <int Most, class Body>
void with_rows(int64_t rows, const Body& body) {
    if constexpr (Most > 1)
        if (rows <= Most / 2) return with_rows<Most / 2>(rows, body);
    body(std::integral_constant<int, Most>{});
}

template <bool Update, class T>
void launch_combine(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                    int64_t X_stride, void* stream) {
    if (p == 0 || P == 0 || (Update && m == 0)) return;
    with_packs<T>(fits_packs<T>({Y, X}, {P, Y_stride, X_stride}), [&](auto lanes) {
        with_rows<kMostRowsOfX>(p, [&](auto rows) {
            constexpr int N = lanes.value, Rows = rows.value;
            const dim3 grid = elements_grid(P / N, ceil_div(p, Rows));
            launch(combine_kernel<N, Rows, Update, T>, grid, dim3(kThreads), stream, p, m, P, B, Y, Y_stride,
                   X, X_stride);
        });
    });
}

}  // namespace

template <class T>
void tall_gram(int64_t p, int64_t m, int64_t P, const T* X, int64_t X_stride, const T* Y, int64_t Y_stride,
               double* workspace, double* out, void* stream) {
    if (p == 0 || m == 0) return;
    const GramTiles tiles = body::gram_tiles(p, m, P);
    const dim3 grid(static_cast<unsigned>(std::min(tiles.down * tiles.across, kMaxSlices)),
                    static_cast<unsigned>(tiles.column_blocks));
    with_packs<T>(fits_packs<T>({X, Y}, {P, X_stride, Y_stride}), [&](auto lanes) {
        with_rows<4>(p, [&](auto tall) {
            launch(gram_kernel<lanes.value, tall.value, T>, grid, dim3(kTileThreads), stream, tiles, p, m, P,
                   X, X_stride, Y, Y_stride, workspace);
        });
    });
    const dim3 blocks(static_cast<unsigned>(std::min(ceil_div(p * m, kWarps), kBlocks)));
    launch(gram_of_blocks, blocks, dim3(kThreads), stream, tiles, p, m, workspace, out);
}

template <class T>
void tall_update(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                 int64_t X_stride, void* stream) {
    launch_combine<true>(p, m, P, B, Y, Y_stride, X, X_stride, stream);
}

template <class T>
void tall_combine(int64_t p, int64_t m, int64_t P, const T* B, const T* Y, int64_t Y_stride, T* X,
                  int64_t X_stride, void* stream) {
    launch_combine<false>(p, m, P, B, Y, Y_stride, X, X_stride, stream);
}

#define INSTANTIATE(T)                                                                                     \
    template void tall_gram(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, double*,      \
                            double*, void*);                                                               \
    template void tall_update(int64_t, int64_t, int64_t, const T*, const T*, int64_t, T*, int64_t, void*); \
    template void tall_combine(int64_t, int64_t, int64_t, const T*, const T*, int64_t, T*, int64_t, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
