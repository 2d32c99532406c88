// The rows of normalise.cu and the sums over them, emulated, against the CPU kernels. Tangents are integers
// times C, so that their means are integers too, and all sums are exact in either order.
#include "kernels/normalise.h"

#include <algorithm>
#include <cmath>

#include "expect.h"
#include "kernels/cuda_launch.h"
#include "rows.h"

using namespace flatcore;

namespace {

template <class T>
std::vector<T> units(int64_t count, unsigned seed) {
    auto result = integers<T>(count, seed);
    for (T& value : result) value = T((value > 0) - (value < 0));
    return result;
}

// Every array that the sweeps read, for the CPU and, shifted, for the device.
template <class T>
struct Inputs {
    RowsShape s;
    int64_t stride;
    std::vector<T> xhat, r, w, dy, tdy, tx, tw, tb, so_far;
    Shifted<T> xhat_, w_, dy_, tdy_, tx_, tw_, tb_, so_far_, so_far_askew;

    explicit Inputs(const RowsShape& shape)
        : s(shape), stride(s.C + 4 + s.shift), xhat(units<T>(s.shared(), 1)), r(units<T>(s.rows, 2)),
          w(units<T>(s.C, 3)), dy(units<T>(s.shared(), 4)), tdy(units<T>(s.directions(), 5)),
          tx(times_C(units<T>(s.directions(), 6))), tw(units<T>(s.K * stride, 7)),
          tb(units<T>(s.K * stride, 8)), so_far(units<T>(s.directions(), 10)), xhat_(xhat, s.shift),
          w_(w, s.shift), dy_(dy, s.shift), tdy_(tdy, s.shift), tx_(tx, s.shift), tw_(tw, s.shift),
          tb_(tb, s.shift), so_far_(so_far, s.shift), so_far_askew(so_far, 1) {}

    std::vector<T> times_C(std::vector<T> values) const {
        for (T& value : values) value *= static_cast<T>(s.C);
        return values;
    }
};

// The sum of every row of x is a multiple of C, and so large that its square is not exact in float.
template <class T>
std::vector<T> rows_with_a_whole_mean(const RowsShape& s) {
    auto x = integers<T>(s.shared(), 9);
    for (int64_t row = 0; row < s.rows && s.C > 0; ++row) {
        const auto first = x.begin() + row * s.C;
        T sum = 0;
        for (int64_t c = 0; c < s.C; ++c) sum += first[c];
        first[s.C - 1] -= sum;
        for (int64_t c = 0; c < s.C; ++c) first[c] += T(1500);
    }
    return x;
}

template <class T>
void test_forward(const RowsShape& s) {
    const auto x = rows_with_a_whole_mean<T>(s), w = integers<T>(s.C, 3), b = integers<T>(s.C, 4);
    std::vector<T> r(static_cast<size_t>(s.rows)), r_cpu(r), xhat(x.size()), y(x.size());
    Shifted<T> x_(x, s.shift), w_(w, s.shift), b_(b, s.shift), xhat_(x, s.shift), y_(x, s.shift);
    for (const bool centred : {true, false})
        for (const bool affine : {true, false}) {
            // Not centred, the squares themselves are summed, and must be small.
            auto values = x;
            if (!centred)
                for (T& value : values) value -= T(1500);
            x_ = Shifted<T>(values, s.shift);
            const NormShape shape{s.rows, s.C, centred};
            normalise_forward<T>(shape, 1e-5, values.data(), affine ? w.data() : nullptr,
                                 affine ? b.data() : nullptr, xhat.data(), r_cpu.data(), y.data());
            cuda::normalise_forward<T>(shape, 1e-5, x_.data(), affine ? w_.data() : nullptr,
                                       affine ? b_.data() : nullptr, xhat_.data(), r.data(), y_.data(),
                                       nullptr);
            EXPECT(equal(xhat_.values(), xhat) && equal(r, r_cpu) && equal(y_.values(), y));
        }
}

// Bits say which arrays are there. Long rows take the same code, in more emulated threads.
using Present = std::vector<int>;

template <class T>
T* where(int present, int bit, T* p) {
    return present >> bit & 1 ? p : nullptr;
}

// Of tx, tw, tb, w.
template <class T>
void test_tangent(Inputs<T>& in, bool centred) {
    const auto& s = in.s;
    const NormShape shape{s.rows, s.C, centred};
    std::vector<T> ty(in.tdy.size());
    Shifted<T> ty_(in.tdy, s.shift);
    for (const int present : s.C > 1000 ? Present{0b1111} : Present{0b1111, 0b0111, 0b0010, 0b0100, 0b1001}) {
        normalise_tangent<T>(shape, s.K, in.xhat.data(), in.r.data(), where(present, 3, in.w.data()),
                             where(present, 0, in.tx.data()), where(present, 1, in.tw.data()), in.stride,
                             where(present, 2, in.tb.data()), in.stride, ty.data());
        cuda::normalise_tangent<T>(shape, s.K, in.xhat_.data(), in.r.data(), where(present, 3, in.w_.data()),
                                   where(present, 0, in.tx_.data()), where(present, 1, in.tw_.data()),
                                   in.stride, where(present, 2, in.tb_.data()), in.stride, ty_.data(),
                                   nullptr);
        EXPECT(equal(ty_.values(), ty));
    }
}

// Of w, tdy, dy, tx, tw, so_far. On the device so_far may lie otherwise than all else.
template <class T>
NormaliseAdjoint<T> adjoint_on_cpu(Inputs<T>& in, int present) {
    return {in.xhat.data(),
            in.r.data(),
            where(present, 0, in.w.data()),
            where(present, 1, in.tdy.data()),
            where(present, 2, in.dy.data()),
            where(present, 3, in.tx.data()),
            where(present, 4, in.tw.data()),
            in.stride,
            where(present, 5, in.so_far.data())};
}

template <class T>
NormaliseAdjoint<T> adjoint_on_device(Inputs<T>& in, int present) {
    return {in.xhat_.data(),
            in.r.data(),
            where(present, 0, in.w_.data()),
            where(present, 1, in.tdy_.data()),
            where(present, 2, in.dy_.data()),
            where(present, 3, in.tx_.data()),
            where(present, 4, in.tw_.data()),
            in.stride,
            where(present, 5, present >> 6 & 1 ? in.so_far_askew.data() : in.so_far_.data())};
}

template <class T>
void test_adjoint(Inputs<T>& in, bool centred) {
    const auto& s = in.s;
    const NormShape shape{s.rows, s.C, centred};
    std::vector<T> tdx(in.tdy.size());
    Shifted<T> tdx_(in.tdy, s.shift);
    for (const int present :
         s.C > 1000 ? Present{0b111111}
                    : Present{0b111111, 0b1111111, 0b001011, 0b011101, 0b110110, 0b000011, 0b111100}) {
        normalise_adjoint(shape, s.K, adjoint_on_cpu(in, present), tdx.data());
        cuda::normalise_adjoint(shape, s.K, adjoint_on_device(in, present), tdx_.data(), nullptr);
        EXPECT(equal(tdx_.values(), tdx));
    }
}

template <class T>
void test_sums(const RowsShape& s, const Present& all) {
    Inputs<T> in(s);
    const NormShape shape{s.rows, s.C, true};
    const std::vector<double> garbage(static_cast<size_t>(s.K * kRowPieces * s.C), 7);
    for (const int present : all)
        for (const auto& [weight, bias] :
             {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
            if (present != all[0] && !(weight && bias)) continue;
            auto weights = garbage, biases = garbage, weights_cpu = garbage, biases_cpu = garbage;
            normalise_sums(shape, s.K, adjoint_on_cpu(in, present), weight ? weights_cpu.data() : nullptr,
                           bias ? biases_cpu.data() : nullptr);
            cuda::normalise_sums(shape, s.K, adjoint_on_device(in, present),
                                 weight ? weights.data() : nullptr, bias ? biases.data() : nullptr, nullptr);
            EXPECT(equal(weights, weights_cpu) && equal(biases, biases_cpu));
        }
}

// In double the sums have at most `rows` roundings; in float they would have them a billion times as large.
template <class T>
void test_sums_in_double() {
    const int64_t K = 2, rows = 8 * 40 + 3, C = 36;
    const auto xhat = numbers<T>(rows * C, 1), tdy = numbers<T>(K * rows * C, 2);
    const std::vector<T> r(static_cast<size_t>(rows), T(1));
    const NormaliseAdjoint<T> d{xhat.data(), r.data(), nullptr, tdy.data(), nullptr, nullptr, nullptr, 0};
    std::vector<double> weights(static_cast<size_t>(K * kRowPieces * C)), biases(weights),
        weights_cpu(weights), biases_cpu(weights);
    normalise_sums({rows, C, true}, K, d, weights_cpu.data(), biases_cpu.data());
    cuda::normalise_sums({rows, C, true}, K, d, weights.data(), biases.data(), nullptr);
    const auto largest = [](const std::vector<T>& values) {
        double result = 0;
        for (const T value : values) result = std::max(result, std::abs(double{value}));
        return result;
    };
    const double n = static_cast<double>(rows_in_piece(rows));
    const double bound = 2 * n * n * std::numeric_limits<double>::epsilon() * largest(tdy);
    for (size_t i = 0; i < weights.size(); ++i) {
        EXPECT(std::abs(biases[i] - biases_cpu[i]) <= bound);
        EXPECT(std::abs(weights[i] - weights_cpu[i]) <= bound * largest(xhat));
    }
}

template <class T>
void test_all() {
    for_row_shapes([](const RowsShape& s) {
        test_forward<T>(s);
        Inputs<T> in(s);
        test_tangent(in, true);
        test_adjoint(in, true);
        if (s.C > 1000) return;
        test_tangent(in, false);
        test_adjoint(in, false);
    });
    test_sums<T>({2, 3, 20, 0}, {0b11111, 0b00010, 0b01100, 0b10010, 0b01010});
    test_sums<T>({1, 17, 132, 1}, {0b01110});
    test_sums<T>({1, 17, 132, 0}, {0b01110});
    test_sums<T>({0, 3, 8, 0}, {0b01110});
    test_sums<T>({2, 0, 8, 0}, {0b01110});
    test_sums<T>({2, 3, 0, 0}, {0b01110});
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
        test_sums<float>({1, 8 * 35 - 3, 8, 0}, {0b01110});  // more rows than a block has moments for
    }
    test_sums_in_double<float>();
    test_sums_in_double<double>();
    return failures != 0;
}
