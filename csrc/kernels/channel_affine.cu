// The CUDA grids over the formulas of channel_affine.inl. A thread owns a pack of neighbouring channels of
// one row and passes over directions, so that x, dy and the channels' constants are read once for each slice
// of directions. The constants lie in flat vectors and may begin anywhere: they are read singly.
#include "channel_affine.h"

#include "channel_affine.inl"
#include "cuda_row_sums.h"

namespace flatcore::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(ChannelAffine<T> op, T* __restrict__ y) {
    for (int64_t row = first_row(); row < op.rows; row += row_stride())
        for (int64_t c = first_column() * N; c < op.C; c += column_stride() * N) {
            const auto x = load<N>(op.x + row * op.C + c), mean = load_singly<N>(op.mean + c),
                       scale = load_singly<N>(op.scale + c);
            const auto bias = op.bias ? load_singly<N>(op.bias + c) : Pack<T, N>{};
            Pack<T, N> result;
            for (int lane = 0; lane < N; ++lane)
                result.lane[lane] = body::affine_forward(lane, x.lane, mean.lane, scale.lane, bias.lane);
            store(y + row * op.C + c, result);
        }
}

template <int N, bool X, bool Weight, class T>
__global__ void __launch_bounds__(kThreads)
    tangent_kernel(ChannelAffine<T> op, int64_t K, const T* __restrict__ tx, const T* __restrict__ tweight,
                   int64_t weight_stride, const T* __restrict__ tbias, int64_t bias_stride,
                   T* __restrict__ ty) {
    for (int64_t row = first_row(); row < op.rows; row += row_stride())
        for (int64_t c = first_column() * N; c < op.C; c += column_stride() * N) {
            const auto z = load_or_zero<Weight, N>(op.x, row * op.C + c);
            const auto scale = load_singly<N>(op.scale + c), mean = load_singly<N>(op.mean + c),
                       inverse_std = load_singly<N>(op.inverse_std + c);
            for (int64_t k = blockIdx.z; k < K; k += gridDim.z) {
                const int64_t at = (k * op.rows + row) * op.C + c;
                const auto x = load_or_zero<X, N>(tx, at);
                Pack<T, N> slope{}, shift{}, result;
                if constexpr (Weight) slope = load_singly<N>(tweight + k * weight_stride + c);
                if (tbias) shift = load_singly<N>(tbias + k * bias_stride + c);
                for (int lane = 0; lane < N; ++lane)
                    result.lane[lane] = body::affine_tangent(lane, X ? x.lane : nullptr, scale.lane,
                                                             Weight ? z.lane : nullptr, mean.lane,
                                                             inverse_std.lane, slope.lane, shift.lane);
                store(ty + at, result);
            }
        }
}

template <int N, bool First, bool Cross, class T>
__global__ void __launch_bounds__(kThreads)
    adjoint_kernel(ChannelAffine<T> op, int64_t K, const T* __restrict__ tdy, const T* __restrict__ dy,
                   const T* __restrict__ tweight, int64_t weight_stride, T* __restrict__ tdx) {
    for (int64_t row = first_row(); row < op.rows; row += row_stride())
        for (int64_t c = first_column() * N; c < op.C; c += column_stride() * N) {
            const auto backward = load_or_zero<Cross, N>(dy, row * op.C + c);
            const auto scale = load_singly<N>(op.scale + c), inverse_std = load_singly<N>(op.inverse_std + c);
            for (int64_t k = blockIdx.z; k < K; k += gridDim.z) {
                const int64_t at = (k * op.rows + row) * op.C + c;
                const auto first = load_or_zero<First, N>(tdy, at);
                Pack<T, N> slope{}, result;
                if constexpr (Cross) slope = load_singly<N>(tweight + k * weight_stride + c);
                for (int lane = 0; lane < N; ++lane)
                    result.lane[lane] =
                        body::affine_adjoint(lane, First ? first.lane : nullptr, scale.lane,
                                             Cross ? backward.lane : nullptr, slope.lane, inverse_std.lane);
                store(tdx + at, result);
            }
        }
}

// What a row of a direction adds at channel c.
template <class T>
struct AddRow {
    ChannelAffine<T> op;
    const T *tdy, *dy, *tx;
    bool weight;

    __device__ void operator()(int64_t k, int64_t row, int64_t c, double& weight_sum,
                               double& bias_sum) const {
        const int64_t at = (k * op.rows + row) * op.C;
        const T* tdy_row = tdy ? tdy + at : nullptr;
        if (weight)
            weight_sum += static_cast<double>(body::affine_weight_term(c, tdy_row, op.x + row * op.C, op.mean,
                                                                       op.inverse_std, dy ? tx + at : nullptr,
                                                                       dy ? dy + row * op.C : nullptr));
        if (tdy_row) bias_sum += static_cast<double>(tdy_row[c]);
    }
};

// body(first, second) with each of two flags as a constant; at least one is set where there is work.
template <class Body>
void with_flags(bool first, bool second, const Body& body) {
    if (first && second)
        body(std::true_type{}, std::true_type{});
    else if (first)
        body(std::true_type{}, std::false_type{});
    else if (second)
        body(std::false_type{}, std::true_type{});
    else
        body(std::false_type{}, std::false_type{});
}

}  // namespace

template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y, void* stream) {
    if (op.rows == 0 || op.C == 0) return;  // an empty grid is an error
    with_packs<T>(fits_packs<T>({op.x, y}, {op.C}), [&](auto lanes) {
        constexpr int N = lanes.value;
        const auto [grid, block] = rows_layout(op.rows, op.C / N, 1);
        launch(forward_kernel<N, T>, grid, block, stream, op, y);
    });
}

template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight,
                            int64_t weight_stride, const T* tbias, int64_t bias_stride, T* ty, void* stream) {
    if (op.rows == 0 || op.C == 0 || K == 0) return;
    const bool fit = fits_packs<T>({tx, tweight ? op.x : nullptr, ty}, {op.C});
    with_packs<T>(fit, [&](auto lanes) {
        with_flags(tx, tweight, [&](auto x, auto weight) {
            constexpr int N = lanes.value;
            const auto [grid, block] = rows_layout(op.rows, op.C / N, K);
            launch(tangent_kernel<N, x.value, weight.value, T>, grid, block, stream, op, K, tx, tweight,
                   weight_stride, tbias, bias_stride, ty);
        });
    });
}

template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy,
                            const T* tweight, int64_t weight_stride, T* tdx, void* stream) {
    if (op.rows == 0 || op.C == 0 || K == 0) return;
    with_packs<T>(fits_packs<T>({tdy, dy, tdx}, {op.C}), [&](auto lanes) {
        with_flags(tdy, dy, [&](auto first, auto cross) {
            constexpr int N = lanes.value;
            const auto [grid, block] = rows_layout(op.rows, op.C / N, K);
            launch(adjoint_kernel<N, first.value, cross.value, T>, grid, block, stream, op, K, tdy, dy,
                   tweight, weight_stride, tdx);
        });
    });
}

template <class T>
void channel_affine_sums(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy, const T* tx,
                         double* weight_sums, double* bias_sums, void* stream) {
    sum_rows(K, op.rows, op.C, weight_sums, bias_sums, AddRow<T>{op, tdy, dy, tx, weight_sums != nullptr},
             stream);
}

#define INSTANTIATE(T)                                                                                   \
    template void channel_affine_forward(const ChannelAffine<T>&, T*, void*);                            \
    template void channel_affine_tangent(const ChannelAffine<T>&, int64_t, const T*, const T*, int64_t,  \
                                         const T*, int64_t, T*, void*);                                  \
    template void channel_affine_adjoint(const ChannelAffine<T>&, int64_t, const T*, const T*, const T*, \
                                         int64_t, T*, void*);                                            \
    template void channel_affine_sums(const ChannelAffine<T>&, int64_t, const T*, const T*, const T*,    \
                                      double*, double*, void*);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace flatcore::cuda
