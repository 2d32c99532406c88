// The formulas of normalise.h at one element, given the sums over its row.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace flatcore::body {

// mean(t) where centred, else 0, and mean(xhat t).
template <class T>
struct Moments {
    T mean, along;
};

template <class T>
FLATCORE_HOST_DEVICE Moments<T> moments_of_sums(bool centred, int64_t C, T sum, T along) {
    return {centred ? sum / T(C) : T(0), along / T(C)};
}

// Summed over the row.
template <class T>
FLATCORE_HOST_DEVICE T squared_deviation(T x, T mean) {
    return (x - mean) * (x - mean);
}

template <class T>
FLATCORE_HOST_DEVICE T inverse_deviation(T squares, int64_t C, T eps) {
    return T(1) / std::sqrt(squares / T(C) + eps);
}

template <class T>
FLATCORE_HOST_DEVICE void normalise_forward(T x, T mean, T r, T weight, T bias, T& xhat, T& y) {
    xhat = (x - mean) * r;
    y = xhat * weight + bias;
}

// What the sweeps read of a row. Elements are [c] of pointers or of what else has them; `has` says which of
// tdy, tx and tw are there, the last two only together with dy, as the adjoint sweeps need them. Without w
// the weight is 1.
template <class T, class Array, class Has>
struct NormaliseRow {
    Has has;
    Array xhat, w, tdy, dy, tx, tw;
    T r;
    Moments<T> m;  // of tx
};

template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE T normalised_tangent(const NormaliseRow<T, Array, Has>& row, int64_t c) {
    return row.r * (row.tx[c] - row.m.mean - row.xhat[c] * row.m.along);
}

template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE T normalise_tangent(const NormaliseRow<T, Array, Has>& row, int64_t c, T tb) {
    T value = tb;
    if (row.has.tx) value += normalised_tangent(row, c) * (row.has.w ? row.w[c] : T(1));
    if (row.has.tw) value += row.xhat[c] * row.tw[c];
    return value;
}

template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE T normalise_ta(const NormaliseRow<T, Array, Has>& row, int64_t c, T weight) {
    T ta = row.has.tdy ? row.tdy[c] * weight : T(0);
    if (row.has.tw) ta += row.dy[c] * row.tw[c];
    return ta;
}

// Over the row: of ta and a where centred, else 0; of ta xhat + a txhat, and of a xhat.
template <class T>
struct NormaliseMeans {
    T ta, tB, a, B;
};

// What an element adds to the sums of which normalise_means makes means.
template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE NormaliseMeans<T> normalise_terms(const NormaliseRow<T, Array, Has>& row, int64_t c) {
    const T weight = row.has.w ? row.w[c] : T(1);
    const T ta = normalise_ta(row, c, weight);
    T tB = ta * row.xhat[c], a = 0, B = 0;
    if (row.has.tx) {
        a = row.dy[c] * weight;
        B = a * row.xhat[c];
        tB += a * normalised_tangent(row, c);
    }
    return {ta, tB, a, B};
}

template <class T>
FLATCORE_HOST_DEVICE NormaliseMeans<T> normalise_means(bool centred, int64_t C, NormaliseMeans<T> sums) {
    const T scale = T(1) / T(C);
    return {centred ? sums.ta * scale : T(0), sums.tB * scale, centred ? sums.a * scale : T(0),
            sums.B * scale};
}

template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE T normalise_adjoint(const NormaliseRow<T, Array, Has>& row, int64_t c,
                                         const NormaliseMeans<T>& mean) {
    const T weight = row.has.w ? row.w[c] : T(1);
    T value = normalise_ta(row, c, weight) - mean.ta - row.xhat[c] * mean.tB;
    if (row.has.tx) {
        const T txhat = normalised_tangent(row, c);
        value -= txhat * mean.B + row.r * row.m.along * (row.dy[c] * weight - mean.a - row.xhat[c] * mean.B);
    }
    return row.r * value;
}

// What a row adds to tdw.
template <class T, class Array, class Has>
FLATCORE_HOST_DEVICE T normalise_weight_term(const NormaliseRow<T, Array, Has>& row, int64_t c) {
    T value = row.has.tdy ? row.tdy[c] * row.xhat[c] : T(0);
    if (row.has.tx) value += row.dy[c] * normalised_tangent(row, c);
    return value;
}

}  // namespace flatcore::body
