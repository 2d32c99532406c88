// gather.cu, emulated, against the CPU kernels: the same additions in the same order, equal bit for bit.
#include "kernels/gather.h"

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

template <class T>
void test_pixels(int64_t K, const PixelShape& shape, const std::vector<int64_t>& index) {
    const int64_t in = K * shape.images * shape.in * shape.channels,
                  out = K * shape.images * shape.out * shape.channels;
    const auto pixels = numbers<T>(in, 1), chosen = numbers<T>(out, 2);
    auto result = numbers<T>(out, 3), expected = numbers<T>(out, 4);
    cuda::gather_pixels(K, shape, index.data(), pixels.data(), result.data(), nullptr);
    gather_pixels(K, shape, index.data(), pixels.data(), expected.data());
    EXPECT(equal(result, expected));

    auto sums = numbers<T>(in, 5), expected_sums = numbers<T>(in, 6);
    cuda::scatter_pixels(K, shape, index.data(), chosen.data(), sums.data(), nullptr);
    scatter_pixels(K, shape, index.data(), chosen.data(), expected_sums.data());
    EXPECT(equal(sums, expected_sums));
}

template <class T>
void test_all() {
    for (const int64_t K : {0, 1, 3})
        for (const PixelShape& shape :
             {PixelShape{0, 4, 4, 3}, PixelShape{2, 5, 0, 3}, PixelShape{2, 5, 4, 0}, PixelShape{2, 1, 1, 1},
              PixelShape{2, 7, 19, 3}, PixelShape{3, 40, 16, 100}, PixelShape{1, 3, 35, 260}})
            test_pixels<T>(K, shape, indices(shape.images * shape.out * shape.channels, shape.in, 7));
    // All outputs read one pixel: every sum is a chain through all batches.
    test_pixels<T>(2, {2, 3, 21, 5}, std::vector<int64_t>(2 * 21 * 5, 1));
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: elements, and tasks of 256 channels, are reached by striding.
    test_pixels<float>(1, {1, 2, 1030, 259}, indices(1030 * 259, 2, 8));
    test_pixels<float>(1030, {1, 2, 3, 2}, indices(6, 2, 9));
    return failures != 0;
}
