// The row passes of attention.h on a device, in the teams of cuda_rows.h.
#include "attention.h"

#include "attention.inl"
#include "cuda_rows.h"

namespace flatcore::cuda {
namespace {

template <class T>
struct CausalMask {
    int64_t rows, C, first;
    T* z;

    template <int N, class Team>
    __device__ void run(int64_t i) const {
        const int64_t kept = body::causal_kept(C, first, i % rows);
        for (int64_t c = kept + Team::rank(); c < C; c += Team::size) z[i * C + c] = kLowest<T>;
    }
};

template <class T>
struct Backward {
    int64_t C;
    const T* p;
    T *dp, *dz;

    template <int N, class Team>
    __device__ void run(int64_t row) const {
        const T* p_row = p + row * C;
        T* u = dp + row * C;
        const T mean = dot<N, Team>(C, p_row, u);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c);
            Pack<T, N> d = load<N>(u + c), out;
            for (int n = 0; n < N; ++n) {
                out.lane[n] = body::softmax_centred(share.lane[n], d.lane[n], mean);
                d.lane[n] -= mean;
            }
            store(u + c, d);
            store(dz + row * C + c, out);
        });
    }
};

// w is computed twice rather than written and read again.
template <class T>
struct SecondOrder {
    int64_t C;
    const T *p, *u;
    bool tdp_is_zero;
    T *tz, *tdp;

    template <int N, class Team>
    __device__ void run(int64_t row) const {
        const T *p_row = p + row * C, *u_row = u + row * C;
        const T* given = tdp_is_zero ? nullptr : tdp + row * C;
        T* t_row = tz + row * C;
        const T mean = dot<N, Team>(C, p_row, t_row);
        T sum[1] = {0};
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), cotangent = load<N>(u_row + c),
                             t = load<N>(t_row + c), td = load_or<N>(given, c, T(0));
            for (int n = 0; n < N; ++n)
                sum[0] += share.lane[n] *
                          body::attention_second_order(td.lane[n], t.lane[n], mean, cotangent.lane[n]);
        });
        add_up<Team>(sum);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), cotangent = load<N>(u_row + c);
            Pack<T, N> t = load<N>(t_row + c), td = load_or<N>(given, c, T(0));
            for (int n = 0; n < N; ++n) {
                const T w = body::attention_second_order(td.lane[n], t.lane[n], mean, cotangent.lane[n]);
                t.lane[n] = body::softmax_centred(share.lane[n], t.lane[n], mean);
                td.lane[n] = body::softmax_centred(share.lane[n], w, sum[0]);
            }
            store(t_row + c, t);
            store(tdp + row * C + c, td);
        });
    }
};

}  // namespace

template <class T>
void causal_mask(int64_t heads, int64_t rows, int64_t C, int64_t first, T* z, void* stream) {
    // Most rows start to be masked anywhere, so single elements it is.
    launch_rows<T>(heads * rows, C, /*fit=*/false, stream, CausalMask<T>{rows, C, first, z});
}

template <class T>
void attention_backward(int64_t rows, int64_t C, const T* p, T* dp, T* dz, void* stream) {
    launch_rows<T>(rows, C, fits_packs<T>({p, dp, dz}, {C}), stream, Backward<T>{C, p, dp, dz});
}

template <class T>
void attention_second_order(int64_t rows, int64_t C, const T* p, const T* u, bool tdp_is_zero, T* tz, T* tdp,
                            void* stream) {
    launch_rows<T>(rows, C, fits_packs<T>({p, u, tz, tdp}, {C}), stream,
                   SecondOrder<T>{C, p, u, tdp_is_zero, tz, tdp});
}

#define INSTANTIATE(T)                                                           \
    template void causal_mask(int64_t, int64_t, int64_t, int64_t, T*, void*);    \
    template void attention_backward(int64_t, int64_t, const T*, T*, T*, void*); \
    template void attention_second_order(int64_t, int64_t, const T*, const T*, bool, T*, T*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
