// Matrices rounded to bfloat16, in pairs of neighbouring elements along the axis that a product sums over:
// what the processors' bfloat16 instructions multiply and add at once.
#pragma once

#include <cstdint>

namespace flatcore {

// An operand of a product: element (i, k) of a matrix is data[i * stride_i + k * stride_k].
struct PairSource {
    const float* data;
    int64_t stride_i, stride_k;
};

// Where its pairs go: elements (i, 2 p) and (i, 2 p + 1), in this order, to data[i * stride_i + p *
// stride_p].
struct PairTarget {
    uint32_t* data;
    int64_t stride_i, stride_p;
};

// Rounds to nearest, ties to even; nan stays nan, what is too large becomes infinite. An odd element at the
// end is paired with zero. Fast where one stride on either side is 1.
void round_to_pairs(int64_t count_i, int64_t count_k, const PairSource& source, const PairTarget& target);

}  // namespace flatcore
