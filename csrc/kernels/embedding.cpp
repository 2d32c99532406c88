#include "embedding.h"

#include <algorithm>

#include "macros.h"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)); }

template <class T>
FLATCORE_CLONES void add_row(int64_t width, const T* __restrict row, T* __restrict x) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] += row[j];
}

}  // namespace

template <class T>
void gather_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, int64_t frozen, const T* x,
                 int64_t x_stride, T* out) {
    parallel_for(0, K * n, row_grain(width), [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t chosen = index[i % n];
            if (chosen == frozen)
                std::fill_n(out + i * width, width, T(0));
            else
                std::copy_n(x + i / n * x_stride + chosen * width, width, out + i * width);
        }
    });
}

template <class T>
void scatter_rows(int64_t K, int64_t n, int64_t width, const int64_t* index, const RowSegments& segments,
                  int64_t frozen, const T* rows, T* x, int64_t x_stride) {
    const auto [count, order, starts] = segments;
    // One thread per distinct row and direction, so that no two write to the same place.
    parallel_for(0, K * count, row_grain(width), [=](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t k = task / count, segment = task % count, chosen = index[order[starts[segment]]];
            if (chosen == frozen) continue;
            T* target = x + k * x_stride + chosen * width;
            for (int64_t i = starts[segment]; i < starts[segment + 1]; ++i)
                add_row(width, rows + (k * n + order[i]) * width, target);
        }
    });
}

#define INSTANTIATE(T)                                                                                    \
    template void gather_rows(int64_t, int64_t, int64_t, const int64_t*, int64_t, const T*, int64_t, T*); \
    template void scatter_rows(int64_t, int64_t, int64_t, const int64_t*, const RowSegments&, int64_t,    \
                               const T*, T*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
