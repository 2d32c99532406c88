// What the tests of row kernels share. Sums over rows of small integers are exact, so kernels that add in
// different orders still agree bit for bit.
#pragma once

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "arrays.h"

template <class T>
std::vector<T> integers(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> uniform(-3, 3);
    std::vector<T> result(static_cast<size_t>(count));
    for (T& value : result) value = static_cast<T>(uniform(generator));
    return result;
}

// A copy that begins `shift` elements behind a 16-byte boundary.
template <class T>
class Shifted {
 public:
    Shifted(const std::vector<T>& values, int64_t shift) : elements_(values), shift_(shift) {
        elements_.insert(elements_.begin(), static_cast<size_t>(shift), T(0));
    }
    T* data() { return elements_.data() + shift_; }
    std::vector<T> values() const { return {elements_.begin() + shift_, elements_.end()}; }

 private:
    std::vector<T> elements_;
    int64_t shift_;
};

struct RowsShape {
    int64_t K, rows, C, shift;
    int64_t shared() const { return rows * C; }
    int64_t directions() const { return K * rows * C; }
};

// Short rows for warps and long ones for blocks, of whole packs and not, aligned and not; more rows than an
// emulated grid has teams; empty ones.
template <class Test>
void for_row_shapes(const Test& test) {
    for (const int64_t C : {1, 31, 132})
        for (const int64_t shift : {0, 1}) test(RowsShape{3, 11, C, shift});
    test(RowsShape{2, 2, 1024, 0});
    test(RowsShape{2, 2, 1025, 0});
    for (const int64_t shift : {0, 1}) test(RowsShape{2, 2, 2052, shift});
    test(RowsShape{1, 29, 9, 0});
    test(RowsShape{0, 3, 8, 0});
    test(RowsShape{2, 0, 8, 0});
    test(RowsShape{2, 3, 0, 0});
}
