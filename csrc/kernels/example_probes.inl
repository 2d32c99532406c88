// From the counter's bits to the signs of example_probes.h, for the CPU and CUDA.
#pragma once

#include <cstdint>

#include "counter.h"
#include "example_probes.h"

namespace flatcore::body {

FLATCORE_HOST_DEVICE uint64_t example_key(const ExampleBlock& block, int64_t probe, int64_t example) {
    const uint64_t key = row_key(block.seed, Stream::examples, block.first_probe + probe);
    return mix(key + (static_cast<uint64_t>(block.first_example + example) + 1) * kGolden);
}

// The sign that the lowest bit stands for; bit e % 64 of word e / 64 is element e's.
template <class T>
FLATCORE_HOST_DEVICE T example_sign(uint64_t bits) {
    return bits & 1 ? T(-1) : T(1);
}

}  // namespace flatcore::body
