// The rows of softmax.cu, emulated, against the CPU kernels.
#include "kernels/softmax.h"

#include <algorithm>
#include <cmath>

#include "expect.h"
#include "kernels/cuda_launch.h"
#include "rows.h"

using namespace flatcore;

namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
void test_directions(const RowsShape& s) {
    const auto p = integers<T>(s.shared(), 1), dp = integers<T>(s.shared(), 2);
    const auto tz = integers<T>(s.directions(), 3), tdp = integers<T>(s.directions(), 4);
    std::vector<T> expected(tz.size());
    Shifted<T> p_(p, s.shift), dp_(dp, s.shift), tz_(tz, s.shift), out(expected, s.shift);

    softmax_tangent(s.K, s.rows, s.C, p.data(), tz.data(), expected.data());
    cuda::softmax_tangent(s.K, s.rows, s.C, p_.data(), tz_.data(), out.data(), nullptr);
    EXPECT(equal(out.values(), expected) && equal(tz_.values(), tz));
    cuda::softmax_tangent(s.K, s.rows, s.C, p_.data(), tz_.data(), tz_.data(), nullptr);
    EXPECT(equal(tz_.values(), expected));

    for (const auto& [first, second] :
         {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
        softmax_adjoint(s.K, s.rows, s.C, p.data(), first ? tdp.data() : nullptr,
                        second ? dp.data() : nullptr, second ? tz.data() : nullptr, expected.data());
        enum class Into { apart, tdp, tz };
        for (const Into into : {Into::apart, Into::tdp, Into::tz}) {
            if ((into == Into::tdp && !first) || (into == Into::tz && !second)) continue;
            Shifted<T> t(tz, s.shift), td(tdp, s.shift);
            T* result = into == Into::apart ? out.data() : into == Into::tdp ? td.data() : t.data();
            cuda::softmax_adjoint<T>(s.K, s.rows, s.C, p_.data(), first ? td.data() : nullptr,
                                     second ? dp_.data() : nullptr, second ? t.data() : nullptr, result,
                                     nullptr);
            EXPECT(equal(into == Into::apart ? out.values()
                         : into == Into::tdp ? td.values()
                                             : t.values(),
                         expected));
        }
    }
    EXPECT(equal(p_.values(), p) && equal(dp_.values(), dp));
}

// Logits of one size or -infinity: exponentials and their sums are exact.
template <class T>
void test_forward_exact(const RowsShape& s) {
    std::vector<T> z = integers<T>(s.shared(), 5), p(z.size());
    for (int64_t i = 0; i < s.shared(); ++i) {
        T& value = z[static_cast<size_t>(i)];
        value = value < 0 || i / s.C == 1 ? -kInfinity<T> : T(-70);
    }
    std::vector<T> log_sum(static_cast<size_t>(s.rows)), log_sum_cpu(log_sum);
    softmax_forward(s.rows, s.C, z.data(), p.data(), log_sum_cpu.data());
    Shifted<T> z_(z, s.shift), p_(z, s.shift);
    cuda::softmax_forward(s.rows, s.C, z_.data(), p_.data(), log_sum.data(), nullptr);
    EXPECT(equal(p_.values(), p) && equal(log_sum, log_sum_cpu) && equal(z_.values(), z));
    cuda::softmax_forward<T>(s.rows, s.C, z_.data(), z_.data(), nullptr, nullptr);
    EXPECT(equal(z_.values(), p));
}

// Both sums have at most C roundings. Where a peak rises the device's sum is also scaled: an exponential of
// at most one ulp, a product, and the rounding of differences that add up to the spread of the logits.
template <class T>
void test_forward(const RowsShape& s) {
    auto z = numbers<T>(s.shared(), 6);
    for (size_t i = 0; i < z.size(); i += 7) z[i] += T(20) * static_cast<T>(i % 5);
    std::vector<T> p(z.size()), log_sum(static_cast<size_t>(s.rows)), log_sum_cpu(log_sum);
    softmax_forward(s.rows, s.C, z.data(), p.data(), log_sum_cpu.data());
    Shifted<T> p_(z, s.shift);
    cuda::softmax_forward(s.rows, s.C, p_.data(), p_.data(), log_sum.data(), nullptr);
    const auto got = p_.values();
    for (int64_t row = 0; row < s.rows && s.C > 0; ++row) {
        const auto r = static_cast<size_t>(row);
        const auto [low, high] = std::minmax_element(z.begin() + row * s.C, z.begin() + (row + 1) * s.C);
        const T bound =
            std::numeric_limits<T>::epsilon() * (T(4) * static_cast<T>(s.C) + T(2) * (*high - *low) + T(8));
        for (int64_t c = 0; c < s.C; ++c) {
            const auto i = static_cast<size_t>(row * s.C + c);
            EXPECT(std::abs(got[i] - p[i]) <= bound * p[i]);
        }
        EXPECT(std::abs(log_sum[r] - log_sum_cpu[r]) <=
               bound + std::numeric_limits<T>::epsilon() * std::abs(log_sum_cpu[r]));
    }
}

// One infinity or NaN spoils its row, and no other.
template <class T>
void test_not_finite(int64_t C) {
    for (const T value : {kInfinity<T>, std::numeric_limits<T>::quiet_NaN()})
        for (const int64_t at : {int64_t{0}, C / 2, C - 1}) {
            std::vector<T> z(static_cast<size_t>(3 * C), T(1)), p(z.size()), p_cpu(z.size());
            z[static_cast<size_t>(C + at)] = value;
            cuda::softmax_forward<T>(3, C, z.data(), p.data(), nullptr, nullptr);
            softmax_forward<T>(3, C, z.data(), p_cpu.data(), nullptr);
            EXPECT(equal(p, p_cpu));
            EXPECT(std::isnan(p[static_cast<size_t>(C)]) && !std::isnan(p[0]) && !std::isnan(p.back()));
        }
}

template <class T>
void test_all() {
    for_row_shapes([](const RowsShape& s) {
        test_directions<T>(s);
        test_forward_exact<T>(s);
        test_forward<T>(s);
    });
    for (const int64_t C : {3, 64, 2048}) test_not_finite<T>(C);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
    }
    return failures != 0;
}
