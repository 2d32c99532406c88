// Batch normalisation in eval mode, y = (x - mean) * inverse_std * weight + bias per channel, through the sweeps.
// It is bilinear in x and weight, so the adjoint-tangent has cross terms:
//   ty  = a tx + xhat tweight + tbias                a = inverse_std * weight,  xhat = (x - mean) * inverse_std
//   tdx = a tdy + inverse_std tweight dy
//   tdweight = sum (xhat tdy + inverse_std tx dy)    tdbias = sum tdy
// x, y, dy are (N, C, S) contiguous, S the product of the axes behind the channel; directions have K in front;
// per-channel arrays are (C), per-channel directions have stride `stride` between directions.
#pragma once

#include <cstdint>

namespace flatcore {

struct ChannelShape {
    int64_t N, C, S;
};

template <class T>
struct ChannelAffine {
    ChannelShape shape;
    const T* mean;
    const T* inverse_std;
    const T* scale;  // a
    const T* bias;   // may be null
    const T* x;      // may be null where weight is not active
};

template <class T>
void channel_affine_forward(const ChannelAffine<T>& op, T* y);

// tx, tweight, tbias may be null (not active).
template <class T>
void channel_affine_tangent(const ChannelAffine<T>& op, int64_t K, const T* tx, const T* tweight, int64_t weight_stride,
                            const T* tbias, int64_t bias_stride, T* ty);

// tdy may be null (zero). dy null leaves the second-derivative terms out. tdx is written; tdweight and tdbias are
// added to. Any of tdx, tdweight, tdbias may be null (not wanted).
template <class T>
struct ChannelAffineAdjoint {
    const T* tdy;
    const T* dy;
    const T* tx;
    const T* tweight;
    int64_t weight_stride;  // of tweight
    T* tdx;
    T* tdweight;
    int64_t tdweight_stride;
    T* tdbias;
    int64_t tdbias_stride;
};

template <class T>
void channel_affine_adjoint(const ChannelAffine<T>& op, int64_t K, const ChannelAffineAdjoint<T>& d);

}  // namespace flatcore
