// A static parallel loop over [begin, end). Obeys torch.set_num_threads, which sets OpenMP's count; the split
// depends only on the range and that count, so a result is the same from call to call.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace flatcore {

// Calls body(first, last) on disjoint pieces of at least `grain` items each.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    const int64_t count = end - begin;
    if (count <= 0) return;
    const int64_t pieces = std::min<int64_t>(omp_get_max_threads(), count / std::max<int64_t>(grain, 1));
    if (pieces <= 1 || omp_in_parallel()) {
        body(begin, end);
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(pieces))
    {
        // The runtime may grant fewer threads than asked; the split follows what was granted.
        const int64_t granted = omp_get_num_threads();
        const int64_t piece = (count + granted - 1) / granted;
        const int64_t first = begin + omp_get_thread_num() * piece;
        const int64_t last = std::min(end, first + piece);
        if (first < last) body(first, last);
    }
}

}  // namespace flatcore
