#include "direction_dots.h"

#include <algorithm>
#include <numeric>

#include "direction_dots.inl"
#include "macros.h"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain =
    1 << 14;  // elements per thread below which a second thread costs more than it saves

template <bool Weighted, class T>
FLATCORE_CLONES double dot(int64_t n, const T* w, const T* a, const T* b) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i)
        sum += Weighted ? body::dot_term(w[i], a[i], b[i]) : body::dot_term(a[i], b[i]);
    return sum;
}

template <bool Weighted, class T>
void add_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
              double* workspace, double* out) {
    if (n == 0) return;
    const int64_t size = body::dot_piece_size(n), pieces = body::dot_piece_count(n);
    parallel_for(0, K * pieces, std::max<int64_t>(1, kGrain / size), [=](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t k = task / pieces, start = task % pieces * size;
            workspace[task] = dot<Weighted>(std::min(size, n - start), Weighted ? w + start : nullptr,
                                            a + k * a_stride + start, b + k * b_stride + start);
        }
    });
    for (int64_t k = 0; k < K; ++k)
        out[k] += std::accumulate(workspace + k * pieces, workspace + (k + 1) * pieces, 0.0);
}

}  // namespace

template <class T>
void direction_dots(int64_t K, int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                    double* workspace, double* out) {
    const T* absent = nullptr;
    add_dots<false>(K, n, absent, a, a_stride, b, b_stride, workspace, out);
}

template <class T>
void weighted_direction_dots(int64_t K, int64_t n, const T* w, const T* a, int64_t a_stride, const T* b,
                             int64_t b_stride, double* workspace, double* out) {
    add_dots<true>(K, n, w, a, a_stride, b, b_stride, workspace, out);
}

#define INSTANTIATE(T)                                                                                      \
    template void direction_dots(int64_t, int64_t, const T*, int64_t, const T*, int64_t, double*, double*); \
    template void weighted_direction_dots(int64_t, int64_t, const T*, const T*, int64_t, const T*, int64_t, \
                                          double*, double*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
