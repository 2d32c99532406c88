#include "normalise.h"

#include <algorithm>
#include <type_traits>

#include "macros.h"
#include "normalise.inl"
#include "parallel.h"
#include "row_sums.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 4096;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

using body::Moments;

// Which of the arrays are there, known while the loops are compiled: with conditions in them they are not
// vectorised.
template <bool W, bool Tdy, bool Tx, bool Tw>
struct Has {
    static constexpr bool w = W, tdy = Tdy, tx = Tx, tw = Tw;
};

template <class T, class Has>
using Row = body::NormaliseRow<T, const T*, Has>;

// body(Has<flags...>{})
template <bool... flags, class Body>
void with_has(const Body& body) {
    body(Has<flags...>{});
}

template <bool... flags, class Body, class Flag, class... Others>
void with_has(const Body& body, Flag flag, Others... others) {
    if constexpr (std::is_same_v<Flag, std::false_type>)
        with_has<flags..., false>(body, others...);
    else if (flag)
        with_has<flags..., true>(body, others...);
    else
        with_has<flags..., false>(body, others...);
}

template <class T>
FLATCORE_CLONES void forward_row(int64_t C, bool centred, T eps, const T* x, const T* w, const T* b, T* xhat,
                                 T* r, T* y) {
    T sum = 0;
    if (centred) {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) sum += x[c];
    }
    const T mean = sum / T(C);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; ++c) squares += body::squared_deviation(x[c], mean);
    const T inverse = body::inverse_deviation(squares, C, eps);
    *r = inverse;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c)
        body::normalise_forward(x[c], mean, inverse, w ? w[c] : T(1), b ? b[c] : T(0), xhat[c], y[c]);
}

template <class T>
FLATCORE_CLONES Moments<T> moments(int64_t C, bool centred, const T* xhat, const T* t) {
    T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int64_t c = 0; c < C; ++c) {
        sum += t[c];
        along += xhat[c] * t[c];
    }
    return body::moments_of_sums(centred, C, sum, along);
}

template <class Has, class T>
FLATCORE_CLONES void tangent_row(Has has, int64_t C, bool centred, const T* xhat, T r, const T* w,
                                 const T* tx, const T* tw, const T* tb, T* ty) {
    const Moments<T> m = has.tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
    const Row<T, Has> row{has, xhat, w, nullptr, nullptr, tx, tw, r, m};
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) ty[c] = body::normalise_tangent(row, c, tb ? tb[c] : T(0));
}

template <class Has, class T>
FLATCORE_CLONES void adjoint_row(Has has, int64_t C, bool centred, const T* xhat, T r, const T* w,
                                 const T* tdy, const T* dy, const T* tx, const T* tw, T* tdx) {
    const Moments<T> m = has.tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
    const Row<T, Has> row{has, xhat, w, tdy, dy, tx, tw, r, m};
    T ta = 0, tB = 0, a = 0, B = 0;
#pragma omp simd reduction(+ : ta, tB, a, B)
    for (int64_t c = 0; c < C; ++c) {
        const auto terms = body::normalise_terms(row, c);
        ta += terms.ta;
        tB += terms.tB;
        a += terms.a;
        B += terms.B;
    }
    const auto means = body::normalise_means<T>(centred, C, {ta, tB, a, B});
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) tdx[c] = body::normalise_adjoint(row, c, means);
}

template <class T>
FLATCORE_CLONES void add_row(int64_t C, const T* from, T* to) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) to[c] += from[c];
}

template <class Has, class T>
FLATCORE_CLONES void sums_row(Has has, int64_t C, bool centred, const T* xhat, T r, const T* tdy, const T* dy,
                              const T* tx, double* weight_sums, double* bias_sums) {
    if (weight_sums) {
        const Moments<T> m = has.tx ? moments(C, centred, xhat, tx) : Moments<T>{0, 0};
        const Row<T, Has> row{has, xhat, nullptr, tdy, dy, tx, nullptr, r, m};
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
            weight_sums[c] += static_cast<double>(body::normalise_weight_term(row, c));
    }
    if (bias_sums && has.tdy) {
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
    const auto run = [&](auto has) {
        parallel_for(0, K * shape.rows, row_grain(C), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t k = i / shape.rows, row = i % shape.rows;
                tangent_row(has, C, shape.centred, xhat + row * C, r[row], w, tx ? tx + i * C : nullptr,
                            tw ? tw + k * tw_stride : nullptr, tb ? tb + k * tb_stride : nullptr, ty + i * C);
            }
        });
    };
    with_has(run, w, std::false_type{}, tx, tw);
}

template <class T>
void normalise_adjoint(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, T* tdx) {
    const int64_t C = shape.C;
    const auto run = [&](auto has) {
        parallel_for(0, K * shape.rows, row_grain(C), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t k = i / shape.rows, row = i % shape.rows;
                adjoint_row(has, C, shape.centred, d.xhat + row * C, d.r[row], d.w,
                            has.tdy ? d.tdy + i * C : nullptr, d.dy ? d.dy + row * C : nullptr,
                            has.tx ? d.tx + i * C : nullptr, has.tw ? d.tw + k * d.tw_stride : nullptr,
                            tdx + i * C);
                if (d.so_far) add_row(C, d.so_far + i * C, tdx + i * C);
            }
        });
    };
    with_has(run, d.w, d.tdy, d.dy && d.tx, d.dy && d.tw);
}

template <class T>
void normalise_sums(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, double* weight_sums,
                    double* bias_sums) {
    const int64_t C = shape.C, rows = shape.rows;
    const auto run = [&](auto has) {
        sum_rows(
            K, rows, C, weight_sums, bias_sums, [&](int64_t k, int64_t row, double* weight, double* bias) {
                const int64_t at = (k * rows + row) * C;
                sums_row(has, C, shape.centred, d.xhat + row * C, d.r[row], has.tdy ? d.tdy + at : nullptr,
                         d.dy ? d.dy + row * C : nullptr, has.tx ? d.tx + at : nullptr, weight, bias);
            });
    };
    with_has(run, std::false_type{}, d.tdy, d.dy && d.tx, std::false_type{});
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
