// probes.cu, emulated, against the CPU kernels: the same bits. On the host log, sin and cos are the CPU's
// too, so normal numbers are equal as well.
#include "kernels/probes.h"

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

// Rows begin `late` elements after an address that is a multiple of 16.
template <class T>
void test_rows(int64_t K, int64_t P, int64_t late) {
    const uint64_t seed = 0x123456789ABCDEF0;
    const int64_t first = 5;
    auto out = numbers<T>(K * P + late, 1), expected = out;
    cuda::rademacher_rows(seed, first, K, P, out.data() + late, nullptr);
    rademacher_rows(seed, first, K, P, expected.data() + late);
    EXPECT(equal(out, expected));
    cuda::normal_rows(seed, first, K, P, out.data() + late, nullptr);
    normal_rows(seed, first, K, P, expected.data() + late);
    EXPECT(equal(out, expected));
}

template <class T>
void test_all() {
    for (const int64_t K : {0, 1, 3})
        for (const int64_t P : {0, 1, 2, 63, 260, 1029}) test_rows<T>(K, P, 0);
    test_rows<T>(3, 128, 1);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: elements and rows are reached by striding.
    test_rows<float>(1, 2 * 1024 * 256 + 1, 0);
    test_rows<float>(1030, 515, 0);
    return failures != 0;
}
