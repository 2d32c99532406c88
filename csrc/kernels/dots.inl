// The terms of dot products, for the CPU and CUDA: in double whatever the type, so that the product of two
// floats is exact.
#pragma once

#include "macros.h"

namespace flatcore::body {

template <class T>
FLATCORE_HOST_DEVICE double dot_term(T a, T b) {
    return static_cast<double>(a) * static_cast<double>(b);
}

template <class T>
FLATCORE_HOST_DEVICE double dot_term(T w, T a, T b) {
    return static_cast<double>(w) * dot_term(a, b);
}

}  // namespace flatcore::body
