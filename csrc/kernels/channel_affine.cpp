#include "channel_affine.h"

#include "macros.h"
#include "parallel.h"

namespace flatcore {
namespace {

constexpr int64_t kGrain = 8192;  // elements per thread below which a second thread costs more than it saves

int64_t grain(int64_t per_item) { return per_item >= kGrain ? 1 : kGrain / (per_item > 0 ? per_item : 1); }

// ty = scale * tx + shift + slope * (x - mean); slope = 0 where weight is not active.
template <class T>
FLATCORE_CLONES void tangent_plane(int64_t S, const T* tx, T scale, T shift, const T* x, T mean, T slope, T* ty) {
    if (tx && x) {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) ty[s] = scale * tx[s] + (slope * (x[s] - mean) + shift);
    } else if (tx) {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) ty[s] = scale * tx[s] + shift;
    } else if (x) {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) ty[s] = slope * (x[s] - mean) + shift;
    } else {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) ty[s] = shift;
    }
}

template <class T>
FLATCORE_CLONES void adjoint_plane(int64_t S, const T* tdy, T scale, const T* dy, T slope, T* tdx) {
    if (tdy && dy) {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) tdx[s] = scale * tdy[s] + slope * dy[s];
    } else if (tdy) {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) tdx[s] = scale * tdy[s];
    } else {
#pragma omp simd
        for (int64_t s = 0; s < S; ++s) tdx[s] = slope * dy[s];
    }
}

// Sums in the type itself over one plane; planes are added in double so that N does not enter the rounding error.
template <class T>
FLATCORE_CLONES T sum_plane(int64_t S, const T* a) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < S; ++s) sum += a[s];
    return sum;
}

template <class T>
FLATCORE_CLONES T centred_dot_plane(int64_t S, const T* a, const T* x, T mean) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < S; ++s) sum += a[s] * (x[s] - mean);
    return sum;
}

}  // namespace

template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y) {
    const auto [N, C, S] = op.shape;
    parallel_for(0, N * C, grain(S), [&, C = C, S = S](int64_t first, int64_t last) {
        for (int64_t plane = first; plane < last; ++plane) {
            const int64_t c = plane % C;
            const T shift = op.bias ? op.bias[c] : T(0);
            tangent_plane<T>(S, nullptr, T(0), shift, op.x + plane * S, op.mean[c], op.scale[c], y + plane * S);
        }
    });
}

template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight, int64_t weight_stride,
                            const T* tbias, int64_t bias_stride, T* ty) {
    const auto [N, C, S] = op.shape;
    parallel_for(0, K * N * C, grain(S), [&, N = N, C = C, S = S](int64_t first, int64_t last) {
        for (int64_t plane = first; plane < last; ++plane) {
            const int64_t k = plane / (N * C), place = plane % (N * C), c = place % C;
            const T shift = tbias ? tbias[k * bias_stride + c] : T(0);
            const T slope = tweight ? tweight[k * weight_stride + c] * op.inverse_std[c] : T(0);
            tangent_plane<T>(S, tx ? tx + plane * S : nullptr, op.scale[c], shift, tweight ? op.x + place * S : nullptr,
                             op.mean[c], slope, ty + plane * S);
        }
    });
}

template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const ChannelAffineAdjoint<T>& d) {
    const auto [N, C, S] = op.shape;
    // One task per (direction, channel): its sums need no other thread, so they do not depend on the thread count.
    parallel_for(0, K * C, grain(N * S), [&, N = N, C = C, S = S](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t k = task / C, c = task % C;
            const T slope = d.dy && d.tweight ? d.tweight[k * d.weight_stride + c] * op.inverse_std[c] : T(0);
            double weight_sum = 0, bias_sum = 0;
            for (int64_t n = 0; n < N; ++n) {
                const int64_t place = (n * C + c) * S, offset = k * N * C * S + place;
                const T* tdy = d.tdy ? d.tdy + offset : nullptr;
                const T* dy = d.dy && d.tweight ? d.dy + place : nullptr;
                if (d.tdx && (tdy || dy)) adjoint_plane<T>(S, tdy, op.scale[c], dy, slope, d.tdx + offset);
                if (d.tdweight && tdy) weight_sum += centred_dot_plane(S, tdy, op.x + place, op.mean[c]);
                if (d.tdweight && d.dy && d.tx) weight_sum += centred_dot_plane(S, d.dy + place, d.tx + offset, T(0));
                if (d.tdbias && tdy) bias_sum += sum_plane(S, tdy);
            }
            if (d.tdweight) d.tdweight[k * d.tdweight_stride + c] += static_cast<T>(weight_sum * op.inverse_std[c]);
            if (d.tdbias) d.tdbias[k * d.tdbias_stride + c] += static_cast<T>(bias_sum);
        }
    });
}

#define INSTANTIATE(T)                                                                                          \
    template void channel_affine_forward(const ChannelAffine<T>&, T*);                                          \
    template void channel_affine_tangent(const ChannelAffine<T>&, int64_t, const T*, const T*, int64_t, const T*, \
                                         int64_t, T*);                                                          \
    template void channel_affine_adjoint(const ChannelAffine<T>&, int64_t, const ChannelAffineAdjoint<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore
