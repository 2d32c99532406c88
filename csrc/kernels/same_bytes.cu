// A row of blocks for each pair of arrays. Threads read 16 bytes of both sides at a time, and only what
// differs is written: the same number by whoever finds it.
#include "same_bytes.h"

#include "cuda_grid.h"

namespace flatcore::cuda {
namespace {

// Of what lies behind the bytes already done, as many whole words as there are, where addresses allow.
template <class T, int N>
__device__ bool differ(const PairOfArrays& pair, int64_t& done) {
    using Word = Pack<T, N>;
    constexpr int64_t kSize = sizeof(Word);
    const auto address = reinterpret_cast<uintptr_t>(pair.first) | reinterpret_cast<uintptr_t>(pair.second);
    if (address % kSize != 0) return false;
    const Word* first = reinterpret_cast<const Word*>(pair.first + done);
    const Word* second = reinterpret_cast<const Word*>(pair.second + done);
    const int64_t count = (pair.bytes - done) / kSize;
    bool found = false;
    for (int64_t i = first_element(); i < count; i += element_stride()) {
        const Word a = first[i], b = second[i];
        for (int lane = 0; lane < N; ++lane) found |= a.lane[lane] != b.lane[lane];
    }
    done += count * kSize;
    return found;
}

__global__ void __launch_bounds__(kThreads) find_difference_kernel(PairsOfArrays arrays, int* different) {
    bool found = false;
    for (int64_t p = blockIdx.y; p < arrays.count; p += gridDim.y) {
        const PairOfArrays& pair = arrays.pairs[p];
        int64_t done = 0;
        found |= differ<uint32_t, 4>(pair, done);
        found |= differ<uint32_t, 1>(pair, done);
        found |= differ<unsigned char, 1>(pair, done);
    }
    if (found) *different = 1;
}

}  // namespace

void find_difference(const PairsOfArrays& arrays, int* different, void* stream) {
    int64_t longest = 0;
    for (int64_t p = 0; p < arrays.count; ++p) longest = std::max(longest, arrays.pairs[p].bytes);
    if (longest == 0) return;  // an empty grid is an error
    const int64_t x = std::min(ceil_div(longest, kThreads * int64_t{16}), kBlocks);
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(arrays.count));
    launch(find_difference_kernel, grid, dim3(kThreads), stream, arrays, different);
}

}  // namespace flatcore::cuda
