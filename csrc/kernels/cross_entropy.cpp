#include "cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "cross_entropy.inl"
#include "macros.h"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 4096;  // logits per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

// Writes p, adds up M, returns the loss.
template <class T, class Row>
FLATCORE_HOST_DEVICE T forward_row(int64_t C, const T* z, Row m, T* p, T* total) {
    T peak = z[0];
#pragma omp simd reduction(max : peak)
    for (int64_t c = 0; c < C; ++c) peak = z[c] > peak ? z[c] : peak;
    T sum = 0, mass_sum = 0, terms = 0;
#pragma omp simd reduction(+ : sum, mass_sum, terms)
    for (int64_t c = 0; c < C; ++c) {
        const T centred = z[c] - peak, mass = m(c), e = std::exp(centred);
        p[c] = e;
        sum += e;
        mass_sum += mass;
        terms += body::cross_entropy_term(mass, centred);
    }
    const T scale = T(1) / sum;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) p[c] *= scale;
    *total = mass_sum;
    return body::cross_entropy_loss(mass_sum, sum, terms);
}

template <class T, class Row>
FLATCORE_HOST_DEVICE T tangent_row(int64_t C, Row m, const T* p, T total, const T* tz) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += body::cross_entropy_gradient(total, p[c], m, c) * tz[c];
    return sum;
}

template <class T, class Row>
FLATCORE_HOST_DEVICE void adjoint_row(int64_t C, Row m, const T* p, T total, T tdloss, T dloss, const T* tz,
                                      T* out) {
    T mean = 0;
    if (tz) {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < C; ++c) mean += p[c] * tz[c];
    }
    const T curvature = dloss * total;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        const T second = tz ? body::cross_entropy_curvature(curvature, p[c], tz[c], mean) : T(0);
        out[c] = tdloss * body::cross_entropy_gradient(total, p[c], m, c) + second;
    }
}

template <class T, class Target>
FLATCORE_CLONES void forward_rows(int64_t first, int64_t last, int64_t C, const T* z, Target target, T* loss,
                                  T* p, T* total) {
    for (int64_t r = first; r < last; ++r) {
        T sum;
        loss[r] = forward_row(C, z + r * C, body::row_of(target, r, C), p + r * C, &sum);
        if (total) total[r] = sum;
    }
}

// Rows of all directions are numbered k * rows + r.
template <class T, class Target>
FLATCORE_CLONES void tangent_rows(int64_t first, int64_t last, int64_t rows, int64_t C, Target target,
                                  const T* p, const T* total, const T* tz, T* tloss) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t r = row % rows;
        tloss[row] = tangent_row(C, body::row_of(target, r, C), p + r * C, total[r], tz + row * C);
    }
}

template <class T, class Target>
FLATCORE_CLONES void adjoint_rows(int64_t first, int64_t last, int64_t rows, int64_t C, Target target,
                                  const T* p, const T* total, const T* tdloss, const T* dloss, const T* tz,
                                  T* out) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t r = row % rows;
        adjoint_row(C, body::row_of(target, r, C), p + r * C, total[r], tdloss ? tdloss[row] : T(0),
                    tz ? dloss[r] : T(0), tz ? tz + row * C : nullptr, out + row * C);
    }
}

}  // namespace

template <class T, class Target>
void cross_entropy_forward(int64_t rows, int64_t C, const T* z, Target target, T* loss, T* p, T* total) {
    parallel_for(0, rows, row_grain(C), [&](int64_t first, int64_t last) {
        forward_rows(first, last, C, z, target, loss, p, total);
    });
}

template <class T, class Target>
void cross_entropy_tangent(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tz, T* tloss) {
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        tangent_rows(first, last, rows, C, target, p, total, tz, tloss);
    });
}

template <class T, class Target>
void cross_entropy_adjoint(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tdloss, const T* dloss, const T* tz, T* out) {
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        adjoint_rows(first, last, rows, C, target, p, total, tdloss, dloss, tz, out);
    });
}

#define INSTANTIATE(T, Target)                                                                           \
    template void cross_entropy_forward(int64_t, int64_t, const T*, Target, T*, T*, T*);                 \
    template void cross_entropy_tangent(int64_t, int64_t, int64_t, Target, const T*, const T*, const T*, \
                                        T*);                                                             \
    template void cross_entropy_adjoint(int64_t, int64_t, int64_t, Target, const T*, const T*, const T*, \
                                        const T*, const T*, T*);
INSTANTIATE(float, ClassMasses<float>)
INSTANTIATE(double, ClassMasses<double>)
INSTANTIATE(float, OneClass<float>)
INSTANTIATE(double, OneClass<double>)
#undef INSTANTIATE

}  // namespace flatcore
