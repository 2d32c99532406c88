// One row of cross_entropy.h at a time; the loops over c are what each device vectorises.
#pragma once

#include <cstdint>

#include "macros.h"
#include "vector_math.h"

namespace flatcore::body {

template <class T>
FLATCORE_HOST_DEVICE void cross_entropy_forward(int64_t C, const T* z, const T* mass, T* loss, T* p,
                                                T* total) {
    T peak = z[0];
#pragma omp simd reduction(max : peak)
    for (int64_t c = 0; c < C; ++c) peak = z[c] > peak ? z[c] : peak;
    T sum = 0, mass_sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, mass_sum, product)
    for (int64_t c = 0; c < C; ++c) {
        const T e = std::exp(z[c] - peak);
        p[c] = e;
        sum += e;
        mass_sum += mass[c];
        // Centred at the peak: logsumexp(z) - z_c would cancel for large logits.
        product += mass[c] != T(0) ? mass[c] * (z[c] - peak) : T(0);
    }
    const T scale = T(1) / sum;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) p[c] *= scale;
    *loss = mass_sum * std::log(sum) - product;
    *total = mass_sum;
}

template <class T>
FLATCORE_HOST_DEVICE T cross_entropy_tangent(int64_t C, const T* mass, const T* p, T total, const T* tz) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += (total * p[c] - mass[c]) * tz[c];
    return sum;
}

template <class T>
FLATCORE_HOST_DEVICE void cross_entropy_adjoint(int64_t C, const T* mass, const T* p, T total, T tdloss,
                                                T dloss, const T* tz, T* out) {
    T mean = 0;
    if (tz) {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < C; ++c) mean += p[c] * tz[c];
    }
    const T curvature = dloss * total;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        const T second = tz ? curvature * p[c] * (tz[c] - mean) : T(0);
        out[c] = tdloss * (total * p[c] - mass[c]) + second;
    }
}

}  // namespace flatcore::body
