// The least of a test framework: counts what does not hold and says where. And what makes the tests of the
// emulation run on a GPU as they are.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <span>

#include "kernels/cuda_launch.h"

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

// The orders of threads to test in. With FLATCORE_SMALL, for a sanitizer that takes its time for every
// launch, one.
inline std::span<const flatcore::cuda::Order> orders() {
    using flatcore::cuda::Order;
    static constexpr std::array kAll = {Order::forward, Order::backward};
    return std::span(kAll).first(std::getenv("FLATCORE_SMALL") ? 1 : 2);
}

#if defined(__CUDACC__)
extern thread_local bool host_memory;  // managed_memory.cpp
#endif

// Arrays made meanwhile are of the host alone. For references in many small arrays, each of which would take
// a tenth of a millisecond or more as memory that the device sees too.
class OnHost {
 public:
#if defined(__CUDACC__)
    OnHost() { host_memory = true; }
    ~OnHost() { host_memory = before_; }

 private:
    const bool before_ = host_memory;
#else
    OnHost() {}  // not trivial, so that an object of it counts as used
#endif
};

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
