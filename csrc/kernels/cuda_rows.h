// Kernels over rows of C elements. The threads that share a row are its team: a warp for a short row, eight
// rows to a block, or a whole block for a long one. A team passes over its row several times, and a thread
// meets the same elements in every pass, so that in the last one results may overwrite what was read. Teams
// are numbered through the grid and take rows by striding, so that K * rows may be any number.
#pragma once

#include <cmath>
#include <limits>

#include "cuda_grid.h"

namespace flatcore::cuda {

constexpr int kLanes = 32;
constexpr int64_t kShortRow = 1024;
#if defined(FLATCORE_CUDA_SHIM)
constexpr int64_t kRowBlocks = 3;  // so that small tests reach the striding
#else
constexpr int64_t kRowBlocks = 4096;  // some waves on every device
#endif

template <class T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

struct Sum {
    template <class T>
    static __device__ T of(T a, T b) {
        return a + b;
    }
};

struct Max {
    template <class T>
    static __device__ T of(T a, T b) {
        return a > b ? a : b;
    }
};

// Every lane gets the same result to the bit, for op(a, b) = op(b, a).
template <class Op, class T>
__device__ T over_lanes(T value) {
    for (int step = kLanes / 2; step > 0; step /= 2) value = Op::of(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

struct Warp {
    static constexpr int size = kLanes, threads = 256, rows = threads / size;

    static __device__ int rank() { return static_cast<int>(threadIdx.x) % size; }
    static __device__ int row() { return static_cast<int>(threadIdx.x) / size; }

    // Each of `values` becomes what the whole team has of it.
    template <class Op, class T, int M>
    static __device__ void reduce(T (&values)[M]) {
        for (int m = 0; m < M; ++m) values[m] = over_lanes<Op>(values[m]);
    }
};

struct Block {
    static constexpr int size = 512, threads = size, rows = 1;

    static __device__ int rank() { return static_cast<int>(threadIdx.x); }
    static __device__ int row() { return 0; }

    template <class Op, class T, int M>
    static __device__ void reduce(T (&values)[M]) {
        constexpr int kWarps = size / kLanes;
        FLATCORE_SHARED(T, of_warps, kWarps * M);
        for (int m = 0; m < M; ++m) {
            values[m] = over_lanes<Op>(values[m]);
            if (rank() % kLanes == 0) of_warps[rank() / kLanes * M + m] = values[m];
        }
        __syncthreads();
        for (int m = 0; m < M; ++m) {
            values[m] = of_warps[m];
            for (int warp = 1; warp < kWarps; ++warp) values[m] = Op::of(values[m], of_warps[warp * M + m]);
        }
        __syncthreads();  // the next values must not arrive before these are read
    }
};

template <class Team, class T, int M>
__device__ void add_up(T (&values)[M]) {
    Team::template reduce<Sum>(values);
}

// body(c) for the first element c of each of this thread's packs. Left to itself nvcc unrolls as far for wide
// packs as for single elements, and runs out of registers.
template <int N, class Team, class Body>
__device__ void for_packs(int64_t C, const Body& body) {
#if defined(__CUDACC__)
#pragma unroll(N == 1 ? 4 : 1)
#endif
    for (int64_t c = int64_t{Team::rank()} * N; c < C; c += int64_t{Team::size} * N) body(c);
}

template <int N, class T>
__device__ Pack<T, N> load_or(const T* p, int64_t c, T absent) {
    if (p) return load<N>(p + c);
    Pack<T, N> result;
    for (int n = 0; n < N; ++n) result.lane[n] = absent;
    return result;
}

template <int N, class Team, class T>
__device__ T dot(int64_t C, const T* a, const T* b) {
    T sum[1] = {0};
    for_packs<N, Team>(C, [&](int64_t c) {
        const Pack<T, N> x = load<N>(a + c), y = load<N>(b + c);
        for (int n = 0; n < N; ++n) sum[0] += x.lane[n] * y.lane[n];
    });
    add_up<Team>(sum);
    return sum[0];
}

// The largest of a row's elements and the sum of exp(z - peak), in one pass: a thread's sum is scaled anew
// where its peak rises.
template <class T>
struct PeakSum {
    T peak, sum;
};

template <int N, class Team, class T>
__device__ PeakSum<T> peak_sum(int64_t C, const T* z) {
    T peak[1] = {kLowest<T>}, sum[1] = {0};
    for_packs<N, Team>(C, [&](int64_t c) {
        const Pack<T, N> x = load<N>(z + c);
        for (int n = 0; n < N; ++n) {
            const T value = x.lane[n];
            const bool rises = value > peak[0];
            // -infinity adds nothing, also where it is the peak so far; value - value is NaN for +infinity.
            const T e = value == kLowest<T> ? T(0) : std::exp(rises ? peak[0] - value : value - peak[0]);
            sum[0] = rises ? sum[0] * e + (T(1) + (value - value)) : sum[0] + e;
            peak[0] = rises ? value : peak[0];
        }
    });
    const T own = peak[0];
    Team::template reduce<Max>(peak);
    if (own != peak[0]) sum[0] *= std::exp(own - peak[0]);
    add_up<Team>(sum);
    return {peak[0], sum[0]};
}

// The rows of K directions, numbered so that neighbours take the same row in successive directions: what the
// directions share comes from memory once.
struct DirectionRow {
    int64_t k;
    int64_t row;  // of the arrays that the directions share
    int64_t at;   // of the directions, k * rows + row
};

FLATCORE_HOST_DEVICE DirectionRow direction_row(int64_t task, int64_t K, int64_t rows) {
    if (K == 1) return {0, task, task};
    const auto [row, k] = divide(task, K);
    return {k, row, k * rows + row};
}

template <class T, int N, class Team, class Pass>
__global__ void __launch_bounds__(Team::threads, kBlocksPerProcessor<T>* static_cast<int>(kThreads) /
                                                     Team::threads) rows_kernel(int64_t tasks, Pass pass) {
    const int64_t teams = int64_t{gridDim.x} * Team::rows;
    for (int64_t task = int64_t{blockIdx.x} * Team::rows + Team::row(); task < tasks; task += teams)
        pass.template run<N, Team>(task);
}

template <class Team>
dim3 rows_grid(int64_t tasks) {
    return dim3(static_cast<unsigned>(std::min(ceil_div(tasks, Team::rows), kRowBlocks)));
}

// pass.run<N, Team>(task) for every task, in teams that suit rows of C elements, with N elements in a pack.
template <class T, class Pass>
void launch_rows(int64_t tasks, int64_t C, bool fit, void* stream, const Pass& pass) {
    if (tasks == 0) return;  // an empty grid is an error
    with_packs<T>(fit, [&](auto n) {
        constexpr int N = decltype(n)::value;
        if (C <= kShortRow)
            launch(rows_kernel<T, N, Warp, Pass>, rows_grid<Warp>(tasks), dim3(Warp::threads), stream, tasks,
                   pass);
        else
            launch(rows_kernel<T, N, Block, Pass>, rows_grid<Block>(tasks), dim3(Block::threads), stream,
                   tasks, pass);
    });
}

}  // namespace flatcore::cuda
