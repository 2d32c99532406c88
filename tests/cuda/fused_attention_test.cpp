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
// Of heads and the rows of one; uneven: rows are not all aligned.
enum class Layout { in_front, side_by_side, uneven };

struct Case {
    AttentionShape shape;
    int64_t K = 1;
    Masking masking = Masking::none;
    bool tq = true, tk = true, tv = true, tdo = true, second_order = true;
    bool tdq = true, tdk = true, tdv = true;  // asked for
    Layout layout = Layout::in_front;         // of the directions
};

constexpr int64_t kGap = 3;                   // elements between directions, so that not all are aligned
constexpr int64_t kBesides = 4, kUneven = 1;  // elements of a row that belong to no head
constexpr double kUntouched = -77;

// K directions of (batches, heads, rows, width).
template <class T>
struct Array {
    int64_t K, batches, heads, rows, width;
    int64_t row, head, batch, direction;  // strides
    std::vector<T> data;

    Array(int64_t K_, const AttentionShape& s, int64_t rows_, int64_t width_, Layout layout)
        : K(K_), batches(s.batches), heads(s.heads), rows(rows_), width(width_) {
        if (layout == Layout::in_front) {
            row = width;
            head = rows * row;
            batch = heads * head;
            direction = batches * batch + kGap;
        } else {
            head = width;
            row = heads * head + (layout == Layout::uneven ? kUneven : kBesides);
            batch = rows * row;
            direction = batches * batch;
        }
        data.assign(static_cast<size_t>(length()), static_cast<T>(kUntouched));
    }
    Array(int64_t K_, const AttentionShape& s, int64_t rows_, int64_t width_, Layout layout, unsigned seed)
        : Array(K_, s, rows_, width_, layout) {
        data = numbers<T>(length(), seed);
    }

    // Nothing behind the last element, so that to read there is an error.
    int64_t length() const {
        if (K * batches * heads * rows == 0) return 0;
        return (K - 1) * direction + (batches - 1) * batch + (heads - 1) * head + (rows - 1) * row + width;
    }
    size_t place(int64_t n, int64_t h, int64_t i) const {
        return static_cast<size_t>(n * direction + h / heads * batch + h % heads * head + i * row);
    }
    // Head h of all, of direction n.
    Matrix matrix(int64_t n, int64_t h) const {
        Matrix result(rows, width);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < width; ++c) result(i, c) = data[place(n, h, i) + static_cast<size_t>(c)];
        return result;
    }
    bool gaps_untouched() const {
        std::vector<bool> of_a_row(data.size());
        for (int64_t n = 0; n < K; ++n)
            for (int64_t h = 0; h < batches * heads; ++h)
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t c = 0; c < width; ++c)
                        of_a_row[place(n, h, i) + static_cast<size_t>(c)] = true;
        for (size_t i = 0; i < data.size(); ++i)
            if (!of_a_row[i] && data[i] != static_cast<T>(kUntouched)) return false;
        return true;
    }
};

template <class T>
HeadArray<const T> read(const Array<T>& a, bool present) {
    return present ? HeadArray<const T>{a.data.data(), a.direction, a.batch, a.head, a.row}
                   : HeadArray<const T>{};
}
template <class T>
HeadArray<T> written(Array<T>& a, bool present) {
    return present ? HeadArray<T>{a.data.data(), a.direction, a.batch, a.head, a.row} : HeadArray<T>{};
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
    Array<T> q = like_q(1, Layout::in_front, 1U), k = like_k(1, Layout::in_front, 2U),
             v = like_v(1, Layout::in_front, 3U), dout = like_o(1, Layout::in_front, 4U),
             o = like_o(1, Layout::in_front);
    Array<T> tq = like_q(c.K, c.layout, 5U), tk = like_k(c.K, c.layout, 6U), tv = like_v(c.K, c.layout, 7U),
             tdo = like_o(c.K, c.layout, 8U);
    Array<T> to = like_o(c.K, c.layout), tdq = like_q(c.K, c.layout), tdk = like_k(c.K, c.layout),
             tdv = like_v(c.K, c.layout);
    Mask<T> mask{s, c.masking};
    std::vector<T> normaliser = std::vector<T>(static_cast<size_t>(2 * rows)),
                   dout_o = std::vector<T>(static_cast<size_t>(rows));
    std::vector<T> mean = std::vector<T>(static_cast<size_t>(c.K * rows)), dout_to = mean, workspace = mean;

    Array<T> like_q(int64_t K, auto... rest) const { return {K, s, s.queries, s.width, rest...}; }
    Array<T> like_k(int64_t K, auto... rest) const { return {K, s, s.keys, s.width, rest...}; }
    Array<T> like_v(int64_t K, auto... rest) const { return {K, s, s.keys, s.value_width, rest...}; }
    Array<T> like_o(int64_t K, auto... rest) const { return {K, s, s.queries, s.value_width, rest...}; }

    void kernels() {
        const AttentionInputs<T> inputs{s, mask.mask, q.data.data(), k.data.data(), v.data.data()};
        const bool p_moves = c.tq || c.tk;
        const T* second = c.second_order ? dout.data.data() : nullptr;
        cuda::fused_attention_forward(inputs, precision, o.data.data(), normaliser.data(), nullptr);
        cuda::fused_attention_backward(s, dout.data.data(), o.data.data(), dout_o.data(), nullptr);
        const AttentionTangents<T> tangents{read(tq, c.tq), read(tk, c.tk), read(tv, c.tv)};
        const bool moves = p_moves || c.tv;
        cuda::fused_attention_tangent(c.K, inputs, precision, o.data.data(), normaliser.data(), tangents,
                                      written(to, true), p_moves ? mean.data() : nullptr, second,
                                      dout_to.data(), nullptr);
        cuda::fused_attention_adjoint(c.K, inputs, precision,
                                      {.tangents = tangents,
                                       .tdo = read(tdo, c.tdo),
                                       .o = o.data.data(),
                                       .normaliser = normaliser.data(),
                                       .dout = second,
                                       .dout_o = dout_o.data(),
                                       .mean = p_moves ? mean.data() : nullptr,
                                       .dout_to = moves ? dout_to.data() : nullptr,
                                       .workspace = workspace.data(),
                                       .tdq = written(tdq, c.tdq),
                                       .tdk = written(tdk, c.tdk),
                                       .tdv = written(tdv, c.tdv)},
                                      nullptr);
    }

    reference::Directions directions(int64_t n, int64_t h) const {
        const auto of = [&](const Array<T>& array, bool present, int64_t direction) {
            return present ? array.matrix(direction, h) : Matrix();
        };
        return {.dout = of(dout, c.second_order, 0),
                .tq = of(tq, c.tq, n),
                .tk = of(tk, c.tk, n),
                .tv = of(tv, c.tv, n),
                .tdo = of(tdo, c.tdo, n)};
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
        const Matrix result = got.matrix(n, h);
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
            reference::Inputs in{q.matrix(0, h), k.matrix(0, h), v.matrix(0, h), Matrix(s.queries, s.keys),
                                 s.scale};
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
                    "causal %d K %d layout %d\n",
                    sizeof(T), static_cast<int>(precision), int(s.batches), int(s.heads), int(s.queries),
                    int(s.keys), int(s.width), int(s.value_width), s.causal, int(c.K),
                    static_cast<int>(c.layout));
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
                           .second_order = second_order,
                           .layout = second_order ? Layout::side_by_side : Layout::in_front});
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
    check<double>({.shape = {2, 3, 35, 20, 6, 10, false, 0.1}, .K = 2, .layout = Layout::side_by_side});
    check<double>({.shape = {2, 3, 35, 40, 7, 3, true, 0.1}, .K = 3, .layout = Layout::side_by_side});
    check<double>({.shape = {2, 1, 35, 20, 8, 8, true, 0.1}, .K = 2, .layout = Layout::uneven});
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
    check<float>({.shape = {2, 2, 33, 70, 64, 64, false, 0.075}, .K = 2, .layout = Layout::side_by_side},
                 precision);
    check<float>({.shape = {1, 2, 33, 40, 64, 64, false, 0.075}, .K = 2, .layout = Layout::uneven},
                 precision);
    check<float>({.shape = {2, 2, 40, 40, 9, 20, true, 0.1},
                  .K = 2,
                  .masking = Masking::added,
                  .layout = Layout::side_by_side},
                 precision);
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
        return std::equal(a.data.begin(), a.data.end(), b.data.begin());
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
