// The loop bodies of pointwise.h at one index, shared by the CPU loops and the CUDA grids.
#pragma once

#include <cstdint>

#include "macros.h"

namespace flatcore::body {

template <class F, class T>
FLATCORE_HOST_DEVICE void unary_forward(int64_t i, const F& f, const T* z, T* y, T* d1, T* d2) {
    T value, first, second;
    f(z[i], value, first, second);
    y[i] = value;
    d1[i] = first;
    if constexpr (F::curved) d2[i] = second;
}

// One direction's d1 td + h t, the absent pair left out.
template <bool First, bool Second, class T>
FLATCORE_HOST_DEVICE T adjoint(int64_t i, const T* d1, const T* td, const T* h, const T* t) {
    if constexpr (First && Second) return d1[i] * td[i] + h[i] * t[i];
    if constexpr (First) return d1[i] * td[i];
    return h[i] * t[i];
}

}  // namespace flatcore::body
