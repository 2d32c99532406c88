// Random arrays and their comparison. Arrays have their exact size, so that the sanitizer sees the first
// access outside one.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "expect.h"

template <class T>
std::vector<T> numbers(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<T> normal(0, 2);
    std::vector<T> result(static_cast<size_t>(count));
    for (T& value : result) value = normal(generator);
    return result;
}

// Integers from 0 to bound - 1.
inline std::vector<int64_t> indices(int64_t count, int64_t bound, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int64_t> uniform(0, bound - 1);
    std::vector<int64_t> result(static_cast<size_t>(count));
    for (int64_t& value : result) value = uniform(generator);
    return result;
}

// Element by element as `agree` has it: bit for bit where no function of the C library comes in.
template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!agree(a[i], b[i])) return false;
    return a.size() == b.size();
}
