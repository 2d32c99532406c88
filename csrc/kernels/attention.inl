// The formulas of attention.h at one element, given the sums over its row; those it shares with softmax.h are
// in softmax.inl.
#pragma once

#include <cstdint>

#include "macros.h"
#include "softmax.inl"

namespace flatcore::body {

// The logits that a row keeps, `row` counted from the first row of the tile.
FLATCORE_HOST_DEVICE int64_t causal_kept(int64_t C, int64_t first, int64_t row) {
    return first + row + 1 < C ? first + row + 1 : C;
}

// w of which tdz = p (w - <p, w>); u = dp - <p, dp>.
template <class T>
FLATCORE_HOST_DEVICE T attention_second_order(T tdp, T tz, T tz_mean, T u) {
    return tdp + (tz - tz_mean) * u;
}

}  // namespace flatcore::body
