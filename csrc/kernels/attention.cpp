#include "attention.h"

#include <algorithm>
#include <limits>

#include "attention.inl"
#include "macros.h"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 4096;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

template <class T>
FLATCORE_CLONES void backward_row(int64_t C, const T* p, T* dp, T* dz) {
    T mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < C; ++c) mean += p[c] * dp[c];
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        dz[c] = body::softmax_centred(p[c], dp[c], mean);
        dp[c] -= mean;
    }
}

template <class T>
FLATCORE_CLONES void second_order_row(int64_t C, const T* p, const T* u, bool tdp_is_zero, T* tz, T* tdp) {
    T mean = 0, sum = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t c = 0; c < C; ++c) mean += p[c] * tz[c];
    if (tdp_is_zero) std::fill(tdp, tdp + C, T(0));
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) {
        const T w = body::attention_second_order(tdp[c], tz[c], mean, u[c]);
        tz[c] = body::softmax_centred(p[c], tz[c], mean);
        tdp[c] = w;
        sum += p[c] * w;
    }
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) tdp[c] = body::softmax_centred(p[c], tdp[c], sum);
}

}  // namespace

template <class T>
void causal_mask(int64_t heads, int64_t rows, int64_t C, int64_t first, T* z) {
    for (int64_t i = 0; i < heads * rows; ++i) {
        const int64_t kept = body::causal_kept(C, first, i % rows);
        std::fill(z + i * C + kept, z + (i + 1) * C, -std::numeric_limits<T>::infinity());
    }
}

template <class T>
void attention_backward(int64_t rows, int64_t C, const T* p, T* dp, T* dz) {
    parallel_for(0, rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) backward_row(C, p + i * C, dp + i * C, dz + i * C);
    });
}

template <class T>
void attention_second_order(int64_t rows, int64_t C, const T* p, const T* u, bool tdp_is_zero, T* tz,
                            T* tdp) {
    parallel_for(0, rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            second_order_row(C, p + i * C, u + i * C, tdp_is_zero, tz + i * C, tdp + i * C);
    });
}

#define INSTANTIATE(T)                                                    \
    template void causal_mask(int64_t, int64_t, int64_t, int64_t, T*);    \
    template void attention_backward(int64_t, int64_t, const T*, T*, T*); \
    template void attention_second_order(int64_t, int64_t, const T*, const T*, bool, T*, T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
