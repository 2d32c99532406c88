// piece_sums.cu, emulated, against the CPU's kernel, and that against a plain sum.
#include "kernels/piece_sums.h"

#include "arrays.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;

namespace {

constexpr int64_t kGap = 3;  // between directions of a result, which must stay as it was

template <class T>
void test_sums(int64_t K, int64_t C, bool has_first, bool has_second, bool add) {
    const auto sums = numbers<double>(K * kRowPieces * C, 1), others = numbers<double>(K * kRowPieces * C, 2);
    const int64_t stride = C + kGap, size = K == 0 ? 0 : K * stride - kGap;
    const auto before = numbers<T>(size, 3), before_others = numbers<T>(size, 4);
    const auto of = [&](bool present, const std::vector<double>& from, std::vector<T>& to, bool adds) {
        return present ? PieceSums<T>{from.data(), to.data(), stride, adds} : PieceSums<T>{};
    };
    auto one = before, two = before_others, one_there = before, two_there = before_others;
    add_pieces(K, C, of(has_first, sums, one, add), of(has_second, others, two, !add));
    cuda::add_pieces(K, C, of(has_first, sums, one_there, add), of(has_second, others, two_there, !add),
                     nullptr);
    EXPECT(equal(one, one_there) && equal(two, two_there));

    const auto by_hand = [&](bool present, const std::vector<double>& from, std::vector<T> to, bool adds) {
        if (!present) return to;
        for (int64_t k = 0; k < K; ++k)
            for (int64_t c = 0; c < C; ++c) {
                double sum = 0;
                for (int64_t p = 0; p < kRowPieces; ++p)
                    sum += from[static_cast<size_t>((k * kRowPieces + p) * C + c)];
                T& value = to[static_cast<size_t>(k * stride + c)];
                value = (adds ? value : T(0)) + static_cast<T>(sum);
            }
        return to;
    };
    EXPECT(one == by_hand(has_first, sums, before, add));
    EXPECT(two == by_hand(has_second, others, before_others, !add));
}

// Both into the same place: one after the other.
template <class T>
void test_tied() {
    const int64_t K = 2, C = 5;
    const auto sums = numbers<double>(K * kRowPieces * C, 1), others = numbers<double>(K * kRowPieces * C, 2);
    std::vector<T> result(static_cast<size_t>(K * C), T(9)), there = result;
    const auto run = [&](std::vector<T>& to, const auto& kernel) {
        kernel(PieceSums<T>{sums.data(), to.data(), C, false},
               PieceSums<T>{others.data(), to.data(), C, true});
    };
    run(result, [&](const auto&... both) { add_pieces<T>(K, C, both...); });
    run(there, [&](const auto&... both) { cuda::add_pieces<T>(K, C, both..., nullptr); });
    EXPECT(equal(result, there));
    for (int64_t i = 0; i < K * C; ++i) {
        double one = 0, two = 0;
        for (int64_t p = 0; p < kRowPieces; ++p) {
            const auto at = static_cast<size_t>((i / C * kRowPieces + p) * C + i % C);
            one += sums[at];
            two += others[at];
        }
        EXPECT(result[static_cast<size_t>(i)] == static_cast<T>(one) + static_cast<T>(two));
    }
}

template <class T>
void test_all() {
    for (const int64_t K : {0, 1, 3})
        for (const int64_t C : {0, 1, 7, 300})
            for (int bits = 0; bits < 8; ++bits)
                test_sums<T>(K, C, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0);
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_all<float>();
        test_all<double>();
        test_tied<float>();
        test_tied<double>();
    }
    return failures != 0;
}
