// The CUDA grids of pointwise.cu, emulated, against the CPU kernels: the same formula through other indices,
// so the results are equal bit for bit. Array sizes are exact, so that the sanitizer sees the first access
// outside one.
#include "kernels/pointwise.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

template <class T>
std::vector<T> numbers(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<T> normal(0, 2);
    std::vector<T> result(static_cast<size_t>(count));
    for (T& value : result) value = normal(generator);
    return result;
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    return a.size() == b.size();
}

template <class T>
void test_forward(Function function, int64_t n) {
    const auto size = static_cast<size_t>(n);
    const auto z = numbers<T>(n, 1);
    const Constants constants{0.7, 1.3, 0.9};
    const bool curved = is_curved(function);
    std::vector<T> y(size), d1(size), d2(curved ? size : 0), y_cpu(size), d1_cpu(size),
        d2_cpu(curved ? size : 0);
    cuda::unary_forward(function, constants, n, z.data(), y.data(), d1.data(), curved ? d2.data() : nullptr,
                        nullptr);
    unary_forward(function, constants, n, z.data(), y_cpu.data(), d1_cpu.data(),
                  curved ? d2_cpu.data() : nullptr);
    EXPECT(equal(y, y_cpu) && equal(d1, d1_cpu) && equal(d2, d2_cpu));
}

template <class T>
void test_directions(int64_t K, int64_t n) {
    const auto d1 = numbers<T>(n, 1), h = numbers<T>(n, 2), td = numbers<T>(K * n, 3),
               t = numbers<T>(K * n, 4);
    const auto before = numbers<T>(K * n, 5);

    auto out = before, out_cpu = before;
    cuda::scale_directions(K, n, d1.data(), t.data(), out.data(), nullptr);
    scale_directions(K, n, d1.data(), t.data(), out_cpu.data());
    EXPECT(equal(out, out_cpu));

    for (const auto& [first, second] :
         {std::pair(true, true), std::pair(true, false), std::pair(false, true)})
        for (const bool accumulate : {false, true}) {
            const T *d1_ = first ? d1.data() : nullptr, *td_ = first ? td.data() : nullptr;
            const T *h_ = second ? h.data() : nullptr, *t_ = second ? t.data() : nullptr;
            out = out_cpu = before;
            cuda::adjoint_directions(K, n, d1_, td_, h_, t_, accumulate, out.data(), nullptr);
            adjoint_directions(K, n, d1_, td_, h_, t_, accumulate, out_cpu.data());
            EXPECT(equal(out, out_cpu));
        }
}

template <class T>
void test_all() {
#define X(name, Functor) \
    for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{259}}) test_forward<T>(Function::Functor, n);
    FLATCORE_FUNCTIONS(X)
#undef X
    for (const int64_t K : {0, 1, 3, 33})
        for (const int64_t n : {0, 1, 31, 259}) test_directions<T>(K, n);
}

}  // namespace

int main() {
    for (const auto order : {cuda::Order::forward, cuda::Order::backward}) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: elements and directions are reached by striding. CPU tiles are odd too.
    test_forward<float>(Function::Tanh, 1024 * 256 + 3);
    std::vector<float> d = numbers<float>(259, 1), t = numbers<float>(600 * 259, 2), out(t.size()),
                       out_cpu(t.size());
    cuda::scale_directions<float>(600, 259, d.data(), t.data(), out.data(), nullptr);
    scale_directions<float>(600, 259, d.data(), t.data(), out_cpu.data());
    EXPECT(equal(out, out_cpu));
    return failures != 0;
}
