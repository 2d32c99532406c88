// How much one call of a library may be asked for: cuBLAS and many kernels of ATen for a GPU count in 32
// bits, and refuse more or go wrong. What is larger is done in pieces.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace flatcore {

// The most elements, or entries along an axis, on the tensor's device.
int64_t most_counted(const at::Tensor& t);

// For tests: the same for every device; 0 for what it is.
void set_most_counted(int64_t most);

// Calls body(first, count) for pieces of an axis with so many entries, as long as `most` elements allow; once
// where there are none.
template <class Body>
void in_pieces(int64_t entries, int64_t elements_of_one, int64_t most, const Body& body) {
    const int64_t step = std::max<int64_t>(1, most / std::max<int64_t>(1, elements_of_one));
    int64_t first = 0;
    do {
        body(first, std::min(step, entries - first));
        first += step;
    } while (first < entries);
}

}  // namespace flatcore
