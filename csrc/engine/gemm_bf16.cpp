// One operand is rounded ahead, whole; blocks of 64 rows or columns of the other are units of work, each
// rounded by the thread that multiplies it, so that it is still in that core's cache. The products of blocks
// are oneDNN's micro-kernel, which torch exports and which adds up in float32. oneDNN's whole product, as far
// as torch exports it, writes bfloat16: one more rounding and a pass over the result.
#include "gemm_bf16.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "kernels/bf16.h"
#include "kernels/parallel.h"
#include "on_device.h"

namespace flatcore {

namespace {

constexpr int64_t kBlock = 64;  // rows of a, columns of b
constexpr int64_t kLane = 16;   // columns that the instructions work on at once
// Elements along k at once: two blocks stay in the cache of a core.
constexpr int64_t kDepth = 1024;
// Rows of a stand a little more than a power of two apart, which would put them into the same sets of the
// cache.
constexpr int64_t kRowPadding = 16;
// Pairs of a batch's operands rounded before they are used: 4 MiB.
constexpr int64_t kAtOnce = 1 << 20;

// Pairs to round and products to add up, below which a second thread costs more than it saves.
constexpr int64_t kRoundingGrain = 1 << 15, kProductGrain = 1 << 19;

// Measured on a Zen 4, docs/performance.md.
constexpr int64_t kNarrowest = 32;
constexpr int64_t kSmallest = int64_t{1} << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A batch of operands; `length` rows of a or columns of b, the axis i of a pair, by `depth` along k.
struct Operand {
    const float* data;
    int64_t batch, stride_i, stride_k, length, depth;

    bool shared() const { return batch == 0; }
    PairSource at(int64_t entry, int64_t i, int64_t k) const {
        return {data + entry * batch + i * stride_i + k * stride_k, stride_i, stride_k};
    }
};

// How rounded operands lie: rows of a one after another, columns of b in panels of 64, pairs of rows
// interleaved.
struct RoundedRows {
    static int64_t row(int64_t depth) { return ceil_div(depth, 2) + kRowPadding; }
    static int64_t size(int64_t length, int64_t depth) { return length * row(depth); }
    static int64_t offset(int64_t i, int64_t k, int64_t depth) { return i * row(depth) + k / 2; }
    static PairTarget target(uint32_t* data, int64_t depth) { return {data, row(depth), 1}; }
};
struct RoundedPanels {
    static int64_t size(int64_t length, int64_t depth) {
        return ceil_div(length, kBlock) * kBlock * ceil_div(depth, 2);
    }
    // i is a multiple of 64.
    static int64_t offset(int64_t i, int64_t k, int64_t depth) {
        return i * ceil_div(depth, 2) + k / 2 * kBlock;
    }
    static PairTarget target(uint32_t* data, int64_t /*depth*/) { return {data, 1, kBlock}; }
};

// c (+)= a b of blocks; a's rows stand `a_row` pairs apart, b is a panel.
void multiply_blocks(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t a_row,
                     const uint32_t* b, float* c, int64_t c_row, bool accumulate) {
    at::native::cpublas::brgemm(rows, columns, ceil_div(depth, 2) * 2, 2 * a_row, kBlock, c_row, accumulate,
                                reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c);
}

// Blocks of nearly equal length, in all batch entries together a multiple of the threads' number where that
// leaves them long enough.
int64_t block_length(int64_t length, int64_t entries) {
    const int64_t threads = at::get_num_threads(), multiple = threads / std::gcd(threads, entries);
    const int64_t blocks = ceil_div(ceil_div(length, kBlock), multiple) * multiple;
    return std::min(kBlock, ceil_div(ceil_div(length, blocks), kLane) * kLane);
}

struct Result {
    float* data;
    int64_t batch, row;
};

// Rounds `entries` operands from the entry `first` on, one after another, or the one that all share.
template <class Layout>
void round_ahead(const Operand& x, int64_t first, int64_t entries, uint32_t* rounded) {
    const int64_t pieces = ceil_div(x.length, kBlock), size = Layout::size(x.length, x.depth);
    const int64_t grain = ceil_div(kRoundingGrain, kBlock * ceil_div(x.depth, 2));
    parallel_for(0, (x.shared() ? 1 : entries) * pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t entry = piece / pieces, i = piece % pieces * kBlock;
            uint32_t* out = rounded + entry * size + Layout::offset(i, 0, x.depth);
            round_to_pairs(std::min(kBlock, x.length - i), x.depth, x.at(first + entry, i, 0),
                           Layout::target(out, x.depth));
        }
    });
}

uint32_t* pairs(const at::Tensor& memory) {
    return reinterpret_cast<uint32_t*>(memory.mutable_data_ptr<int32_t>());
}

class Product {
 public:
    Product(const Operand& a, const Operand& b, const Result& c, bool accumulate)
        : a_(a), b_(b), c_(c), accumulate_(accumulate) {}

    // What several directions share is rounded once, ahead; else the smaller operand is.
    void run(int64_t batch) const {
        const bool one_shared = batch > 1 && a_.shared() != b_.shared();
        const bool a_ahead = one_shared ? a_.shared() : a_.length <= b_.length;
        if (a_ahead)
            run<RoundedRows>(batch, a_, b_, [this](auto... block) { multiply_columns(block...); });
        else
            run<RoundedPanels>(batch, b_, a_, [this](auto... block) { multiply_rows(block...); });
    }

    // Pairs that a thread rounds at once: one block of either kind.
    static int64_t scratch_size() { return RoundedRows::size(kBlock, kDepth); }

 private:
    template <class Layout, class Multiply>
    void run(int64_t batch, const Operand& ahead, const Operand& other, const Multiply& multiply) const {
        const int64_t size = Layout::size(ahead.length, ahead.depth);
        const int64_t group = ahead.shared() ? batch : std::clamp<int64_t>(kAtOnce / size, 1, batch);
        const at::Tensor rounded = at::empty({(ahead.shared() ? 1 : group) * size}, at::kInt);
        for (int64_t first = 0; first < batch; first += group) {
            const int64_t entries = std::min(group, batch - first);
            round_ahead<Layout>(ahead, first, entries, pairs(rounded));
            const int64_t length = block_length(other.length, entries),
                          blocks = ceil_div(other.length, length);
            const int64_t grain = ceil_div(kProductGrain, ahead.length * ahead.depth * length);
            parallel_for(0, entries * blocks, grain, [&](int64_t begin, int64_t end) {
                const at::Tensor scratch = at::empty({scratch_size()}, at::kInt);
                for (int64_t unit = begin; unit < end; ++unit) {
                    const int64_t entry = unit / blocks, i = unit % blocks * length;
                    multiply(pairs(rounded) + (ahead.shared() ? 0 : entry * size), first + entry, i,
                             std::min(length, other.length - i), pairs(scratch));
                }
                at::native::cpublas::brgemm_release();
            });
        }
    }

    // Rows [i, i + rows) of c's entry, b being rounded.
    void multiply_rows(const uint32_t* b, int64_t entry, int64_t i, int64_t rows, uint32_t* scratch) const {
        for (int64_t k = 0; k < a_.depth; k += kDepth) {
            const int64_t depth = std::min(kDepth, a_.depth - k);
            round_to_pairs(rows, depth, a_.at(entry, i, k), RoundedRows::target(scratch, kDepth));
            for (int64_t j = 0; j < b_.length; j += kBlock)
                multiply_blocks(rows, std::min(kBlock, b_.length - j), depth, scratch,
                                RoundedRows::row(kDepth), b + RoundedPanels::offset(j, k, b_.depth),
                                at(entry, i, j), c_.row, accumulate_ || k > 0);
        }
    }

    // Columns [j, j + columns), a being rounded.
    void multiply_columns(const uint32_t* a, int64_t entry, int64_t j, int64_t columns,
                          uint32_t* scratch) const {
        for (int64_t k = 0; k < b_.depth; k += kDepth) {
            const int64_t depth = std::min(kDepth, b_.depth - k);
            round_to_pairs(columns, depth, b_.at(entry, j, k), RoundedPanels::target(scratch, kDepth));
            for (int64_t i = 0; i < a_.length; i += kBlock)
                multiply_blocks(std::min(kBlock, a_.length - i), columns, depth,
                                a + RoundedRows::offset(i, k, a_.depth), RoundedRows::row(a_.depth), scratch,
                                at(entry, i, j), c_.row, accumulate_ || k > 0);
        }
    }

    float* at(int64_t entry, int64_t i, int64_t j) const {
        return c_.data + entry * c_.batch + i * c_.row + j;
    }

    Operand a_, b_;
    Result c_;
    bool accumulate_;
};

// Integers, so that every sum is exact; sizes that are no multiples of the blocks.
bool gives_right_numbers() {
    constexpr int64_t m = 35, n = 83, k = 71;
    const at::Tensor a = at::empty({m, k}, at::kFloat), b = at::empty({k, n}, at::kFloat),
                     c = at::empty({m, n}, at::kFloat);
    float *x = a.mutable_data_ptr<float>(), *y = b.mutable_data_ptr<float>();
    for (int64_t i = 0; i < m * k; ++i) x[i] = static_cast<float>(i % 13 - 6);
    for (int64_t i = 0; i < k * n; ++i) y[i] = static_cast<float>(i % 11 - 5);
    multiply_bf16(c, a, b, false);
    multiply_bf16(c, a, b, true);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            float sum = 0;
            for (int64_t l = 0; l < k; ++l) sum += x[i * k + l] * y[l * n + j];
            if (c.const_data_ptr<float>()[i * n + j] != 2 * sum) return false;
        }
    return true;
}

bool found_available() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    try {
        return gives_right_numbers();
    } catch (const c10::Error&) {  // a torch without the kernel
        return false;
    }
#else
    return false;
#endif
}

}  // namespace

bool bf16_available() {
    static const bool available = found_available();
    return available;
}

bool bf16_pays(int64_t m, int64_t n, int64_t k) {
    return std::min({m, n, k}) >= kNarrowest && m * n * k >= kSmallest;
}

void multiply_bf16(const at::Tensor& c, const Factor& left_factor, const Factor& right_factor,
                   bool accumulate) {
    if (on_gpu(c)) return multiply_bf16_on_gpu(c, left_factor, right_factor, accumulate);
    const at::Tensor &a = left_factor.full(), &b = right_factor.full();
    const auto batch_stride = [](const at::Tensor& t) { return t.dim() == 3 ? t.stride(0) : 0; };
    const int64_t m = c.size(-2), n = c.size(-1), k = a.size(-1);
    const Operand left{a.const_data_ptr<float>(), batch_stride(a), a.stride(-2), a.stride(-1), m, k};
    const Operand right{b.const_data_ptr<float>(), batch_stride(b), b.stride(-1), b.stride(-2), n, k};
    const int64_t batch = c.dim() == 3 ? c.size(0) : 1;
    if (batch == 0) return;
    const Result result{c.mutable_data_ptr<float>(), batch_stride(c), c.stride(-2)};
    Product(left, right, result, accumulate).run(batch);
}

int64_t bf16_workspace(int64_t length, int64_t depth, int64_t matrices) {
    const int64_t one = std::max(RoundedRows::size(length, depth), RoundedPanels::size(length, depth));
    return std::max(one, std::min(matrices * one, kAtOnce)) + at::get_num_threads() * Product::scratch_size();
}

}  // namespace flatcore
