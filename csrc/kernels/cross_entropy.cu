// The rows of cross_entropy.h on a device, in the teams of cuda_rows.h.
#include "cross_entropy.h"

#include "cross_entropy.inl"
#include "cuda_rows.h"

namespace flatcore::cuda {
namespace {

template <class T, int N>
struct LoadedMasses {
    Pack<T, N> mass;
    __device__ T operator()(int64_t n) const { return mass.lane[n]; }
};

// The function n -> m_{c + n} for the elements n of the pack at c.
template <int N, class T>
__device__ LoadedMasses<T, N> target_at(const body::RowOfMasses<T>& m, int64_t c) {
    return {load<N>(m.mass + c)};
}

template <int N, class T>
__device__ body::RowOfOneClass<T> target_at(const body::RowOfOneClass<T>& m, int64_t c) {
    return {m.index - c, m.mass};
}

// What packs of masses are loaded from.
template <class T>
const T* masses_of_classes(ClassMasses<T> target) {
    return target.mass;
}

template <class T>
const T* masses_of_classes(OneClass<T>) {
    return nullptr;
}

template <class T, class Target>
struct Forward {
    int64_t C;
    const T* z;
    Target target;
    T *loss, *p, *total;

    template <int N, class Team>
    __device__ void run(int64_t row) const {
        const T* in = z + row * C;
        const auto m = body::row_of(target, row, C);
        const auto [peak, sum] = peak_sum<N, Team>(C, in);
        const T scale = T(1) / sum;
        T sums[2] = {0, 0};  // of the masses, of the terms
        for_packs<N, Team>(C, [&, peak = peak](int64_t c) {
            Pack<T, N> x = load<N>(in + c);
            const auto target_of = target_at<N>(m, c);
            for (int n = 0; n < N; ++n) {
                const T centred = x.lane[n] - peak, mass = target_of(n);
                sums[0] += mass;
                sums[1] += body::cross_entropy_term(mass, centred);
                x.lane[n] = std::exp(centred) * scale;
            }
            store(p + row * C + c, x);
        });
        add_up<Team>(sums);
        if (Team::rank() == 0) {
            loss[row] = body::cross_entropy_loss(sums[0], sum, sums[1]);
            if (total) total[row] = sums[0];
        }
    }
};

template <class T, class Target>
struct Tangent {
    int64_t K, rows, C;
    Target target;
    const T *p, *total, *tz;
    T* tloss;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const DirectionRow i = direction_row(task, K, rows);
        const auto m = body::row_of(target, i.row, C);
        const T M = total[i.row];
        T sum[1] = {0};
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p + i.row * C + c), t = load<N>(tz + i.at * C + c);
            const auto target_of = target_at<N>(m, c);
            for (int n = 0; n < N; ++n)
                sum[0] += body::cross_entropy_gradient(M, share.lane[n], target_of, n) * t.lane[n];
        });
        add_up<Team>(sum);
        if (Team::rank() == 0) tloss[i.at] = sum[0];
    }
};

template <class T, class Target>
struct Adjoint {
    int64_t K, rows, C;
    Target target;
    const T *p, *total, *tdloss, *dloss, *tz;
    T* out;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const DirectionRow i = direction_row(task, K, rows);
        const auto m = body::row_of(target, i.row, C);
        const T* p_row = p + i.row * C;
        const T* t_row = tz ? tz + i.at * C : nullptr;
        const T M = total[i.row], td = tdloss ? tdloss[i.at] : T(0);
        const T mean = tz ? dot<N, Team>(C, p_row, t_row) : T(0);
        const T curvature = tz ? dloss[i.row] * M : T(0);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> share = load<N>(p_row + c), t = load_or<N>(t_row, c, T(0));
            const auto target_of = target_at<N>(m, c);
            Pack<T, N> value;
            for (int n = 0; n < N; ++n) {
                const T second =
                    tz ? body::cross_entropy_curvature(curvature, share.lane[n], t.lane[n], mean) : T(0);
                value.lane[n] = td * body::cross_entropy_gradient(M, share.lane[n], target_of, n) + second;
            }
            store(out + i.at * C + c, value);
        });
    }
};

}  // namespace

template <class T, class Target>
void cross_entropy_forward(int64_t rows, int64_t C, const T* z, Target target, T* loss, T* p, T* total,
                           void* stream) {
    launch_rows<T>(rows, C, fits_packs<T>({z, p, masses_of_classes(target)}, {C}), stream,
                   Forward<T, Target>{C, z, target, loss, p, total});
}

template <class T, class Target>
void cross_entropy_tangent(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tz, T* tloss, void* stream) {
    launch_rows<T>(K * rows, C, fits_packs<T>({p, tz, masses_of_classes(target)}, {C}), stream,
                   Tangent<T, Target>{K, rows, C, target, p, total, tz, tloss});
}

template <class T, class Target>
void cross_entropy_adjoint(int64_t K, int64_t rows, int64_t C, Target target, const T* p, const T* total,
                           const T* tdloss, const T* dloss, const T* tz, T* out, void* stream) {
    launch_rows<T>(K * rows, C, fits_packs<T>({p, tz, out, masses_of_classes(target)}, {C}), stream,
                   Adjoint<T, Target>{K, rows, C, target, p, total, tdloss, dloss, tz, out});
}

#define INSTANTIATE(T, Target)                                                                               \
    template void cross_entropy_forward(int64_t, int64_t, const T*, Target, T*, T*, T*, void*);              \
    template void cross_entropy_tangent(int64_t, int64_t, int64_t, Target, const T*, const T*, const T*, T*, \
                                        void*);                                                              \
    template void cross_entropy_adjoint(int64_t, int64_t, int64_t, Target, const T*, const T*, const T*,     \
                                        const T*, const T*, T*, void*);
INSTANTIATE(float, ClassMasses<float>)
INSTANTIATE(double, ClassMasses<double>)
INSTANTIATE(float, OneClass<float>)
INSTANTIATE(double, OneClass<double>)
#undef INSTANTIATE

}  // namespace flatcore::cuda
