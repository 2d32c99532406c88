// The CUDA grids of pointwise.cu, emulated, against the CPU kernels: the same formula through other indices,
// so the results are equal bit for bit. Packs of 16 bytes and single elements are two kernels; an array that
// begins one element late takes the second.
#include "kernels/pointwise.h"

#include <vector>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

// Arrays begin `late` elements after an address that is a multiple of 16.
template <class T>
void test_forward(Function function, int64_t n, int64_t late) {
    const auto size = static_cast<size_t>(n + late);
    const auto z = numbers<T>(n + late, 1);
    const Constants constants{0.7, 1.3, 0.9};
    const bool curved = is_curved(function);
    std::vector<T> y(size), d1(size), d2(curved ? size : 0), y_cpu(size), d1_cpu(size),
        d2_cpu(curved ? size : 0);
    cuda::unary_forward(function, constants, n, z.data() + late, y.data() + late, d1.data() + late,
                        curved ? d2.data() + late : nullptr, nullptr);
    unary_forward(function, constants, n, z.data() + late, y_cpu.data() + late, d1_cpu.data() + late,
                  curved ? d2_cpu.data() + late : nullptr);
    EXPECT(equal(y, y_cpu) && equal(d1, d1_cpu) && equal(d2, d2_cpu));
}

// One of the arrays begins late: 0 is none of them, 1 d1, 2 td, 3 h, 4 t, 5 out.
template <class T>
void test_directions(int64_t K, int64_t n, int late) {
    const auto array = [&](int number, int64_t count) {
        return numbers<T>(count + (number == late), static_cast<unsigned>(number));
    };
    const auto d1 = array(1, n), td = array(2, K * n), h = array(3, n), t = array(4, K * n);
    const auto before = array(5, K * n);
    const auto start = [&](auto& array, int number) { return array.data() + (number == late); };

    auto out = before, out_cpu = before;
    cuda::scale_directions(K, n, start(d1, 1), start(t, 4), start(out, 5), nullptr);
    scale_directions(K, n, start(d1, 1), start(t, 4), start(out_cpu, 5));
    EXPECT(equal(out, out_cpu));

    for (const auto& [first, second] :
         {std::pair(true, true), std::pair(true, false), std::pair(false, true)})
        for (const bool accumulate : {false, true}) {
            const T *d1_ = first ? start(d1, 1) : nullptr, *td_ = first ? start(td, 2) : nullptr;
            const T *h_ = second ? start(h, 3) : nullptr, *t_ = second ? start(t, 4) : nullptr;
            out = out_cpu = before;
            cuda::adjoint_directions(K, n, d1_, td_, h_, t_, accumulate, start(out, 5), nullptr);
            adjoint_directions(K, n, d1_, td_, h_, t_, accumulate, start(out_cpu, 5));
            EXPECT(equal(out, out_cpu));
        }
}

template <class T>
void test_all() {
#define X(name, Functor)                     \
    for (const int64_t n : {0, 1, 259, 260}) \
        for (const int64_t late : {0, 1}) test_forward<T>(Function::Functor, n, late);
    FLATCORE_FUNCTIONS(X)
#undef X
    for (const int64_t K : {0, 1, 3, 33})
        for (const int64_t n : {0, 1, 31, 32, 259}) test_directions<T>(K, n, 0);
    for (int late = 1; late <= 5; ++late) test_directions<T>(3, 32, late);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: elements and directions are reached by striding. CPU tiles are odd too.
    test_forward<float>(Function::Tanh, 1024 * 256 + 3, 0);
    test_forward<double>(Function::Tanh, 2 * 1024 * 256 + 6, 0);
    for (const int64_t n : {259, 1030}) {
        std::vector<float> d = numbers<float>(n, 1), t = numbers<float>(1030 * n, 2), out(t.size()),
                           out_cpu(t.size());
        cuda::scale_directions<float>(1030, n, d.data(), t.data(), out.data(), nullptr);
        scale_directions<float>(1030, n, d.data(), t.data(), out_cpu.data());
        EXPECT(equal(out, out_cpu));
    }
    return failures != 0;
}
