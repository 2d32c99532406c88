// Counter-based random rows: an element depends on (seed, row, element) alone, so a probe is the same
// whatever the block it is drawn in, the number of threads and the device.
//
// The generator is the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
// number generators", OOPSLA 2014, figure 15) applied to a counter that starts from a hash of (seed, stream,
// row).
#pragma once

#include <cstdint>

namespace flatcore {

// out (K, P), contiguous: independent signs, +1 or -1 with probability 1/2 each; row k is probe number first
// + k.
template <class T>
void rademacher_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out);

// out (K, P), contiguous: independent standard normal numbers (Box-Muller); row k is row number first + k.
template <class T>
void normal_rows(uint64_t seed, int64_t first, int64_t K, int64_t P, T* out);

}  // namespace flatcore
