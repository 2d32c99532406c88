// The least of a test framework: counts what does not hold and says where. And what makes the tests of the
// emulation run on a GPU as they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

inline int failures = 0;

#define EXPECT(condition)                                                         \
    do {                                                                          \
        if (!(condition)) {                                                       \
            std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            ++failures;                                                           \
        }                                                                         \
    } while (false)

#if defined(__CUDACC__)
namespace flatcore::cuda {
// A device orders its threads itself: the second order is a second run.
enum class Order { forward, backward };
inline Order thread_order = Order::forward;
}  // namespace flatcore::cuda
#endif

// Do two runs of one formula agree? Emulated, bit for bit, but for the sign of zero and of NaN. On a GPU all
// arithmetic does too, for the tests are compiled without fused multiply-adds; but exp, log, erf and the like
// come from two libraries, each with an error of at most 2 ulps, so up to 4 lie between them, which the
// formulas here, at arguments below 8 in magnitude, multiply by at most 16.
template <class T>
bool agree(T a, T b) {
    if (a == b || (std::isnan(a) && std::isnan(b))) return true;
#if defined(__CUDACC__)
    return std::isfinite(a) && std::isfinite(b) &&
           std::abs(a - b) <= T(64) * std::numeric_limits<T>::epsilon() * std::max(T(1), std::abs(b));
#else
    return false;
#endif
}
