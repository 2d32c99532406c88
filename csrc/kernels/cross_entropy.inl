// The formulas of cross_entropy.h at one element, given the sums over its row.
// A row's target is a function c -> m_c.
#pragma once

#include <cmath>
#include <cstdint>

#include "cross_entropy.h"
#include "macros.h"
#include "vector_math.h"

namespace flatcore::body {

template <class T>
struct RowOfMasses {
    const T* mass;
    FLATCORE_HOST_DEVICE T operator()(int64_t c) const { return mass[c]; }
};

// Compared, not looked up: any index is safe, and the loops stay without a special case.
template <class T>
struct RowOfOneClass {
    int64_t index;
    T mass;
    FLATCORE_HOST_DEVICE T operator()(int64_t c) const { return c == index ? mass : T(0); }
};

template <class T>
FLATCORE_HOST_DEVICE RowOfMasses<T> row_of(ClassMasses<T> target, int64_t r, int64_t C) {
    return {target.mass + r * C};
}

template <class T>
FLATCORE_HOST_DEVICE RowOfOneClass<T> row_of(OneClass<T> target, int64_t r, int64_t /*C*/) {
    return {target.index[r], target.mass[r]};
}

// Summed over the row: m_c (z_c - peak). Centred at the peak, for logsumexp(z) - z_c would cancel for large
// logits; without mass a logit may be -infinity.
template <class T>
FLATCORE_HOST_DEVICE T cross_entropy_term(T mass, T centred) {
    return mass != T(0) ? mass * centred : T(0);
}

// Of M, the sum of exp(z - peak), and the sum of the terms above.
template <class T>
FLATCORE_HOST_DEVICE T cross_entropy_loss(T total, T sum, T terms) {
    return total * std::log(sum) - terms;
}

template <class T, class Row>
FLATCORE_HOST_DEVICE T cross_entropy_gradient(T total, T p, const Row& m, int64_t c) {
    return total * p - m(c);
}

// curvature = dloss M
template <class T>
FLATCORE_HOST_DEVICE T cross_entropy_curvature(T curvature, T p, T tz, T mean) {
    return curvature * p * (tz - mean);
}

}  // namespace flatcore::body
