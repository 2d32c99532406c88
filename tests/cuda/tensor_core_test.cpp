// Roundings by exact arithmetic on numbers, and one emulated product of a warp against plain loops, through
// the layout of operands and sums in the lanes.
#include "kernels/tensor_core.h"

#include <cmath>
#include <limits>

#include "arrays.h"
#include "expect.h"

using namespace flatcore;
using namespace flatcore::cuda;

namespace {

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
float bf16(float x) { return from_bits(rounded_to_bf16(x) & 0xffff0000U); }
float tf32(float x) { return from_bits(rounded_to_tf32(x)); }

// To `digits` binary digits, ties to even, by the current rounding of doubles.
float rounded(float x, int digits) {
    int exponent = 0;
    const double fraction = std::frexp(static_cast<double>(x), &exponent);
    return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, digits)), exponent - digits));
}

void test_rounding() {
    auto values = numbers<float>(2000, 1);
    for (const float x : {0.0f, -0.0f, 1.0f, 1e-30f, 1e30f}) values.push_back(x);
    for (int i = 0; i < 64; ++i) {  // ties of both formats
        values.push_back(1 + static_cast<float>(i) * 0x1p-8f);
        values.push_back(1 + static_cast<float>(i) * 0x1p-11f);
    }
    for (const float x : values) {
        EXPECT(bf16(x) == rounded(x, 8) && std::signbit(bf16(x)) == std::signbit(x));
        EXPECT(tf32(x) == rounded(x, 11) && std::signbit(tf32(x)) == std::signbit(x));
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr float kLargest = std::numeric_limits<float>::max();
    EXPECT(bf16(kInfinity) == kInfinity && tf32(-kInfinity) == -kInfinity);
    EXPECT(bf16(kLargest) == kInfinity && tf32(-kLargest) == -kInfinity);
    for (const uint32_t nan : {0x7f800001U, 0x7fffffffU, 0xffc00000U})
        EXPECT(std::isnan(bf16(from_bits(nan))) && std::isnan(tf32(from_bits(nan))));
    EXPECT(bf16_pair(1.0f, -2.0f) == 0xc0003f80U);
}

__device__ int of_warp() { return static_cast<int>(threadIdx.x % 32); }

// a (16, K), b (K, 8), c (16, 8), row-major; K = 8 words.
template <class Format>
__global__ void product(const float* a, const float* b, float* c) {
    constexpr int E = Format::kElements, K = 8 * E;
    const int g = of_warp() / 4, t = of_warp() % 4;
    const auto left = [&](int row, int word) {
        float x[E];
        for (int e = 0; e < E; ++e) x[e] = a[row * K + word * E + e];
        return Format::word(x);
    };
    const auto right = [&](int word, int column) {
        float x[E];
        for (int e = 0; e < E; ++e) x[e] = b[(word * E + e) * 8 + column];
        return Format::word(x);
    };
    const uint32_t of_a[4] = {left(g, t), left(g + 8, t), left(g, t + 4), left(g + 8, t + 4)};
    const uint32_t of_b[2] = {right(t, g), right(t + 4, g)};
    float *upper = c + g * 8 + 2 * t, *lower = c + (g + 8) * 8 + 2 * t;
    multiply_add<Format>(upper[0], upper[1], lower[0], lower[1], of_a, of_b);
}

// Four matrices of 8 x 8 elements of 16 bits, each row by itself in memory, `apart` words after the one
// before.
template <bool Transposed>
__global__ void matrices(const uint32_t* rows, int apart, uint32_t* words) {
    FLATCORE_SHARED(uint32_t, shared, 32 * 12);
    for (int w = 0; w < 4; ++w) shared[of_warp() * apart + w] = rows[of_warp() * 4 + w];
    __syncwarp();
    uint32_t loaded[4];
    load_matrices<Transposed>(loaded, shared + of_warp() * apart);
    for (int m = 0; m < 4; ++m) words[m * 32 + of_warp()] = loaded[m];
}

template <bool Transposed>
void test_matrices() {
    std::vector<uint32_t> rows(32 * 4), words(4 * 32), expected(4 * 32);
    const auto element = [](size_t m, size_t i, size_t j) {
        return static_cast<uint32_t>(1000 * m + 10 * i + j);
    };
    for (size_t m = 0; m < 4; ++m)
        for (size_t i = 0; i < 8; ++i)
            for (size_t w = 0; w < 4; ++w)
                rows[(8 * m + i) * 4 + w] = element(m, i, 2 * w) | element(m, i, 2 * w + 1) << 16;
    for (size_t m = 0; m < 4; ++m)
        for (size_t l = 0; l < 32; ++l) {
            const size_t g = l / 4, t = l % 4;
            expected[m * 32 + l] = Transposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                                              : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
        }
    for (const int apart : {4, 12}) {
        launch(matrices<Transposed>, 1, 32, nullptr, rows.data(), apart, words.data());
        EXPECT(words == expected);
    }
}

// Small integers: exact in every format, and so are their sums.
template <class Format>
void test_product() {
    constexpr int K = 8 * Format::kElements;
    std::vector<float> a(16 * K), b(K * 8), c(16 * 8), expected(16 * 8);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 23) - 11;
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 19) - 9;
    for (size_t i = 0; i < c.size(); ++i) c[i] = expected[i] = static_cast<float>(i % 13);
    for (size_t i = 0; i < 16; ++i)
        for (size_t j = 0; j < 8; ++j)
            for (size_t k = 0; k < K; ++k) expected[i * 8 + j] += a[i * K + k] * b[k * 8 + j];
    launch(product<Format>, 1, 32, nullptr, a.data(), b.data(), c.data());
    EXPECT(equal(c, expected));
}

}  // namespace

int main() {
    test_rounding();
    for (const auto order : orders()) {
        thread_order = order;
        test_product<Tf32>();
        test_product<Bf16>();
        test_matrices<false>();
        test_matrices<true>();
    }
    return failures != 0;
}
