// The row passes of attention.cu, emulated, against the CPU kernels.
#include "kernels/attention.h"

#include "expect.h"
#include "kernels/cuda_launch.h"
#include "rows.h"

using namespace flatcore;

namespace {

template <class T>
void test_rows(const RowsShape& s) {
    const int64_t rows = s.K * s.rows;
    const auto p = integers<T>(s.directions(), 1), u = integers<T>(s.directions(), 2);
    const auto dp = integers<T>(s.directions(), 3), tz = integers<T>(s.directions(), 4);
    Shifted<T> p_(p, s.shift), u_(u, s.shift), dz_(dp, s.shift);

    auto backward = dp;
    std::vector<T> dz(dp.size());
    Shifted<T> dp_(dp, s.shift);
    attention_backward(rows, s.C, p.data(), backward.data(), dz.data());
    cuda::attention_backward(rows, s.C, p_.data(), dp_.data(), dz_.data(), nullptr);
    EXPECT(equal(dp_.values(), backward) && equal(dz_.values(), dz));

    for (const bool tdp_is_zero : {false, true}) {
        auto tp = tz, tdz = dp;
        // What is not read may be anything.
        if (tdp_is_zero) tdz.assign(tdz.size(), std::numeric_limits<T>::quiet_NaN());
        Shifted<T> tz_(tz, s.shift), tdp_(tdz, s.shift);
        attention_second_order(rows, s.C, p.data(), u.data(), tdp_is_zero, tp.data(), tdz.data());
        cuda::attention_second_order(rows, s.C, p_.data(), u_.data(), tdp_is_zero, tz_.data(), tdp_.data(),
                                     nullptr);
        EXPECT(equal(tz_.values(), tp) && equal(tdp_.values(), tdz));
    }
    EXPECT(equal(p_.values(), p) && equal(u_.values(), u));
}

template <class T>
void test_mask(int64_t heads, int64_t rows, int64_t C, int64_t first) {
    auto z = numbers<T>(heads * rows * C, 1), z_cpu = z;
    cuda::causal_mask(heads, rows, C, first, z.data(), nullptr);
    causal_mask(heads, rows, C, first, z_cpu.data());
    EXPECT(equal(z, z_cpu));
}

template <class T>
void test_all() {
    for_row_shapes(test_rows<T>);
    for (const int64_t first : {0, 5, 40}) {
        test_mask<T>(3, 17, 33, first);
        test_mask<T>(1, 7, 1, first);
        test_mask<T>(2, 3, 1030, first);
    }
    test_mask<T>(0, 3, 3, 0);
    test_mask<T>(3, 0, 3, 0);
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
