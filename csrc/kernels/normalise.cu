// The rows of normalise.h on a device, in the teams of cuda_rows.h, and the sums over them.
#include "normalise.h"

#include "cuda_rows.h"
#include "normalise.inl"

namespace flatcore::cuda {
namespace {

using body::Moments, body::NormaliseMeans;

struct Has {
    static constexpr bool w = true;  // else ones are loaded
    bool tdy, tx, tw;
};

// A pack as an array.
template <class T, int N>
struct Loaded {
    Pack<T, N> pack;
    __device__ T operator[](int64_t n) const { return pack.lane[n]; }
};

template <int N, class T>
__device__ Loaded<T, N> loaded(const T* p, int64_t c, T absent = T(0)) {
    return {load_or<N>(p, c, absent)};
}

template <class T>
__device__ const T* row_of(const T* p, int64_t row, int64_t stride) {
    return p ? p + row * stride : nullptr;
}

template <int N, class Team, class T>
__device__ Moments<T> moments(const NormShape& shape, const T* xhat, const T* t) {
    T sums[2] = {0, 0};
    for_packs<N, Team>(shape.C, [&](int64_t c) {
        const Pack<T, N> x = load<N>(xhat + c), value = load<N>(t + c);
        for (int n = 0; n < N; ++n) {
            sums[0] += value.lane[n];
            sums[1] += x.lane[n] * value.lane[n];
        }
    });
    add_up<Team>(sums);
    return body::moments_of_sums(shape.centred, shape.C, sums[0], sums[1]);
}

template <class T>
struct Forward {
    NormShape shape;
    T eps;
    const T *x, *w, *b;
    T *xhat, *r, *y;

    template <int N, class Team>
    __device__ void run(int64_t row) const {
        const int64_t C = shape.C;
        const T* in = x + row * C;
        T sum[1] = {0}, squares[1] = {0};
        if (shape.centred) {
            for_packs<N, Team>(C, [&](int64_t c) {
                const Pack<T, N> value = load<N>(in + c);
                for (int n = 0; n < N; ++n) sum[0] += value.lane[n];
            });
            add_up<Team>(sum);
        }
        const T mean = sum[0] / T(C);
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> value = load<N>(in + c);
            for (int n = 0; n < N; ++n) squares[0] += body::squared_deviation(value.lane[n], mean);
        });
        add_up<Team>(squares);
        const T inverse = body::inverse_deviation(squares[0], C, eps);
        if (Team::rank() == 0) r[row] = inverse;
        for_packs<N, Team>(C, [&](int64_t c) {
            const Pack<T, N> value = load<N>(in + c), weight = load_or<N>(w, c, T(1)),
                             bias = load_or<N>(b, c, T(0));
            Pack<T, N> normalised, out;
            for (int n = 0; n < N; ++n)
                body::normalise_forward(value.lane[n], mean, inverse, weight.lane[n], bias.lane[n],
                                        normalised.lane[n], out.lane[n]);
            store(xhat + row * C + c, normalised);
            store(y + row * C + c, out);
        });
    }
};

template <class T>
struct Tangent {
    NormShape shape;
    int64_t K;
    const T *xhat, *r, *w, *tx, *tw;
    int64_t tw_stride;
    const T* tb;
    int64_t tb_stride;
    T* ty;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const int64_t C = shape.C;
        const DirectionRow i = direction_row(task, K, shape.rows);
        const T *xhat_row = xhat + i.row * C, *tx_row = row_of(tx, i.at, C);
        const T *tw_k = row_of(tw, i.k, tw_stride), *tb_k = row_of(tb, i.k, tb_stride);
        const Moments<T> m = tx ? moments<N, Team>(shape, xhat_row, tx_row) : Moments<T>{0, 0};
        const Loaded<T, N> absent{};
        for_packs<N, Team>(C, [&](int64_t c) {
            const body::NormaliseRow<T, Loaded<T, N>, Has> row{{false, tx != nullptr, tw != nullptr},
                                                               loaded<N>(xhat_row, c),
                                                               loaded<N>(w, c, T(1)),
                                                               absent,
                                                               absent,
                                                               loaded<N>(tx_row, c),
                                                               loaded<N>(tw_k, c),
                                                               r[i.row],
                                                               m};
            const Pack<T, N> bias = load_or<N>(tb_k, c, T(0));
            Pack<T, N> out;
            for (int n = 0; n < N; ++n) out.lane[n] = body::normalise_tangent(row, n, bias.lane[n]);
            store(ty + i.at * C + c, out);
        });
    }
};

template <class T>
struct Adjoint {
    NormShape shape;
    int64_t K;
    NormaliseAdjoint<T> d;
    T* tdx;

    template <int N, class Team>
    __device__ void run(int64_t task) const {
        const int64_t C = shape.C;
        const DirectionRow i = direction_row(task, K, shape.rows);
        const Has has{d.tdy != nullptr, d.dy && d.tx, d.dy && d.tw};
        const T *xhat = d.xhat + i.row * C, *dy = row_of(d.dy, i.row, C), *tdy = row_of(d.tdy, i.at, C);
        const T* tx = has.tx ? d.tx + i.at * C : nullptr;
        const T* tw = has.tw ? d.tw + i.k * d.tw_stride : nullptr;
        const T r = d.r[i.row];
        const Moments<T> m = has.tx ? moments<N, Team>(shape, xhat, tx) : Moments<T>{0, 0};
        const auto row_at = [&](int64_t c) {
            return body::NormaliseRow<T, Loaded<T, N>, Has>{has,
                                                            loaded<N>(xhat, c),
                                                            loaded<N>(d.w, c, T(1)),
                                                            loaded<N>(tdy, c),
                                                            loaded<N>(dy, c),
                                                            loaded<N>(tx, c),
                                                            loaded<N>(tw, c),
                                                            r,
                                                            m};
        };
        T sums[4] = {0, 0, 0, 0};
        for_packs<N, Team>(C, [&](int64_t c) {
            const auto row = row_at(c);
            for (int n = 0; n < N; ++n) {
                const NormaliseMeans<T> terms = body::normalise_terms(row, n);
                sums[0] += terms.ta;
                sums[1] += terms.tB;
                sums[2] += terms.a;
                sums[3] += terms.B;
            }
        });
        add_up<Team>(sums);
        const auto means = body::normalise_means<T>(shape.centred, C, {sums[0], sums[1], sums[2], sums[3]});
        for_packs<N, Team>(C, [&](int64_t c) {
            const auto row = row_at(c);
            Pack<T, N> out;
            const Pack<T, N> before = load_or<N>(row_of(d.so_far, i.at, C), c, T(0));
            for (int n = 0; n < N; ++n) out.lane[n] = body::normalise_adjoint(row, n, means) + before.lane[n];
            store(tdx + i.at * C + c, out);
        });
    }
};

// A block owns the sums of one direction's piece of rows for kSlab columns. tx needs its rows' moments first:
// the block's warps make them for some rows at a time, over all columns, so that blocks of other columns do
// that again; what that costs are reads from the cache. Threads lie along the columns and, packs making them
// fewer, take rows in turn; their sums are added in the order of the rows' numbers.
constexpr int kSlab = 128;
constexpr int kMomentRows = 32;

template <class T, int N>
__global__ void __launch_bounds__(Warp::threads, kBlocksPerProcessor<T>)
    sums_kernel(NormShape shape, int64_t K, NormaliseAdjoint<T> d, double* weight_sums, double* bias_sums) {
    constexpr int kAcross = kSlab / N, kDown = Warp::threads / kAcross;
    FLATCORE_SHARED(Moments<T>, row_moments, kMomentRows);
    FLATCORE_SHARED(double, partial, Warp::threads * N * 2);
    const int64_t C = shape.C, slabs = ceil_div(C, kSlab), piece_rows = rows_in_piece(shape.rows);
    const Has has{d.tdy != nullptr, d.dy && d.tx, false};
    const int t = static_cast<int>(threadIdx.x), across = t % kAcross, down = t / kAcross;
    // Neighbouring blocks take the columns, then the directions of the same rows.
    for (int64_t task = blockIdx.x; task < kRowPieces * K * slabs; task += gridDim.x) {
        const int64_t c = task % slabs * kSlab + across * N;
        const int64_t k = task / slabs % K, piece = task / slabs / K;
        const int64_t begin = piece * piece_rows;
        const int64_t end = begin + piece_rows < shape.rows ? begin + piece_rows : shape.rows;
        double weight[N] = {}, bias[N] = {};
        for (int64_t first = begin; first < end; first += kMomentRows) {
            const int count = static_cast<int>(end - first < kMomentRows ? end - first : kMomentRows);
            if (has.tx && weight_sums) {
                for (int i = Warp::row(); i < count; i += Warp::rows) {
                    const int64_t row = first + i;
                    const Moments<T> m =
                        moments<N, Warp>(shape, d.xhat + row * C, d.tx + (k * shape.rows + row) * C);
                    if (Warp::rank() == 0) row_moments[i] = m;
                }
                __syncthreads();
            }
            for (int i = down; i < count && c < C; i += kDown) {
                const int64_t row = first + i, at = (k * shape.rows + row) * C;
                const Loaded<T, N> tdy = loaded<N>(has.tdy ? d.tdy + at : nullptr, c);
                if (weight_sums) {
                    const Loaded<T, N> absent{};
                    const body::NormaliseRow<T, Loaded<T, N>, Has> arrays{
                        has,
                        loaded<N>(d.xhat + row * C, c),
                        absent,
                        tdy,
                        loaded<N>(row_of(d.dy, row, C), c),
                        loaded<N>(has.tx ? d.tx + at : nullptr, c),
                        absent,
                        d.r[row],
                        has.tx ? row_moments[i] : Moments<T>{0, 0}};
                    for (int n = 0; n < N; ++n)
                        weight[n] += static_cast<double>(body::normalise_weight_term(arrays, n));
                }
                for (int n = 0; n < N; ++n) bias[n] += static_cast<double>(tdy[n]);
            }
            __syncthreads();  // the next moments must not arrive before these are read
        }
        for (int n = 0; n < N; ++n) {
            partial[(2 * n) * Warp::threads + t] = weight[n];
            partial[(2 * n + 1) * Warp::threads + t] = bias[n];
        }
        __syncthreads();
        if (down == 0 && c < C) {
            for (int n = 0; n < N; ++n) {
                for (int other = 1; other < kDown; ++other) {
                    weight[n] += partial[(2 * n) * Warp::threads + other * kAcross + t];
                    bias[n] += partial[(2 * n + 1) * Warp::threads + other * kAcross + t];
                }
                const int64_t at = (k * kRowPieces + piece) * C + c + n;
                if (weight_sums) weight_sums[at] = weight[n];
                if (bias_sums) bias_sums[at] = bias[n];
            }
        }
        __syncthreads();  // the next sums must not arrive before these are read
    }
}

}  // namespace

template <class T>
void normalise_forward(const NormShape& shape, double eps, const T* x, const T* w, const T* b, T* xhat, T* r,
                       T* y, void* stream) {
    launch_rows<T>(shape.rows, shape.C, fits_packs<T>({x, w, b, xhat, y}, {shape.C}), stream,
                   Forward<T>{shape, static_cast<T>(eps), x, w, b, xhat, r, y});
}

template <class T>
void normalise_tangent(const NormShape& shape, int64_t K, const T* xhat, const T* r, const T* w, const T* tx,
                       const T* tw, int64_t tw_stride, const T* tb, int64_t tb_stride, T* ty, void* stream) {
    launch_rows<T>(K * shape.rows, shape.C,
                   fits_packs<T>({xhat, w, tx, tw, tb, ty}, {shape.C, tw_stride, tb_stride}), stream,
                   Tangent<T>{shape, K, xhat, r, w, tx, tw, tw_stride, tb, tb_stride, ty});
}

template <class T>
void normalise_adjoint(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, T* tdx,
                       void* stream) {
    launch_rows<T>(
        K * shape.rows, shape.C,
        fits_packs<T>({d.xhat, d.w, d.tdy, d.dy, d.tx, d.tw, d.so_far, tdx}, {shape.C, d.tw_stride}), stream,
        Adjoint<T>{shape, K, d, tdx});
}

template <class T>
void normalise_sums(const NormShape& shape, int64_t K, const NormaliseAdjoint<T>& d, double* weight_sums,
                    double* bias_sums, void* stream) {
    const int64_t tasks = kRowPieces * K * ceil_div(shape.C, kSlab);
    if (tasks == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({d.xhat, d.tdy, d.dy, d.tx}, {shape.C}), [&](auto n) {
        launch(sums_kernel<T, decltype(n)::value>, dim3(static_cast<unsigned>(std::min(tasks, kRowBlocks))),
               dim3(Warp::threads), stream, shape, K, d, weight_sums, bias_sums);
    });
}

#define INSTANTIATE(T)                                                                                    \
    template void normalise_forward(const NormShape&, double, const T*, const T*, const T*, T*, T*, T*,   \
                                    void*);                                                               \
    template void normalise_tangent(const NormShape&, int64_t, const T*, const T*, const T*, const T*,    \
                                    const T*, int64_t, const T*, int64_t, T*, void*);                     \
    template void normalise_adjoint(const NormShape&, int64_t, const NormaliseAdjoint<T>&, T*, void*);    \
    template void normalise_sums(const NormShape&, int64_t, const NormaliseAdjoint<T>&, double*, double*, \
                                 void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
