// The rows of softmax.h on a device, in the teams of cuda_rows.h.
#include "cuda_rows.h"
#include "softmax.h"
#include "softmax.inl"

namespace flatcore::cuda {
namespace {

template <class T>
struct Forward {
    int64_t C;
    const T* z;
    T *p, *log_sum;

    template <int N, class Team>
    __device__ void run(int64_t row) const {
        const T* in = z + row * C;
        T* out = p + row * C;
        const auto [peak, sum] = peak_sum<N, Team>(C, in);
        const bool empty = peak == kLowest<T>;
        const T scale = T(1) / sum;
        for_packs<N, Team>(C, [&, peak = peak](int64_t c) {
            Pack<T, N> x = load<N>(in + c);
            for (T& value : x.lane) value = empty ? T(0) : body::softmax_exponential(value, peak) * scale;
            store(out + c, x);
        });
        if (log_sum && Team::rank() == 0) log_sum[row] = empty ? kLowest<T> : body::log_sum_exp(peak, sum);
    }
};

// Also the adjoint without second-derivative terms.
template <class T>
struct Centred {
    int64_t K, rows, C;
    const T *p, *t;
    T* out;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const DirectionRow i = direction_row(task, K, rows);
        const T *p_row = p + i.row * C, *t_row = t + i.at * C;
        const T mean = dot<N, Team>(C, p_row, t_row);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c);
            Pack<T, N> value = load<N>(t_row + c);
            for (int n = 0; n < N; ++n)
                value.lane[n] = body::softmax_centred(share.lane[n], value.lane[n], mean);
            store(out + i.at * C + c, value);
        });
    }
};

template <class T>
struct Adjoint {
    int64_t K, rows, C;
    const T *p, *tdp, *dp, *tz;
    T* tdz;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const DirectionRow i = direction_row(task, K, rows);
        const T *p_row = p + i.row * C, *dp_row = dp + i.row * C, *tz_row = tz + i.at * C;
        const T* tdp_row = tdp ? tdp + i.at * C : nullptr;
        T means[2] = {0, 0};
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), d = load<N>(dp_row + c), t = load<N>(tz_row + c);
            for (int n = 0; n < N; ++n) {
                means[0] += share.lane[n] * d.lane[n];
                means[1] += share.lane[n] * t.lane[n];
            }
        });
        add_up<Team>(means);
        T sum[1] = {0};
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), d = load<N>(dp_row + c), t = load<N>(tz_row + c),
                             td = load_or<N>(tdp_row, c, T(0));
            for (int n = 0; n < N; ++n)
                sum[0] +=
                    body::softmax_adjoint_term(share.lane[n], td.lane[n], d.lane[n], t.lane[n], means[1]);
        });
        add_up<Team>(sum);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), d = load<N>(dp_row + c), t = load<N>(tz_row + c),
                             td = load_or<N>(tdp_row, c, T(0));
            Pack<T, N> value;
            for (int n = 0; n < N; ++n)
                value.lane[n] = body::softmax_adjoint(share.lane[n], td.lane[n], d.lane[n], t.lane[n],
                                                      means[1], means[0], sum[0]);
            store(tdz + i.at * C + c, value);
        });
    }
};

}  // namespace

template <class T>
void softmax_forward(int64_t rows, int64_t C, const T* z, T* p, T* log_sum, void* stream) {
    launch_rows<T>(rows, C, fits_packs<T>({z, p}, {C}), stream, Forward<T>{C, z, p, log_sum});
}

template <class T>
void softmax_tangent(int64_t K, int64_t rows, int64_t C, const T* p, const T* tz, T* tp, void* stream) {
    launch_rows<T>(K * rows, C, fits_packs<T>({p, tz, tp}, {C}), stream, Centred<T>{K, rows, C, p, tz, tp});
}

template <class T>
void softmax_adjoint(int64_t K, int64_t rows, int64_t C, const T* p, const T* tdp, const T* dp, const T* tz,
                     T* tdz, void* stream) {
    const bool fit = fits_packs<T>({p, tdp, dp, tz, tdz}, {C});
    if (dp)
        launch_rows<T>(K * rows, C, fit, stream, Adjoint<T>{K, rows, C, p, tdp, dp, tz, tdz});
    else
        launch_rows<T>(K * rows, C, fit, stream, Centred<T>{K, rows, C, p, tdp, tdz});
}

#define INSTANTIATE(T)                                                                                   \
    template void softmax_forward(int64_t, int64_t, const T*, T*, T*, void*);                            \
    template void softmax_tangent(int64_t, int64_t, int64_t, const T*, const T*, T*, void*);             \
    template void softmax_adjoint(int64_t, int64_t, int64_t, const T*, const T*, const T*, const T*, T*, \
                                  void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
