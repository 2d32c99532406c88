// CUDA threads on the host, to run the index logic of a kernel where there is no GPU: under the address
// sanitizer, and in both orders of threads, so that a missing barrier shows. Blocks run one after another;
// the threads of a block are fibers that run until they reach a barrier. Shared arrays lie on the heap,
// filled with garbage before every block. Emulated: barriers, warp shuffles, ballot, atomicAdd, and in
// tensor_core.h the matrix units. Not: memory ordering, speed.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define FLATCORE_SHARED(T, name, count) static T* const name = flatcore::cuda::shared_array<T>(count)
#define FLATCORE_SHARED_BYTES(name) unsigned char* const name = flatcore::cuda::shared_of_launch()

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now.
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace flatcore::cuda {

enum class Order { forward, backward };
inline Order thread_order = Order::forward;

// Told of every launch before it runs, where set (tests/simulated).
inline void (*launch_watcher)(dim3 grid, dim3 block, size_t shared_bytes, void* stream) = nullptr;

// Runs `thread` once for every thread of the grid, whose blocks have `shared` bytes each. Throws
// std::logic_error where threads wait for each other at different barriers or one has left.
void run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

// Waits until every thread of the block, or every lane of the warp named in `mask`, has come to the same
// place.
void wait_for_block(std::source_location place);
void wait_for_warp(uint32_t mask, std::source_location place);

// Leaves this lane's value for the others of its warp, waits for those in `mask`, returns the one of lane
// `source`.
uint64_t exchange(uint32_t mask, uint64_t value, int source, std::source_location place);
uint32_t ballot(uint32_t mask, bool predicate, std::source_location place);

// Leaves this lane's words for the whole warp, waits for all its lanes, returns the words of each. They stay
// until this lane's next exchange.
using LaneWords = std::array<uint32_t, 8>;
const std::array<LaneWords, 32>& exchange_words(const LaneWords& words, std::source_location place);
int lane();

// Memory of `bytes` that one place in a kernel shares between the threads of a block; lives until the program
// ends.
void* shared_bytes(size_t bytes);

// The bytes that the running launch gave each block.
unsigned char* shared_of_launch();

template <class T>
T* shared_array(size_t count) {
    return static_cast<T*>(shared_bytes(count * sizeof(T)));
}

template <class T>
T shuffle(uint32_t mask, T value, int source, std::source_location place) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(mask, bits, source, place);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class... Parameters, class... Arguments>
void launch_with(size_t bytes, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
                 Arguments... arguments) {
    if (launch_watcher) launch_watcher(grid, block, bytes, stream);
    run_grid(grid, block, bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
    launch_with(0, kernel, grid, block, stream, arguments...);
}

}  // namespace flatcore::cuda

using Place = std::source_location;
inline void __syncthreads(Place place = Place::current()) { flatcore::cuda::wait_for_block(place); }
inline void __syncwarp(uint32_t mask = ~0u, Place place = Place::current()) {
    flatcore::cuda::wait_for_warp(mask, place);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, Place place = Place::current()) {
    return flatcore::cuda::ballot(mask, predicate, place);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, Place place = Place::current()) {
    return flatcore::cuda::shuffle(mask, value, source & 31, place);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other, Place place = Place::current()) {
    return flatcore::cuda::shuffle(mask, value, flatcore::cuda::lane() ^ other, place);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, Place place = Place::current()) {
    const int source = flatcore::cuda::lane() + static_cast<int>(by);
    return flatcore::cuda::shuffle(mask, value, source < 32 ? source : flatcore::cuda::lane(), place);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, Place place = Place::current()) {
    const int source = flatcore::cuda::lane() - static_cast<int>(by);
    return flatcore::cuda::shuffle(mask, value, source >= 0 ? source : flatcore::cuda::lane(), place);
}
template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}
