// The emulation itself: right kernels pass in both orders of threads, and each kind of broken one is caught.
#include <sys/wait.h>
#include <unistd.h>

#include <numeric>
#include <stdexcept>
#include <vector>

#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore::cuda;

namespace {

constexpr int kThreads = 256;

// Sums of kThreads numbers each; without the barrier a thread reads what another has not written yet.
template <bool Barrier>
__global__ void block_sum(const double* x, double* sums) {
    FLATCORE_SHARED(double, partial, kThreads);
    const int t = static_cast<int>(threadIdx.x);
    partial[t] = x[blockIdx.x * kThreads + threadIdx.x];
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if constexpr (Barrier) __syncthreads();
        if (t < half) partial[t] += partial[t + half];
    }
    if (t == 0) sums[blockIdx.x] = partial[0];
}

template <bool Barrier>
bool block_sum_is_right(Order order) {
    constexpr int kBlocks = 3;
    std::vector<double> x(kBlocks * kThreads), sums(kBlocks);
    std::iota(x.begin(), x.end(), 1.0);
    thread_order = order;
    launch(block_sum<Barrier>, kBlocks, kThreads, nullptr, x.data(), sums.data());
    for (int b = 0; b < kBlocks; ++b) {
        const auto first = x.begin() + b * kThreads;
        if (sums[static_cast<size_t>(b)] != std::accumulate(first, first + kThreads, 0.0)) return false;
    }
    return true;
}

__global__ void warp_operations(const float* x, float* down, float* butterfly, float* up, unsigned* odd,
                                float* total) {
    const unsigned i = threadIdx.x;
    float sum = x[i], all = x[i];
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_down_sync(~0u, sum, static_cast<unsigned>(step));
        all += __shfl_xor_sync(~0u, all, step);
    }
    down[i] = __shfl_sync(~0u, sum, 0);
    butterfly[i] = all;
    up[i] = __shfl_up_sync(~0u, x[i], 1);
    odd[i] = __ballot_sync(~0u, static_cast<int>(x[i]) % 2 == 1);
    if (i % 32 == 0) atomicAdd(total, all);
}

void test_warp_operations() {
    std::vector<float> x(64), down(64), butterfly(64), up(64);
    std::vector<unsigned> odd(64);
    float total = 0;
    std::iota(x.begin(), x.end(), 0.0f);
    launch(warp_operations, 1, 64, nullptr, x.data(), down.data(), butterfly.data(), up.data(), odd.data(),
           &total);
    for (size_t i = 0; i < 64; ++i) {
        const float sum = i < 32 ? 496 : 1520;  // 0 + ... + 31, 32 + ... + 63
        EXPECT(down[i] == sum && butterfly[i] == sum);
        EXPECT(up[i] == (i % 32 == 0 ? x[i] : x[i] - 1));
        EXPECT(odd[i] == 0xAAAAAAAAu);
    }
    EXPECT(total == 2016);
}

__global__ void divergent_barrier() {
    if (threadIdx.x < 7) __syncthreads();
}

__global__ void two_barriers() {
    if (threadIdx.x % 2)
        __syncthreads();
    else
        __syncthreads();
}

template <class Body>
bool throws_logic_error(Body body) {
    try {
        body();
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

__global__ void one_past_the_end(float* x) { x[threadIdx.x + 1] = 0; }

__global__ void one_past_shared(float* x) {
    FLATCORE_SHARED(float, copy, 32);
    copy[threadIdx.x + 1] = x[threadIdx.x];
    x[threadIdx.x] = copy[threadIdx.x];
}

// The sanitizer ends the process, so the broken kernel runs in a child whose complaint is not shown.
bool sanitizer_stops(void (*kernel)(float*)) {
    const pid_t child = fork();
    if (child == 0) {
        std::vector<float> x(32);
        std::freopen("/dev/null", "w", stderr);
        launch(kernel, 1, 32, nullptr, x.data());
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
    for (const Order order : {Order::forward, Order::backward}) {
        EXPECT(block_sum_is_right<true>(order));
        test_warp_operations();
        EXPECT(throws_logic_error([] { launch(divergent_barrier, 1, 64, nullptr); }));
        EXPECT(throws_logic_error([] { launch(two_barriers, 1, 64, nullptr); }));
    }
    EXPECT(!block_sum_is_right<false>(Order::forward) || !block_sum_is_right<false>(Order::backward));
    EXPECT(sanitizer_stops(one_past_the_end));
    EXPECT(sanitizer_stops(one_past_shared));
    return failures != 0;
}
