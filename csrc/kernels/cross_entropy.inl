// One row of cross_entropy.h at a time; the loops over c are what each device vectorises.
// A row's target is a function c -> m_c.
#pragma once

#include <cstdint>

#include "cross_entropy.h"
#include "macros.h"
#include "vector_math.h"

namespace flatcore::body {

template <class T>
struct RowOfMasses {
    const T* mass;
    FLATCORE_HOST_DEVICE T operator()(int64_t c) const { return mass[c]; }
};

// Compared, not looked up: any index is safe, and the loops stay without a special case.
template <class T>
struct RowOfOneClass {
    int64_t index;
    T mass;
    FLATCORE_HOST_DEVICE T operator()(int64_t c) const { return c == index ? mass : T(0); }
};

template <class T>
FLATCORE_HOST_DEVICE RowOfMasses<T> row_of(ClassMasses<T> target, int64_t r, int64_t C) {
    return {target.mass + r * C};
}

template <class T>
FLATCORE_HOST_DEVICE RowOfOneClass<T> row_of(OneClass<T> target, int64_t r, int64_t /*C*/) {
    return {target.index[r], target.mass[r]};
}

// Writes p, adds up M, returns the loss.
template <class T, class Row>
FLATCORE_HOST_DEVICE T cross_entropy_forward(int64_t C, const T* z, Row m, T* p, T* total) {
    T peak = z[0];
#pragma omp simd reduction(max : peak)
    for (int64_t c = 0; c < C; ++c) peak = z[c] > peak ? z[c] : peak;
    T sum = 0, mass_sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, mass_sum, product)
    for (int64_t c = 0; c < C; ++c) {
        // Centred at the peak: logsumexp(z) - z_c would cancel for large logits.
        const T centred = z[c] - peak, mass = m(c), e = std::exp(centred);
        p[c] = e;
        sum += e;
        mass_sum += mass;
        product += mass != T(0) ? mass * centred : T(0);
    }
    const T scale = T(1) / sum;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) p[c] *= scale;
    *total = mass_sum;
    return mass_sum * std::log(sum) - product;
}

template <class T, class Row>
FLATCORE_HOST_DEVICE T cross_entropy_tangent(int64_t C, Row m, const T* p, T total, const T* tz) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += (total * p[c] - m(c)) * tz[c];
    return sum;
}

template <class T, class Row>
FLATCORE_HOST_DEVICE void cross_entropy_adjoint(int64_t C, Row m, const T* p, T total, T tdloss, T dloss,
                                                const T* tz, T* out) {
    T mean = 0;
    if (tz) {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < C; ++c) mean += p[c] * tz[c];
    }
    const T curvature = dloss * total;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        const T second = tz ? curvature * p[c] * (tz[c] - mean) : T(0);
        out[c] = tdloss * (total * p[c] - m(c)) + second;
    }
}

}  // namespace flatcore::body
