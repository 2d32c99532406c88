// The formulas of softmax.h at one element, given the sums over its row.
#pragma once

#include <cmath>

#include "macros.h"
#include "vector_math.h"

namespace flatcore::body {

template <class T>
FLATCORE_HOST_DEVICE T softmax_exponential(T z, T peak) {
    return std::exp(z - peak);
}

template <class T>
FLATCORE_HOST_DEVICE T log_sum_exp(T peak, T sum) {
    return peak + std::log(sum);
}

// p (t - <p, t>): tp of t = tz, dz of t = dp.
template <class T>
FLATCORE_HOST_DEVICE T softmax_centred(T p, T t, T mean) {
    return p * (t - mean);
}

// Summed over the row: <p, tdp> + <tp, dp>.
template <class T>
FLATCORE_HOST_DEVICE T softmax_adjoint_term(T p, T tdp, T dp, T tz, T tz_mean) {
    return p * ((tz - tz_mean) * dp + tdp);
}

template <class T>
FLATCORE_HOST_DEVICE T softmax_adjoint(T p, T tdp, T dp, T tz, T tz_mean, T dp_mean, T sum) {
    return p * (tdp - sum + (tz - tz_mean) * (dp - dp_mean));
}

}  // namespace flatcore::body
