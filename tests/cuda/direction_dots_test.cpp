// direction_dots.cpp and direction_dots.cu, emulated, against a plain loop in long double, whose own rounding
// is far below the bound: adding n terms in double in any order is off by less than n eps times the sum of
// their magnitudes, and a term with a weight by another eps of its own.
#include "kernels/direction_dots.h"

#include <limits>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

// a begins `late` elements after an address that is a multiple of 16; directions have `gap` elements between
// them, and with a gap of -n all share one.
template <class T>
void test_dots(int64_t K, int64_t n, int64_t late = 0, int64_t gap = 0) {
    const int64_t stride = n + gap, count = K * (n + std::abs(gap));
    const auto w = numbers<T>(n, 1), a = numbers<T>(count + late, 2), b = numbers<T>(K * n, 3);
    const auto size = static_cast<size_t>(K);
    for (const bool weighted : {false, true}) {
        const auto before = numbers<double>(K, 4);
        auto on_device = before, on_cpu = before;
        std::vector<double> workspace(size * kDotPieces);
        const auto run = [&](auto& out, auto plain, auto with_weights, auto... stream) {
            if (weighted)
                with_weights(K, n, w.data(), a.data() + late, stride, b.data(), n, workspace.data(),
                             out.data(), stream...);
            else
                plain(K, n, a.data() + late, stride, b.data(), n, workspace.data(), out.data(), stream...);
        };
        void* const stream = nullptr;
        run(
            on_device, [](auto... p) { cuda::direction_dots(p...); },
            [](auto... p) { cuda::weighted_direction_dots(p...); }, stream);
        run(
            on_cpu, [](auto... p) { direction_dots(p...); },
            [](auto... p) { weighted_direction_dots(p...); });

        for (int64_t k = 0; k < K; ++k) {
            const auto at = static_cast<size_t>(k);
            long double sum = before[at], magnitude = std::abs(before[at]);
            for (int64_t i = 0; i < n; ++i) {
                long double term = a[static_cast<size_t>(late + k * stride + i)];
                term *= b[static_cast<size_t>(k * n + i)];
                if (weighted) term *= w[static_cast<size_t>(i)];
                sum += term;
                magnitude += std::abs(term);
            }
            const auto bound =
                static_cast<long double>(n + 2) * std::numeric_limits<double>::epsilon() * magnitude;
            EXPECT(std::abs(on_device[at] - sum) <= bound && std::abs(on_cpu[at] - sum) <= bound);
        }
    }
}

template <class T>
void test_all() {
    for (const int64_t K : {0, 1, 3})
        for (const int64_t n : {0, 1, 31, 1028, 2049}) test_dots<T>(K, n);
    test_dots<T>(3, 1028, 1);
    test_dots<T>(3, 1028, 0, 1);
    test_dots<T>(3, 1028, 0, 4);
    test_dots<T>(3, 1028, 0, -1028);
    test_dots<T>(19, 33);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    test_dots<float>(1, kDotPieces * 1024 + 1);  // all pieces, the last of them short
    return failures != 0;
}
