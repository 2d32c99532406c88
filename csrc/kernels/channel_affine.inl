// The formulas of channel_affine.h at one index, shared by the CPU loops and the CUDA grids. Absent arrays
// are null.
#pragma once

#include <cstdint>

#include "macros.h"

namespace flatcore::body {

template <class T>
FLATCORE_HOST_DEVICE T affine_forward(int64_t c, const T* x, const T* mean, const T* scale, const T* bias) {
    return (x[c] - mean[c]) * scale[c] + (bias ? bias[c] : T(0));
}

// scale x + slope ((z - mean) inverse_std) + shift
template <class T>
FLATCORE_HOST_DEVICE T affine_tangent(int64_t c, const T* x, const T* scale, const T* z, const T* mean,
                                      const T* inverse_std, const T* slope, const T* shift) {
    T value = shift ? shift[c] : T(0);
    if (x) value += scale[c] * x[c];
    if (z) value += slope[c] * ((z[c] - mean[c]) * inverse_std[c]);
    return value;
}

// scale tdy + slope inverse_std dy
template <class T>
FLATCORE_HOST_DEVICE T affine_adjoint(int64_t c, const T* tdy, const T* scale, const T* dy, const T* slope,
                                      const T* inverse_std) {
    T value = tdy ? scale[c] * tdy[c] : T(0);
    if (dy) value += slope[c] * inverse_std[c] * dy[c];
    return value;
}

// inverse_std ((x - mean) tdy + tx dy), what one row adds to the weight's sum.
template <class T>
FLATCORE_HOST_DEVICE T affine_weight_term(int64_t c, const T* tdy, const T* x, const T* mean,
                                          const T* inverse_std, const T* tx, const T* dy) {
    T value = tdy ? (x[c] - mean[c]) * tdy[c] : T(0);
    if (dy) value += tx[c] * dy[c];
    return inverse_std[c] * value;
}

}  // namespace flatcore::body
