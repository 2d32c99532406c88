// The rows of cross_entropy.cu, emulated, against the CPU kernels, for both kinds of target.
#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "expect.h"
#include "kernels/cuda_launch.h"
#include "rows.h"

using namespace flatcore;

namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Masses of every class, most of them zero, and all of them in the second row; or one class of each row, also
// the last one and one that does not exist.
template <class T>
struct Masses {
    std::vector<T> all, one;
    std::vector<int64_t> index;
    Shifted<T> shifted;

    explicit Masses(const RowsShape& s)
        : all(integers<T>(s.shared(), 11)), one(integers<T>(s.rows, 12)),
          index(indices(s.rows, std::max<int64_t>(s.C, 1), 13)), shifted({}, 0) {
        for (int64_t i = 0; i < s.shared(); ++i) {
            T& mass = all[static_cast<size_t>(i)];
            mass = mass < 2 || i / s.C == 1 ? T(0) : mass;
        }
        for (T& mass : one) mass = std::max(mass, T(0));
        if (s.rows > 2) {
            index[0] = s.C - 1;
            index[1] = -100;
            index[2] = 0;
        }
        shifted = Shifted<T>(all, s.shift);
    }
    ClassMasses<T> cpu(ClassMasses<T>) { return {all.data()}; }
    ClassMasses<T> device(ClassMasses<T>) { return {shifted.data()}; }
    OneClass<T> cpu(OneClass<T>) { return {index.data(), one.data()}; }
    OneClass<T> device(OneClass<T>) { return {index.data(), one.data()}; }
};

template <class T, class Target>
void test_directions(const RowsShape& s) {
    Masses<T> masses(s);
    const Target target = masses.cpu(Target{}), target_ = masses.device(Target{});
    const auto p = integers<T>(s.shared(), 1), total = integers<T>(s.rows, 2), dloss = integers<T>(s.rows, 3);
    const auto tz = integers<T>(s.directions(), 4), tdloss = integers<T>(s.K * s.rows, 5);
    std::vector<T> tloss(tdloss.size()), tloss_cpu(tloss), expected(tz.size());
    Shifted<T> p_(p, s.shift), tz_(tz, s.shift), out(tz, s.shift);

    cross_entropy_tangent(s.K, s.rows, s.C, target, p.data(), total.data(), tz.data(), tloss_cpu.data());
    cuda::cross_entropy_tangent(s.K, s.rows, s.C, target_, p_.data(), total.data(), tz_.data(), tloss.data(),
                                nullptr);
    EXPECT(equal(tloss, tloss_cpu));

    for (const auto& [first, second] :
         {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
        const T *tdloss_ = first ? tdloss.data() : nullptr, *dloss_ = second ? dloss.data() : nullptr;
        cross_entropy_adjoint<T>(s.K, s.rows, s.C, target, p.data(), total.data(), tdloss_, dloss_,
                                 second ? tz.data() : nullptr, expected.data());
        cuda::cross_entropy_adjoint<T>(s.K, s.rows, s.C, target_, p_.data(), total.data(), tdloss_, dloss_,
                                       second ? tz_.data() : nullptr, out.data(), nullptr);
        EXPECT(equal(out.values(), expected));
        if (!second) continue;
        Shifted<T> in_place(tz, s.shift);
        cuda::cross_entropy_adjoint<T>(s.K, s.rows, s.C, target_, p_.data(), total.data(), tdloss_, dloss_,
                                       in_place.data(), in_place.data(), nullptr);
        EXPECT(equal(in_place.values(), expected));
    }
    EXPECT(equal(p_.values(), p) && equal(tz_.values(), tz));
}

// Logits of one size or -infinity: exponentials and their sums are exact. A class with mass and without a
// chance makes the loss infinite; a row of -infinities alone is NaN.
template <class T, class Target>
void test_forward_exact(const RowsShape& s) {
    Masses<T> masses(s);
    auto z = integers<T>(s.shared(), 6);
    for (int64_t i = 0; i < s.shared(); ++i) {
        T& value = z[static_cast<size_t>(i)];
        value = value == 3 || i / s.C == 2 ? -kInfinity<T> : T(50);
    }
    std::vector<T> p(z.size()), loss(static_cast<size_t>(s.rows)), total(loss), loss_(loss), total_(loss);
    cross_entropy_forward(s.rows, s.C, z.data(), masses.cpu(Target{}), loss.data(), p.data(), total.data());
    Shifted<T> z_(z, s.shift), p_(z, s.shift);
    cuda::cross_entropy_forward(s.rows, s.C, z_.data(), masses.device(Target{}), loss_.data(), p_.data(),
                                total_.data(), nullptr);
    EXPECT(equal(p_.values(), p) && equal(loss_, loss) && equal(total_, total) && equal(z_.values(), z));
    loss_.assign(loss_.size(), T(0));
    cuda::cross_entropy_forward<T>(s.rows, s.C, z_.data(), masses.device(Target{}), loss_.data(), z_.data(),
                                   nullptr, nullptr);
    EXPECT(equal(z_.values(), p) && equal(loss_, loss));
}

// The sum of exponentials has the bound of softmax_test.cpp; it enters the loss through its logarithm, times
// M. The terms have one sign, and M is exact.
template <class T, class Target>
void test_forward(const RowsShape& s) {
    constexpr T eps = std::numeric_limits<T>::epsilon();
    Masses<T> masses(s);
    const auto z = numbers<T>(s.shared(), 7);
    std::vector<T> p(z.size()), loss(static_cast<size_t>(s.rows)), total(loss), loss_(loss), total_(loss);
    cross_entropy_forward(s.rows, s.C, z.data(), masses.cpu(Target{}), loss.data(), p.data(), total.data());
    Shifted<T> p_(z, s.shift);
    cuda::cross_entropy_forward(s.rows, s.C, p_.data(), masses.device(Target{}), loss_.data(), p_.data(),
                                total_.data(), nullptr);
    EXPECT(equal(total_, total));
    const auto got = p_.values();
    for (int64_t row = 0; row < s.rows; ++row) {
        const auto r = static_cast<size_t>(row);
        const auto [low, high] = std::minmax_element(z.begin() + row * s.C, z.begin() + (row + 1) * s.C);
        const T bound = eps * (T(4) * static_cast<T>(s.C) + T(2) * (*high - *low) + T(8));
        for (int64_t c = 0; c < s.C; ++c) {
            const auto i = static_cast<size_t>(row * s.C + c);
            EXPECT(std::abs(got[i] - p[i]) <= bound * p[i]);
        }
        EXPECT(std::abs(loss_[r] - loss[r]) <= bound * total[r] + eps * static_cast<T>(s.C) * loss[r]);
    }
}

template <class T>
void test_not_finite(int64_t C) {
    for (const T value : {kInfinity<T>, std::numeric_limits<T>::quiet_NaN()})
        for (const int64_t at : {int64_t{0}, C - 1}) {
            std::vector<T> z(static_cast<size_t>(3 * C), T(1)), p(z.size()), p_cpu(z.size());
            std::vector<T> mass(3, T(1)), loss(3), loss_cpu(3);
            const std::vector<int64_t> index{0, 1, C - 1};
            z[static_cast<size_t>(C + at)] = value;
            const OneClass<T> target{index.data(), mass.data()};
            cuda::cross_entropy_forward<T>(3, C, z.data(), target, loss.data(), p.data(), nullptr, nullptr);
            cross_entropy_forward<T>(3, C, z.data(), target, loss_cpu.data(), p_cpu.data(), nullptr);
            EXPECT(equal(p, p_cpu) && std::isnan(loss[1]) && std::isnan(loss_cpu[1]));
            EXPECT(!std::isnan(loss[0]) && !std::isnan(loss[2]));
        }
}

template <class T, class Target>
void test_target() {
    for_row_shapes([](const RowsShape& s) {
        test_directions<T, Target>(s);
        if (s.C == 0) return;  // the CPU kernel reads the first logit of a row
        test_forward_exact<T, Target>(s);
        test_forward<T, Target>(s);
    });
}

template <class T>
void test_all() {
    test_target<T, ClassMasses<T>>();
    test_target<T, OneClass<T>>();
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
