#include "same_bytes.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace flatcore {

void find_difference(const PairsOfArrays& arrays, int* different) {
    constexpr int64_t kPiece = int64_t{1} << 18;  // bytes
    for (int64_t p = 0; p < arrays.count; ++p) {
        const PairOfArrays& pair = arrays.pairs[p];
        parallel_for(0, (pair.bytes + kPiece - 1) / kPiece, 4, [&](int64_t first, int64_t last) {
            const int64_t begin = first * kPiece, end = std::min(last * kPiece, pair.bytes);
            if (std::memcmp(pair.first + begin, pair.second + begin, static_cast<size_t>(end - begin)) != 0)
                std::atomic_ref<int>(*different).store(1, std::memory_order_relaxed);
        });
    }
}

}  // namespace flatcore
