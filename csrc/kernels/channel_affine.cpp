#include "channel_affine.h"

#include <algorithm>

#include "channel_affine.inl"
#include "macros.h"
#include "parallel.h"
#include "row_sums.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread below which a second thread costs more than it saves

int64_t row_grain(int64_t C) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)); }

// One row each; absent arrays are null.
template <class T>
FLATCORE_CLONES void tangent_row(int64_t C, const T* x, const T* scale, const T* z, const T* mean,
                                 const T* inverse_std, const T* slope, const T* shift, T* y) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c)
        y[c] = body::affine_tangent(c, x, scale, z, mean, inverse_std, slope, shift);
}

template <class T>
FLATCORE_CLONES void forward_row(int64_t C, const ChannelAffine<T>& op, const T* x, T* y) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) y[c] = body::affine_forward(c, x, op.mean, op.scale, op.bias);
}

template <class T>
FLATCORE_CLONES void adjoint_row(int64_t C, const T* tdy, const T* scale, const T* dy, const T* slope,
                                 const T* inverse_std, T* tdx) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) tdx[c] = body::affine_adjoint(c, tdy, scale, dy, slope, inverse_std);
}

template <class T>
FLATCORE_CLONES void add_row(int64_t C, const T* tdy, const T* x, const T* mean, const T* inverse_std,
                             const T* tx, const T* dy, double* weight_sums, double* bias_sums) {
    if (weight_sums) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
            weight_sums[c] +=
                static_cast<double>(body::affine_weight_term(c, tdy, x, mean, inverse_std, tx, dy));
    }
    if (bias_sums && tdy) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) bias_sums[c] += static_cast<double>(tdy[c]);
    }
}

}  // namespace

template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y) {
    parallel_for(0, op.rows, row_grain(op.C), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) forward_row(op.C, op, op.x + row * op.C, y + row * op.C);
    });
}

template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight,
                            int64_t weight_stride, const T* tbias, int64_t bias_stride, T* ty) {
    const int64_t rows = op.rows, C = op.C;
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t k = row / rows, r = row % rows;
            tangent_row<T>(C, tx ? tx + row * C : nullptr, op.scale, tweight ? op.x + r * C : nullptr,
                           op.mean, op.inverse_std, tweight ? tweight + k * weight_stride : nullptr,
                           tbias ? tbias + k * bias_stride : nullptr, ty + row * C);
        }
    });
}

template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy,
                            const T* tweight, int64_t weight_stride, T* tdx) {
    const int64_t rows = op.rows, C = op.C;
    parallel_for(0, K * rows, row_grain(C), [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t k = row / rows, r = row % rows;
            adjoint_row<T>(C, tdy ? tdy + row * C : nullptr, op.scale, dy ? dy + r * C : nullptr,
                           dy ? tweight + k * weight_stride : nullptr, op.inverse_std, tdx + row * C);
        }
    });
}

template <class T>
void channel_affine_sums(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy, const T* tx,
                         double* weight_sums, double* bias_sums) {
    const int64_t rows = op.rows, C = op.C;
    sum_rows(K, rows, C, weight_sums, bias_sums, [&](int64_t k, int64_t r, double* weight, double* bias) {
        const int64_t at = (k * rows + r) * C;
        add_row<T>(C, tdy ? tdy + at : nullptr, weight ? op.x + r * C : nullptr, op.mean, op.inverse_std,
                   dy ? tx + at : nullptr, dy ? dy + r * C : nullptr, weight, bias);
    });
}

#define INSTANTIATE(T)                                                                                   \
    template void channel_affine_forward(const ChannelAffine<T>&, T*);                                   \
    template void channel_affine_tangent(const ChannelAffine<T>&, int64_t, const T*, const T*, int64_t,  \
                                         const T*, int64_t, T*);                                         \
    template void channel_affine_adjoint(const ChannelAffine<T>&, int64_t, const T*, const T*, const T*, \
                                         int64_t, T*);                                                   \
    template void channel_affine_sums(const ChannelAffine<T>&, int64_t, const T*, const T*, const T*,    \
                                      double*, double*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
