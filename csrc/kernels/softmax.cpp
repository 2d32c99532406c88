#include "softmax.h"

#include <algorithm>
#include <limits>

#include "macros.h"
#include "parallel.h"
#include "softmax.inl"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 4096;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

template <class T>
FLATCORE_CLONES T forward_row(int64_t C, const T* z, T* p) {
    T peak = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : peak)
    for (int64_t c = 0; c < C; ++c) peak = z[c] > peak ? z[c] : peak;
    if (peak == -std::numeric_limits<T>::infinity()) {
        std::fill(p, p + C, T(0));
        return peak;
    }
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) {
        const T e = body::softmax_exponential(z[c], peak);
        p[c] = e;
        sum += e;
    }
    const T scale = T(1) / sum;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) p[c] *= scale;
    return body::log_sum_exp(peak, sum);
}

template <class T>
FLATCORE_CLONES T dot(int64_t C, const T* a, const T* b) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += a[c] * b[c];
    return sum;
}

template <class T>
FLATCORE_CLONES void centred_row(int64_t C, const T* p, const T* t, T mean, T* out) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] = body::softmax_centred(p[c], t[c], mean);
}

template <class T>
FLATCORE_CLONES void adjoint_row(int64_t C, const T* p, const T* tdp, const T* dp, const T* tz, T* tdz) {
    const T s = dot(C, p, dp), mean = dot(C, p, tz);
    T ts = 0;
#pragma omp simd reduction(+ : ts)
    for (int64_t c = 0; c < C; ++c)
        ts += body::softmax_adjoint_term(p[c], tdp ? tdp[c] : T(0), dp[c], tz[c], mean);
#pragma omp simd
    for (int64_t c = 0; c < C; ++c)
        tdz[c] = body::softmax_adjoint(p[c], tdp ? tdp[c] : T(0), dp[c], tz[c], mean, s, ts);
}

}  // namespace

template <class T>
void softmax_forward(int64_t rows, int64_t C, const T* z, T* p, T* log_sum) {
    parallel_for(0, rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const T value = forward_row(C, z + i * C, p + i * C);
            if (log_sum) log_sum[i] = value;
        }
    });
}

template <class T>
void softmax_tangent(int64_t K, int64_t rows, int64_t C, const T* p, const T* tz, T* tp) {
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const T* row = p + (i % rows) * C;
            centred_row(C, row, tz + i * C, dot(C, row, tz + i * C), tp + i * C);
        }
    });
}

template <class T>
void softmax_adjoint(int64_t K, int64_t rows, int64_t C, const T* p, const T* tdp, const T* dp, const T* tz,
                     T* tdz) {
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const T* row = p + (i % rows) * C;
            const T* adjoint = tdp ? tdp + i * C : nullptr;
            if (dp)
                adjoint_row(C, row, adjoint, dp + (i % rows) * C, tz + i * C, tdz + i * C);
            else
                centred_row(C, row, adjoint, dot(C, row, adjoint), tdz + i * C);
        }
    });
}

#define INSTANTIATE(T)                                                                \
    template void softmax_forward(int64_t, int64_t, const T*, T*, T*);                \
    template void softmax_tangent(int64_t, int64_t, int64_t, const T*, const T*, T*); \
    template void softmax_adjoint(int64_t, int64_t, int64_t, const T*, const T*, const T*, const T*, T*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
