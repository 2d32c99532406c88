// example_probes.cu, emulated, against the CPU kernels: signs bit for bit, dot products within the rounding
// of two orders of addition.
#include "kernels/example_probes.h"

#include <limits>
#include <tuple>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

// Results begin `late` elements after an address that is a multiple of 16.
template <class T>
void test_signs(int64_t probes, int64_t examples, int64_t count, int64_t late) {
    const ExampleBlock block{0x123456789ABCDEF0, 3, probes, 11, examples};
    auto out = numbers<T>(probes * examples * count + late, 1), expected = out;
    for (const int64_t first : {0, 61, 64 * 1000 + 63}) {
        cuda::example_signs(block, first, count, out.data() + late, nullptr);
        example_signs(block, first, count, expected.data() + late);
        EXPECT(equal(out, expected));
    }
    const auto elements = indices(count, 1000, 2);
    cuda::example_signs_at(block, 17, elements.data(), count, out.data() + late, nullptr);
    example_signs_at(block, 17, elements.data(), count, expected.data() + late);
    EXPECT(equal(out, expected));
}

template <class T>
void test_row_signs(int64_t probes, int64_t examples, int64_t rows, int64_t width, int64_t frozen,
                    int64_t late) {
    const ExampleBlock block{99, 3, probes, 11, examples};
    const auto index = indices(examples * rows, 5, 3);
    auto out = numbers<T>(probes * examples * rows * width + late, 1), expected = out;
    cuda::example_row_signs(block, 13, index.data(), rows, width, frozen, out.data() + late, nullptr);
    example_row_signs(block, 13, index.data(), rows, width, frozen, expected.data() + late);
    EXPECT(equal(out, expected));
}

// Each of two orders of adding n terms is off by less than n eps times the sum of their magnitudes.
template <class T>
void test_dots(int64_t rows, int64_t width, int64_t late) {
    const auto a = numbers<T>(rows * width + late, 4), b = numbers<T>(rows * width, 5);
    const auto size = static_cast<size_t>(rows);
    std::vector<double> out(size, 7), expected(size, 7);
    cuda::row_dots(rows, width, a.data() + late, b.data(), out.data(), nullptr);
    row_dots(rows, width, a.data() + late, b.data(), expected.data());
    for (size_t r = 0; r < size; ++r) {
        double magnitude = 0;
        for (size_t i = r * static_cast<size_t>(width); i < (r + 1) * static_cast<size_t>(width); ++i)
            magnitude += std::abs(double{a[i + static_cast<size_t>(late)]} * double{b[i]});
        EXPECT(std::abs(out[r] - expected[r]) <=
               2 * static_cast<double>(width) * std::numeric_limits<double>::epsilon() * magnitude);
    }
}

template <class T>
void test_all() {
    for (const auto& [probes, examples, count] :
         {std::tuple(0, 2, 3), {2, 0, 3}, {2, 3, 0}, {1, 1, 1030}, {2, 3, 7}, {3, 5, 132}, {1, 2, 1}})
        test_signs<T>(probes, examples, count, 0);
    test_signs<T>(2, 3, 132, 1);
    for (const auto& [probes, examples, rows, width] :
         {std::tuple(0, 2, 3, 4), {2, 3, 0, 4}, {2, 3, 4, 0}, {2, 3, 5, 7}, {3, 2, 9, 132}})
        for (const int64_t frozen : {-1, 2}) test_row_signs<T>(probes, examples, rows, width, frozen, 0);
    test_row_signs<T>(2, 3, 5, 8, 2, 1);
    for (const int64_t rows : {0, 1, 19})
        for (const int64_t width : {0, 1, 30, 132, 1025, 1028}) test_dots<T>(rows, width, 0);
    test_dots<T>(3, 132, 1);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: rows and columns are reached by striding.
    test_row_signs<float>(2, 1, 515, 129, 2, 0);
    test_signs<float>(1, 1, 1024 * 256 + 1, 0);
    test_dots<float>(8200, 3, 0);
    return failures != 0;
}
