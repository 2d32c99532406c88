// From the counter's bits to the numbers of probes.h, for the CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "counter.h"

namespace flatcore::body {

// Sign j of a word, one of 64.
template <class T>
FLATCORE_HOST_DEVICE T rademacher_sign(uint64_t bits, int64_t j) {
    return ((bits >> j) & 1) ? T(1) : T(-1);
}

// Uniform on (0, 1], 53 bits; never 0, so its logarithm is finite.
FLATCORE_HOST_DEVICE double uniform(uint64_t bits) {
    return static_cast<double>((bits >> 11) + 1) * 0x1.0p-53;
}

struct NormalPair {
    double even, odd;
};

// Elements 2 pair and 2 pair + 1 of a row.
FLATCORE_HOST_DEVICE NormalPair normal_pair(uint64_t key, int64_t pair) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(word(key, 2 * pair))));
    const double angle = 2.0 * M_PI * uniform(word(key, 2 * pair + 1));
    return {radius * std::cos(angle), radius * std::sin(angle)};
}

}  // namespace flatcore::body
