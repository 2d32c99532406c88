#include "normalise.h"

#include <algorithm>
#include <cmath>

#include "macros.h"
#include "parallel.h"
#include "row_sums.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 4096;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

template <class T>
FLATCORE_CLONES void forward_row(int64_t C, bool centred, T eps, const T* x, const T* w, const T* b, T* xhat,
                                 T* r, T* y) {
    T sum = 0;
    if (centred) {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) sum += x[c];
    }
    const T mean = sum / T(C);
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < C; ++c) square += (x[c] - mean) * (x[c] - mean);
    const T inverse = T(1) / std::sqrt(square / T(C) + eps);
    *r = inverse;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        xhat[c] = (x[c] - mean) * inverse;
        y[c] = xhat[c] * (w ? w[c] : T(1)) + (b ? b[c] : T(0));
    }
}

// mean(t) where centred, and mean(xhat t).
template <class T>
struct Moments {
    T mean, along;
};

template <class T>
FLATCORE_CLONES Moments<T> moments(int64_t C, bool centred, const T* xhat, const T* t) {
    T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int64_t c = 0; c < C; ++c) {
        sum += t[c];
        along += xhat[c] * t[c];
    }
    return {centred ? sum / T(C) : T(0), along / T(C)};
}

template <class T>
FLATCORE_CLONES void tangent_row(int64_t C, bool centred, const T* xhat, T r, const T* w, const T* tx,
                                 const T* tw, const T* tb, T* ty) {
    const Moments<T> m = tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        T value = tb ? tb[c] : T(0);
        if (tx) value += r * (tx[c] - m.mean - xhat[c] * m.along) * (w ? w[c] : T(1));
        if (tw) value += xhat[c] * tw[c];
        ty[c] = value;
    }
}

template <class T>
FLATCORE_CLONES void adjoint_row(int64_t C, bool centred, const T* xhat, T r, const T* w, const T* tdy,
                                 const T* dy, const T* tx, const T* tw, T* tdx) {
    const Moments<T> m = tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
    T ta_sum = 0, tB = 0, a_sum = 0, B = 0;
#pragma omp simd reduction(+ : ta_sum, tB, a_sum, B)
    for (int64_t c = 0; c < C; ++c) {
        const T weight = w ? w[c] : T(1);
        T ta = tdy ? tdy[c] * weight : T(0);
        if (dy && tw) ta += dy[c] * tw[c];
        ta_sum += ta;
        tB += ta * xhat[c];
        if (dy && tx) {
            const T a = dy[c] * weight;
            a_sum += a;
            B += a * xhat[c];
            tB += a * (r * (tx[c] - m.mean - xhat[c] * m.along));
        }
    }
    const T scale = T(1) / T(C);
    const T ta_mean = centred ? ta_sum * scale : T(0), a_mean = centred ? a_sum * scale : T(0);
    tB *= scale;
    B *= scale;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
        const T weight = w ? w[c] : T(1);
        T ta = tdy ? tdy[c] * weight : T(0);
        if (dy && tw) ta += dy[c] * tw[c];
        T value = ta - ta_mean - xhat[c] * tB;
        if (dy && tx) {
            const T txhat = r * (tx[c] - m.mean - xhat[c] * m.along);
            value -= txhat * B + r * m.along * (dy[c] * weight - a_mean - xhat[c] * B);
        }
        tdx[c] = r * value;
    }
}

template <class T>
FLATCORE_CLONES void sums_row(int64_t C, bool centred, const T* xhat, T r, const T* tdy, const T* dy,
                              const T* tx, double* weight_sums, double* bias_sums) {
    const Moments<T> m = dy && tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
    if (weight_sums) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
            T value = tdy ? tdy[c] * xhat[c] : T(0);
            if (dy && tx) value += dy[c] * (r * (tx[c] - m.mean - xhat[c] * m.along));
            weight_sums[c] += static_cast<double>(value);
        }
    }
    if (bias_sums && tdy) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) bias_sums[c] += static_cast<double>(tdy[c]);
    }
}

}  // namespace

template <class T>
void normalise_forward(const NormShape& shape, double eps, const T* x, const T* w, const T* b, T* xhat, T* r,
                       T* y) {
    const int64_t C = shape.C;
    parallel_for(0, shape.rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            forward_row<T>(C, shape.centred, static_cast<T>(eps), x + i * C, w, b, xhat + i * C, r + i,
                           y + i * C);
    });
}

template <class T>
void normalise_tangent(const NormShape& shape, int64_t K, const T* xhat, const T* r, const T* w, const T* tx,
                       const T* tw, int64_t tw_stride, const T* tb, int64_t tb_stride, T* ty) {
    const int64_t C = shape.C;
    parallel_for(0, K * shape.rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t k = i / shape.rows, row = i % shape.rows;
            tangent_row<T>(C, shape.centred, xhat + row * C, r[row], w, tx ? tx + i * C : nullptr,
                           tw ? tw + k * tw_stride : nullptr, tb ? tb + k * tb_stride : nullptr, ty + i * C);
        }
    });
}

template <class T>
void normalise_adjoint(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, T* tdx) {
    const int64_t C = shape.C;
    parallel_for(0, K * shape.rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t k = i / shape.rows, row = i % shape.rows;
            adjoint_row<T>(C, shape.centred, d.xhat + row * C, d.r[row], d.w, d.tdy ? d.tdy + i * C : nullptr,
                           d.dy ? d.dy + row * C : nullptr, d.dy && d.tx ? d.tx + i * C : nullptr,
                           d.dy && d.tw ? d.tw + k * d.tw_stride : nullptr, tdx + i * C);
        }
    });
}

template <class T>
void normalise_sums(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, double* weight_sums,
                    double* bias_sums) {
    const int64_t C = shape.C, rows = shape.rows;
    sum_rows(K, rows, C, weight_sums, bias_sums, [&](int64_t k, int64_t row, double* weight, double* bias) {
        const int64_t at = (k * rows + row) * C;
        sums_row<T>(C, shape.centred, d.xhat + row * C, d.r[row], d.tdy ? d.tdy + at : nullptr,
                    d.dy ? d.dy + row * C : nullptr, d.dy && d.tx ? d.tx + at : nullptr, weight, bias);
    });
}

#define INSTANTIATE(T)                                                                                   \
    template void normalise_forward(const NormShape&, double, const T*, const T*, const T*, T*, T*, T*); \
    template void normalise_tangent(const NormShape&, int64_t, const T*, const T*, const T*, const T*,   \
                                    const T*, int64_t, const T*, int64_t, T*);                           \
    template void normalise_adjoint(const NormShape&, int64_t, const NormaliseAdjoint<T>&, T*);          \
    template void normalise_sums(const NormShape&, int64_t, const NormaliseAdjoint<T>&, double*, double*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
