// The counter-based generator behind all random probes: what comes out depends on the counters alone, so it
// is the same whatever the block it is drawn in, the number of threads and the device.
//
// It is the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", OOPSLA 2014, figure 15) applied to a counter that starts from a hash of its coordinates.
#pragma once

#include <cstdint>

#include "macros.h"

namespace flatcore {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;

FLATCORE_HOST_DEVICE uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

// What draws of the same seed for different purposes are kept apart by.
enum class Stream : uint64_t { signs = 0, normals = 1, examples = 2 };

FLATCORE_HOST_DEVICE uint64_t row_key(uint64_t seed, Stream stream, int64_t row) {
    return mix(mix(mix(seed + kGolden) + static_cast<uint64_t>(stream) * kGolden) +
               (static_cast<uint64_t>(row) + 1) * kGolden);
}

// The 64 bits at a position of a row; below a row, of one of its examples.
FLATCORE_HOST_DEVICE uint64_t word(uint64_t key, int64_t index) {
    return mix(key + (static_cast<uint64_t>(index) + 1) * kGolden);
}

}  // namespace flatcore
