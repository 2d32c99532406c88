// channel_affine.cu, emulated, against the CPU kernels: element by element the same formula, equal bit for
// bit; sums over rows add the same numbers in another order.
#include "kernels/channel_affine.h"

#include <limits>
#include <tuple>

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

// Rows begin `late` elements after an address that is a multiple of 16; what has a value per channel always
// begins one late, as it may in a flat vector, with a stride between directions that is no multiple of a
// pack.
template <class T>
struct Case {
    int64_t K, rows, C, late, stride = C + 3;
    std::vector<T> mean, inverse_std, scale, bias, x, dy, tx, tdy, tweight, tbias;

    Case(int64_t K_, int64_t rows_, int64_t C_, int64_t late_)
        : K(K_), rows(rows_), C(C_), late(late_), mean(numbers<T>(C + 1, 1)),
          inverse_std(numbers<T>(C + 1, 2)), scale(numbers<T>(C + 1, 3)), bias(numbers<T>(C + 1, 4)),
          x(numbers<T>(rows * C + late, 5)), dy(numbers<T>(rows * C + late, 6)),
          tx(numbers<T>(K * rows * C + late, 7)), tdy(numbers<T>(K * rows * C + late, 8)),
          tweight(numbers<T>(K * stride + 1, 9)), tbias(numbers<T>(K * stride + 1, 10)) {}

    ChannelAffine<T> op(bool with_bias = true) const {
        return {rows,
                C,
                mean.data() + 1,
                inverse_std.data() + 1,
                scale.data() + 1,
                with_bias ? bias.data() + 1 : nullptr,
                x.data() + late};
    }
};

constexpr std::pair<bool, bool> kFlags[] = {{true, true}, {true, false}, {false, true}, {false, false}};

template <class T>
void test_forward(const Case<T>& a, bool bias) {
    auto out = numbers<T>(static_cast<int64_t>(a.x.size()), 11), expected = out;
    cuda::channel_affine_forward(a.op(bias), out.data() + a.late, nullptr);
    channel_affine_forward(a.op(bias), expected.data() + a.late);
    EXPECT(equal(out, expected));
}

template <class T>
void test_tangent(const Case<T>& a, bool x, bool weight, bool bias) {
    auto out = numbers<T>(static_cast<int64_t>(a.tx.size()), 11), expected = out;
    const T *tx = x ? a.tx.data() + a.late : nullptr, *tweight = weight ? a.tweight.data() + 1 : nullptr,
            *tbias = bias ? a.tbias.data() + 1 : nullptr;
    cuda::channel_affine_tangent(a.op(), a.K, tx, tweight, a.stride, tbias, a.stride, out.data() + a.late,
                                 nullptr);
    channel_affine_tangent(a.op(), a.K, tx, tweight, a.stride, tbias, a.stride, expected.data() + a.late);
    EXPECT(equal(out, expected));
}

template <class T>
void test_adjoint(const Case<T>& a, bool first, bool cross) {
    auto out = numbers<T>(static_cast<int64_t>(a.tx.size()), 11), expected = out;
    const T *tdy = first ? a.tdy.data() + a.late : nullptr, *dy = cross ? a.dy.data() + a.late : nullptr,
            *tweight = cross ? a.tweight.data() + 1 : nullptr;
    cuda::channel_affine_adjoint(a.op(), a.K, tdy, dy, tweight, a.stride, out.data() + a.late, nullptr);
    channel_affine_adjoint(a.op(), a.K, tdy, dy, tweight, a.stride, expected.data() + a.late);
    EXPECT(equal(out, expected));
}

template <class T>
void test_elements(const Case<T>& a) {
    for (const bool bias : {false, true}) {
        test_forward(a, bias);
        for (const auto& [first, second] : kFlags) test_tangent(a, first, second, bias);
    }
    for (const auto& [first, second] : kFlags) test_adjoint(a, first, second);
}

// Two orders of adding n numbers differ by less than 2 n eps times the sum of their magnitudes, which are
// added up here by the CPU kernel from magnitudes: with mean 0, and all arrays made positive.
template <class T>
void test_sums(const Case<T>& a) {
    Case<T> magnitudes = a;
    for (int64_t c = 0; c <= a.C; ++c) {
        const auto i = static_cast<size_t>(c);
        for (int64_t row = 0; c < a.C && row < a.rows; ++row)
            magnitudes.x[static_cast<size_t>(row * a.C + c + a.late)] -= a.mean[i + 1];
        magnitudes.mean[i] = 0;
    }
    for (auto* array :
         {&magnitudes.inverse_std, &magnitudes.x, &magnitudes.dy, &magnitudes.tx, &magnitudes.tdy})
        for (T& value : *array) value = std::abs(value);

    const auto size = static_cast<size_t>(a.K * kRowPieces * a.C);
    for (const auto& [first, second] : kFlags)
        for (const auto& [weight, bias] : kFlags) {
            std::vector<double> sums(2 * size, 7), expected(2 * size, 7), bound(2 * size);
            const auto at = [&, weight = weight, bias = bias](std::vector<double>& v) {
                return std::pair(weight ? v.data() : nullptr, bias ? v.data() + size : nullptr);
            };
            const auto run = [&, first = first, second = second](const Case<T>& c, auto&& kernel,
                                                                 std::vector<double>& out, auto... stream) {
                kernel(c.op(), c.K, first ? c.tdy.data() + c.late : nullptr,
                       second ? c.dy.data() + c.late : nullptr, second ? c.tx.data() + c.late : nullptr,
                       at(out).first, at(out).second, stream...);
            };
            void* const stream = nullptr;
            run(a, [](auto... p) { cuda::channel_affine_sums(p...); }, sums, stream);
            run(a, [](auto... p) { channel_affine_sums(p...); }, expected);
            run(magnitudes, [](auto... p) { channel_affine_sums(p...); }, bound);
            const double eps = std::numeric_limits<double>::epsilon();
            for (size_t i = 0; i < 2 * size; ++i)
                EXPECT(std::abs(sums[i] - expected[i]) <=
                       2 * static_cast<double>(rows_in_piece(a.rows)) * eps * bound[i]);
        }
}

template <class T>
void test_all() {
    for (const auto& [K, rows, C] :
         {std::tuple(0, 5, 3), {2, 0, 5}, {2, 5, 0}, {1, 1, 1}, {3, 70, 3}, {3, 30, 8}, {2, 3, 1100}})
        test_elements(Case<T>(K, rows, C, 0));
    test_elements(Case<T>(3, 7, 8, 1));
    for (const auto& [K, rows, C] : {std::tuple(0, 2, 3), {2, 2, 0}, {2, 0, 3}})
        test_sums(Case<T>(K, rows, C, 0));
    test_sums(Case<T>(2, 1201, 9, 0));  // more rows in a piece than threads, more columns than a block
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    // Larger than a grid: rows, columns and directions are reached by striding.
    for (const auto& [K, rows, C] : {std::tuple(1, 1030, 259), {1, 1, 259 * 1030}, {1030, 2, 5}})
        test_tangent(Case<float>(K, rows, C, 0), true, true, true);
    return failures != 0;
}
