// Matrix products in pieces that a library can count.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "counted.h"

namespace flatcore {

// multiply(c, a, b, accumulate) for pieces of c = a b, or c += a b: matrices, or batches of them. No axis of
// a piece has more than `most` entries, nor more elements from one entry to the next: leading dimensions.
template <class Multiply>
void multiply_in_pieces(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                        int64_t most, const Multiply& multiply) {
    const auto beyond = [most](const at::Tensor& t, int64_t axis) {
        return t.size(axis) > 1 && std::max(t.size(axis), t.stride(axis)) > most;
    };
    const auto halves = [](int64_t size, const auto& part) {
        part(0, size / 2);
        part(size / 2, size - size / 2);
    };
    const auto again = [&](const at::Tensor& part_of_c, const at::Tensor& part_of_a,
                           const at::Tensor& part_of_b, bool add) {
        multiply_in_pieces(part_of_c, part_of_a, part_of_b, add, most, multiply);
    };
    if (c.dim() == 3 && (beyond(c, 0) || beyond(a, 0) || beyond(b, 0)))
        halves(c.size(0), [&](int64_t first, int64_t count) {
            again(c.narrow(0, first, count), a.narrow(0, first, count), b.narrow(0, first, count),
                  accumulate);
        });
    else if (beyond(c, -2) || beyond(a, -2))
        halves(c.size(-2), [&](int64_t first, int64_t count) {
            again(c.narrow(-2, first, count), a.narrow(-2, first, count), b, accumulate);
        });
    else if (beyond(c, -1) || beyond(b, -1))
        halves(c.size(-1), [&](int64_t first, int64_t count) {
            again(c.narrow(-1, first, count), a, b.narrow(-1, first, count), accumulate);
        });
    else if (beyond(a, -1) || beyond(b, -2))
        halves(a.size(-1), [&](int64_t first, int64_t count) {
            again(c, a.narrow(-1, first, count), b.narrow(-2, first, count), accumulate || first > 0);
        });
    else
        multiply(c, a, b, accumulate);
}

// As much as the device of c allows.
template <class Multiply>
void multiply_in_pieces(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                        const Multiply& multiply) {
    multiply_in_pieces(c, a, b, accumulate, most_counted(c), multiply);
}

}  // namespace flatcore
