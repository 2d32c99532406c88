// Counter-based random rows (counter.h): an element depends on (seed, row, element) alone.
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
