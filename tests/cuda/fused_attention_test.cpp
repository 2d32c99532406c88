// The fused kernels, emulated, against attention by its definition (attention_reference.h), within bounds of
// rounding that are derived operation by operation. Array sizes are exact, directions lie apart, and what
// lies between them must stay as it was.
#include "kernels/fused_attention.h"

#include <limits>
#include <vector>

#include "arrays.h"
#include "attention_reference.h"
#include "expect.h"
#include "kernels/cuda_launch.h"

using namespace flatcore;
using reference::Matrix;

namespace {

enum class Masking { none, keep, added };

struct Case {
    AttentionShape shape;
    int64_t K = 1;
    Masking masking = Masking::none;
    bool tq = true, tk = true, tv = true, tdo = true, second_order = true;
    bool tdq = true, tdk = true, tdv = true;  // asked for
};

constexpr int64_t kGap = 3;  // elements between directions, so that not all are aligned
constexpr double kUntouched = -77;

// K arrays of `size` elements.
template <class T>
struct Array {
    int64_t K, size;
    std::vector<T> data;

    int64_t stride() const { return size + kGap; }
    static int64_t length(int64_t K, int64_t size) { return K == 0 ? 0 : K * (size + kGap) - kGap; }
    Array(int64_t K_, int64_t size_, unsigned seed)
        : K(K_), size(size_), data(numbers<T>(length(K_, size_), seed)) {}
    Array(int64_t K_, int64_t size_)
        : K(K_), size(size_), data(static_cast<size_t>(length(K_, size_)), static_cast<T>(kUntouched)) {}

    // Head h of direction n.
    Matrix head(int64_t n, int64_t h, int64_t rows, int64_t columns) const {
        Matrix result(rows, columns);
        const auto from = data.begin() + n * stride() + h * rows * columns;
        std::copy(from, from + rows * columns, result.data.begin());
        return result;
    }
    bool gaps_untouched() const {
        for (int64_t i = 0; i < static_cast<int64_t>(data.size()); ++i)
            if (i % stride() >= size && data[static_cast<size_t>(i)] != static_cast<T>(kUntouched))
                return false;
        return true;
    }
};

template <class T>
DirectionArray<const T> read(const Array<T>& array, bool present) {
    return present ? DirectionArray<const T>{array.data.data(), array.stride()} : DirectionArray<const T>{};
}
template <class T>
DirectionArray<T> written(Array<T>& array, bool present) {
    return present ? DirectionArray<T>{array.data.data(), array.stride()} : DirectionArray<T>{};
}

// Broadcast over the heads (keep) or the batches (added). Row 2 sees no key.
template <class T>
struct Mask {
    std::vector<T> added;
    std::vector<char> keep;
    AttentionMask<T> mask;

    Mask(const AttentionShape& s, Masking masking) {
        const int64_t matrix = s.queries * s.keys;
        std::mt19937 generator(9);
        const auto hidden = [&](int64_t i) { return i % matrix / s.keys == 2 || generator() % 4 == 0; };
        if (masking == Masking::keep) {
            keep.resize(static_cast<size_t>(s.batches * matrix));
            for (size_t i = 0; i < keep.size(); ++i) keep[i] = !hidden(static_cast<int64_t>(i));
            mask.keep = reinterpret_cast<const bool*>(keep.data());
            const int64_t strides[4] = {matrix, 0, s.keys, 1};
            std::copy(strides, strides + 4, mask.strides);
        }
        if (masking == Masking::added) {
            added = numbers<T>(s.heads * matrix, 10);
            for (size_t i = 0; i < added.size(); ++i)
                if (hidden(static_cast<int64_t>(i))) added[i] = -std::numeric_limits<T>::infinity();
            mask.added = added.data();
            const int64_t strides[4] = {0, matrix, s.keys, 1};
            std::copy(strides, strides + 4, mask.strides);
        }
    }
    double bias(const AttentionShape& s, int64_t head, int64_t i, int64_t j) const {
        const double hidden = -std::numeric_limits<double>::infinity();
        if (s.causal && j > i) return hidden;
        const int64_t at = i * s.keys + j, matrix = s.queries * s.keys;
        if (!keep.empty()) return keep[static_cast<size_t>(head / s.heads * matrix + at)] ? 0 : hidden;
        return added.empty() ? 0
                             : static_cast<double>(added[static_cast<size_t>(head % s.heads * matrix + at)]);
    }
};

template <class T>
struct Run {
    Case c;
    ProductPrecision precision;
    AttentionShape s = c.shape;
    int64_t heads = s.batches * s.heads, rows = heads * s.queries;
    int64_t of_q = rows * s.width, of_o = rows * s.value_width, of_k = heads * s.keys * s.width,
            of_v = heads * s.keys * s.value_width;
    Array<T> q{1, of_q, 1}, k{1, of_k, 2}, v{1, of_v, 3}, dout{1, of_o, 4};
    Array<T> tq{c.K, of_q, 5}, tk{c.K, of_k, 6}, tv{c.K, of_v, 7}, tdo{c.K, of_o, 8};
    Mask<T> mask{s, c.masking};
    Array<T> o{1, of_o}, normaliser{1, 2 * rows}, dout_o{1, rows}, to{c.K, of_o}, tdq{c.K, of_q},
        tdk{c.K, of_k}, tdv{c.K, of_v};
    std::vector<T> mean = std::vector<T>(static_cast<size_t>(c.K * rows)), dout_to = mean, workspace = mean;

    void kernels() {
        const AttentionInputs<T> inputs{s, mask.mask, q.data.data(), k.data.data(), v.data.data()};
        const bool p_moves = c.tq || c.tk;
        const T* second = c.second_order ? dout.data.data() : nullptr;
        cuda::fused_attention_forward(inputs, precision, o.data.data(), normaliser.data.data(), nullptr);
        cuda::fused_attention_backward(s, dout.data.data(), o.data.data(), dout_o.data.data(), nullptr);
        const AttentionTangents<T> tangents{read(tq, c.tq), read(tk, c.tk), read(tv, c.tv)};
        const bool moves = p_moves || c.tv;
        cuda::fused_attention_tangent(c.K, inputs, precision, o.data.data(), normaliser.data.data(), tangents,
                                      written(to, true), p_moves ? mean.data() : nullptr, second,
                                      dout_to.data(), nullptr);
        cuda::fused_attention_adjoint(c.K, inputs, precision,
                                      {.tangents = tangents,
                                       .tdo = read(tdo, c.tdo),
                                       .o = o.data.data(),
                                       .normaliser = normaliser.data.data(),
                                       .dout = second,
                                       .dout_o = dout_o.data.data(),
                                       .mean = p_moves ? mean.data() : nullptr,
                                       .dout_to = moves ? dout_to.data() : nullptr,
                                       .workspace = workspace.data(),
                                       .tdq = written(tdq, c.tdq),
                                       .tdk = written(tdk, c.tdk),
                                       .tdv = written(tdv, c.tdv)},
                                      nullptr);
    }

    reference::Directions directions(int64_t n, int64_t h) const {
        const auto of = [&](const Array<T>& array, bool present, int64_t direction, int64_t length,
                            int64_t width) {
            return present ? array.head(direction, h, length, width) : Matrix();
        };
        return {.dout = of(dout, c.second_order, 0, s.queries, s.value_width),
                .tq = of(tq, c.tq, n, s.queries, s.width),
                .tk = of(tk, c.tk, n, s.keys, s.width),
                .tv = of(tv, c.tv, n, s.keys, s.value_width),
                .tdo = of(tdo, c.tdo, n, s.queries, s.value_width)};
    }

    // Of the operands of products, half of the last digit: 8 digits and 11.
    double operand = std::is_same_v<T, double> || precision == ProductPrecision::full ? 0
                     : precision == ProductPrecision::tf32                            ? std::ldexp(1, -11)
                                                                                      : std::ldexp(1, -8);

    // True where `got` differs from the reference by at most the bound; the largest share of it is noted. The
    // bound takes all roundings for equally unfortunate, and where operands are rounded it is more than some
    // results are. They are independent: a result chains at most six products, whose twelve operands are each
    // off by the rounding over sqrt(3) on average, so its norm by twice the rounding; four times that is
    // allowed. A wrong operand is off by the norm itself.
    double worst = 0;
    bool close(const Array<T>& got, int64_t n, int64_t h, const Matrix& expected, const Matrix& bound) {
        const Matrix result = got.head(n, h, expected.rows, expected.columns);
        double square_error = 0, square = 0;
        for (size_t i = 0; i < result.data.size(); ++i) {
            const double error = std::abs(result.data[i] - expected.data[i]);
            if (!(error <= bound.data[i])) return false;
            if (error > 0) worst = std::max(worst, error / bound.data[i]);
            square_error += error * error;
            square += expected.data[i] * expected.data[i];
        }
        return operand == 0 || std::sqrt(square_error) <= 8 * operand * std::sqrt(square);
    }

    void check() {
        kernels();
        const OnHost reference_only;
        // The reference rounds too, in double.
        const double unit =
            std::numeric_limits<T>::epsilon() / 2 + std::numeric_limits<double>::epsilon() / 2;
        const reference::Bounds bounds(unit, operand);
        for (int64_t h = 0; h < heads; ++h) {
            reference::Inputs in{q.head(0, h, s.queries, s.width), k.head(0, h, s.keys, s.width),
                                 v.head(0, h, s.keys, s.value_width), Matrix(s.queries, s.keys), s.scale};
            for (int64_t i = 0; i < s.queries; ++i)
                for (int64_t j = 0; j < s.keys; ++j) in.bias(i, j) = mask.bias(s, h, i, j);
            for (int64_t n = 0; n < c.K; ++n) {
                const auto expected = reference::attention(in, directions(n, h));
                const auto bound = bounds.attention(in, directions(n, h));
                EXPECT(close(o, 0, h, expected.o, bound.o));
                EXPECT(close(to, n, h, expected.to, bound.to));
                if (c.tdq) EXPECT(close(tdq, n, h, expected.tdq, bound.tdq));
                if (c.tdk) EXPECT(close(tdk, n, h, expected.tdk, bound.tdk));
                if (c.tdv) EXPECT(close(tdv, n, h, expected.tdv, bound.tdv));
            }
        }
        for (const Array<T>* array : {&to, &tdq, &tdk, &tdv}) EXPECT(array->gaps_untouched());
    }
};

template <class T>
double check(const Case& c, ProductPrecision precision = ProductPrecision::full) {
    Run<T> run{c, precision};
    const int before = failures;
    run.check();
    if (failures > before) {
        const AttentionShape& s = c.shape;
        std::printf("  in: %zu bytes, precision %d, batches %d heads %d queries %d keys %d widths %d %d "
                    "causal %d K %d\n",
                    sizeof(T), static_cast<int>(precision), int(s.batches), int(s.heads), int(s.queries),
                    int(s.keys), int(s.width), int(s.value_width), s.causal, int(c.K));
    }
    return run.worst;
}

// Every set of directions and of results, few elements.
void test_absent() {
    const AttentionShape shape{1, 2, 17, 13, 8, 4, false, 0.1};
    for (int bits = 0; bits < 16; ++bits)
        for (const bool second_order : {false, true})
            check<double>({.shape = shape,
                           .K = 1 + bits % 3,
                           .tq = (bits & 1) != 0,
                           .tk = (bits & 2) != 0,
                           .tv = (bits & 4) != 0,
                           .tdo = (bits & 8) != 0,
                           .second_order = second_order});
    for (int bits = 0; bits < 8; ++bits)
        check<double>(
            {.shape = shape, .tdq = (bits & 1) != 0, .tdk = (bits & 2) != 0, .tdv = (bits & 4) != 0});
}

// Lengths around those of tiles (32 in double), widths around those of vectors and tiles.
void test_sizes() {
    for (const bool causal : {false, true}) {
        for (const int64_t length : {1, 17, 64, 65})
            check<double>({.shape = {1, 1, length, length, 8, 8, causal, 0.1}});
        check<double>({.shape = {1, 1, 65, 17, 7, 3, causal, 0.125}, .K = 3});
        check<double>({.shape = {1, 1, 17, 65, 3, 7, causal, 0.125}, .K = 5});
        check<double>({.shape = {2, 2, 33, 40, 34, 10, causal, 0.05}, .masking = Masking::added});
        check<double>({.shape = {2, 2, 40, 33, 4, 66, causal, 0.125}, .K = 2, .masking = Masking::keep});
    }
    check<double>({.shape = {1, 1, 130, 130, 8, 8, true, 0.1}});
    check<double>({.shape = {1, 1, 3, 0, 4, 4, false, 0.1}});
    check<double>({.shape = {1, 1, 0, 3, 4, 4, false, 0.1}});
    check<double>({.shape = {1, 0, 3, 3, 4, 4, false, 0.1}});
    check<double>({.shape = {1, 1, 3, 5, 4, 4, false, 0.1}, .K = 0});
}

// Products of each precision, each width of tiles: 64 rows by 64, with matrix units by 32 or 16, and 32 by 16
// in tf32 with the widest. Rows as wide as a tile are aligned and read in one piece.
void test_float(ProductPrecision precision) {
    check<float>({.shape = {1, 2, 70, 65, 8, 12, true, 0.1}, .K = 3, .masking = Masking::keep}, precision);
    check<float>({.shape = {1, 1, 17, 70, 40, 6, false, 0.05}, .K = 3, .masking = Masking::added}, precision);
    check<float>({.shape = {1, 1, 65, 17, 12, 128, true, 0.075}, .K = 2}, precision);
    check<float>({.shape = {1, 1, 17, 9, 9, 5, false, 0.075}, .K = 5, .second_order = false}, precision);
    check<float>({.shape = {1, 1, 64, 80, 64, 64, true, 0.075}}, precision);
    check<float>({.shape = {1, 1, 33, 64, 32, 32, false, 0.1}, .K = 2, .tdv = false}, precision);
    check<float>({.shape = {1, 1, 33, 35, 128, 128, true, 0.05}}, precision);
    check<float>({.shape = {2, 2, 17, 33, 77, 9, false, 0.05}, .K = 2, .masking = Masking::keep}, precision);
    if (precision == ProductPrecision::full) return;
    for (int bits = 0; bits < 16; ++bits)
        check<float>({.shape = {1, 1, 17, 13, 8, 4, false, 0.1},
                      .K = 2,
                      .tq = (bits & 1) != 0,
                      .tk = (bits & 2) != 0,
                      .tv = (bits & 4) != 0,
                      .tdo = (bits & 8) != 0},
                     precision);
}

// A row whose keys an additive mask all hides by the lowest number attends to all of them alike. Half of it:
// what is added must not overflow.
template <class T>
void test_lowest_mask() {
    constexpr int64_t kKeys = 9, kWidth = 4;
    const auto q = numbers<T>(kWidth, 1), k = numbers<T>(kKeys * kWidth, 2),
               v = numbers<T>(kKeys * kWidth, 3);
    const std::vector<T> mask(1, std::numeric_limits<T>::lowest() / 2);
    std::vector<T> o(kWidth), normaliser(2);
    cuda::fused_attention_forward<T>(
        {{1, 1, 1, kKeys, kWidth, kWidth, false, 0.5}, {.added = mask.data()}, q.data(), k.data(), v.data()},
        ProductPrecision::full, o.data(), normaliser.data(), nullptr);
    for (int64_t c = 0; c < kWidth; ++c) {
        double mean = 0, size = 0;
        for (int64_t j = 0; j < kKeys; ++j) {
            const double x = v[static_cast<size_t>(j * kWidth + c)];
            mean += x / kKeys;
            size += std::abs(x) / kKeys;
        }
        // Roundings: a product and a sum for each key, 1 / 9 and its product with 1.
        const double bound = (kKeys + 4) * std::numeric_limits<T>::epsilon() * size;
        EXPECT(std::abs(o[static_cast<size_t>(c)] - mean) <= bound);
    }
}

// A direction's results are the same bits alone and among others.
void test_directions() {
    Case one{.shape = {1, 1, 17, 40, 8, 4, true, 0.1}}, five = one;
    five.K = 5;
    Run<float> alone{one, ProductPrecision::full}, among{five, ProductPrecision::full};
    alone.kernels();
    among.kernels();
    const auto same = [](const Array<float>& a, const Array<float>& b) {
        return std::equal(a.data.begin(), a.data.begin() + a.size, b.data.begin());
    };
    EXPECT(same(alone.to, among.to) && same(alone.tdq, among.tdq));
    EXPECT(same(alone.tdk, among.tdk) && same(alone.tdv, among.tdv));
}

}  // namespace

int main() {
    for (const auto order : orders()) {
        cuda::thread_order = order;
        test_absent();
        test_sizes();
        test_directions();
        test_lowest_mask<float>();
        test_lowest_mask<double>();
        for (const auto precision : {ProductPrecision::full, ProductPrecision::tf32, ProductPrecision::bf16})
            test_float(precision);
    }
    EXPECT(fused_attention_supported({1, 1, 1, 1, 128, 128, false, 1}));
    EXPECT(!fused_attention_supported({1, 1, 1, 1, 129, 8, false, 1}));
    EXPECT(!fused_attention_supported({1, 1, 1, 1, 8, 129, false, 1}));
    return failures != 0;
}
