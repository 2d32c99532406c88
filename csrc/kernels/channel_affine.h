// Batch normalisation with fixed statistics, y = (x - mean) * inverse_std * weight + bias per channel, in the
// sweeps. It is bilinear in x and weight, so the adjoint-tangent has cross terms:
//   ty  = a tx + xhat tweight + tbias            a = inverse_std * weight,  xhat = (x - mean) * inverse_std
//   tdx = a tdy + inverse_std tweight dy
//   tdweight = sum (xhat tdy + inverse_std tx dy),  tdbias = sum tdy
// Channels are the fastest axis: x, y, dy are (rows, C), directions (K, rows, C), all contiguous. Per-channel
// arrays are (C); per-channel directions have a stride between directions, for they lie in the flat vector.
#pragma once

#include <cstdint>

#include "row_pieces.h"

namespace flatcore {

template <class T>
struct ChannelAffine {
    int64_t rows, C;
    const T* mean;
    const T* inverse_std;
    const T* scale;  // a
    const T* bias;   // may be null
    const T* x;      // read where weight is active
};

template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y);

// tx, tweight, tbias may be null (not active).
template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight,
                            int64_t weight_stride, const T* tbias, int64_t bias_stride, T* ty);

// tdx = a tdy + inverse_std tweight dy. Either term may be absent: tdy null, or dy and tweight null.
template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy,
                            const T* tweight, int64_t weight_stride, T* tdx);

// Sums over the rows, in the kRowPieces pieces of row_pieces.h:
//   weight_sums[k, piece, c] = sum inverse_std ((x - mean) tdy + tx dy),  bias_sums[k, piece, c] = sum tdy.
// tdy may be null; tx and dy may be null together; either output may be null.
template <class T>
void channel_affine_sums(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy, const T* tx,
                         double* weight_sums, double* bias_sums);

#if defined(FLATCORE_WITH_CUDA) || defined(__CUDACC__) || defined(FLATCORE_CUDA_SHIM)
namespace cuda {
// The same four on a device; `stream` is a cudaStream_t. The sums within a piece are added in another order.
template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y, void* stream);
template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight,
                            int64_t weight_stride, const T* tbias, int64_t bias_stride, T* ty, void* stream);
template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy,
                            const T* tweight, int64_t weight_stride, T* tdx, void* stream);
template <class T>
void channel_affine_sums(const ChannelAffine<T>& op, int64_t K, const T* tdy, const T* dy, const T* tx,
                         double* weight_sums, double* bias_sums, void* stream);
}  // namespace cuda
#endif

}  // namespace flatcore
