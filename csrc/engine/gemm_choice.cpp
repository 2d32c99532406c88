#include "gemm_choice.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <limits>
#include <mutex>
#include <sstream>
#include <stdexcept>

// Exported by torch's CPU library, whose header is not installed.
namespace at::native {
TORCH_API void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& c, float beta, float alpha);
}

namespace flatcore {

namespace {

// Below this many multiply-adds a call costs more than its arithmetic, and oneDNN's calls cost most.
constexpr int64_t kSmallest = int64_t{1} << 20;
// Vectors and narrow matrices are BLAS's: oneDNN is slow there, and torch 2.13's call of it writes past the
// end of the result where one row is added to and b is transposed.
constexpr int64_t kNarrowest = 16;
// Sizes above behave like this one; it bounds what measuring costs.
constexpr int64_t kLargest = 1024;
constexpr int kRuns = 3;
// oneDNN must be ahead by more than timings differ by chance.
constexpr double kAhead = 0.97;

enum class Policy { measure, blas, onednn };
std::atomic<Policy> policy{Policy::measure};
std::map<GemmClass, bool> choices;
std::mutex choices_mutex;

void by_blas(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    at::Tensor out = c;
    if (a.dim() == 3)
        accumulate ? at::baddbmm_out(out, c, a, b) : at::bmm_out(out, a, b);
    else
        accumulate ? at::addmm_out(out, c, a, b) : at::mm_out(out, a, b);
}

void by_onednn(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    at::native::mkldnn_matmul(a, b, c, accumulate ? 1.0F : 0.0F, 1.0F);
}

template <class Run>
double seconds(const Run& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool onednn_is_ahead(const GemmClass& g, const at::TensorOptions& options) {
    const auto operand = [&](int64_t rows, int64_t columns, bool transposed) {
        const at::Tensor t =
            at::ones({g.batch, transposed ? columns : rows, transposed ? rows : columns}, options);
        const at::Tensor oriented = transposed ? t.transpose(1, 2) : t;
        return g.batch == 1 ? oriented.squeeze(0) : oriented;
    };
    const at::Tensor a = operand(g.m, g.k, g.transposed_a), b = operand(g.k, g.n, g.transposed_b);
    const at::Tensor c = operand(g.m, g.n, false);
    double blas = std::numeric_limits<double>::infinity(), onednn = blas;
    for (int run = 0; run < kRuns; ++run) {  // in turn: a slow moment of the machine hits both
        blas = std::min(blas, seconds([&] { by_blas(c, a, b, false); }));
        onednn = std::min(onednn, seconds([&] { by_onednn(c, a, b, false); }));
    }
    return onednn < kAhead * blas;
}

int64_t rounded(int64_t size) {
    return std::min(kLargest, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(size) * 4 / 3)));
}

bool is_transposed(const at::Tensor& t) { return t.stride(-1) != 1 && t.stride(-2) == 1; }

// What oneDNN reads in place: a matrix that stands for a whole batch it would copy.
bool plain(const at::Tensor& t) {
    const bool repeated = t.dim() == 3 && t.size(0) > 1 && t.stride(0) == 0;
    return !repeated && (t.stride(-1) == 1 || t.stride(-2) == 1);
}

// Rows of a batch of small products go through one loop of the library, a few tell as much as many.
GemmClass class_of(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
    const int64_t batch = a.dim() == 3 ? std::min<int64_t>(rounded(a.size(0)), 8) : 1;
    return {batch,
            rounded(c.size(-2)),
            rounded(c.size(-1)),
            rounded(a.size(-1)),
            is_transposed(a),
            is_transposed(b),
            at::in_parallel_region() ? 1 : at::get_num_threads()};
}

bool onednn_chosen(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
    if (policy == Policy::blas || c.scalar_type() != at::kFloat || !c.is_cpu() ||
        !at::globalContext().userEnabledMkldnn())
        return false;
    if (std::min({c.size(-2), c.size(-1), a.size(-1)}) < kNarrowest) return false;
    if (c.numel() * a.size(-1) < kSmallest || !plain(a) || !plain(b) || c.stride(-1) != 1) return false;
    if (!onednn_multiplies()) return false;
    if (policy != Policy::measure) return policy == Policy::onednn;
    const GemmClass g = class_of(c, a, b);
    const std::lock_guard lock(choices_mutex);
    const auto known = choices.find(g);
    if (known != choices.end()) return known->second;
    return choices[g] = onednn_is_ahead(g, c.options());
}

}  // namespace

std::string GemmClass::name() const {
    std::ostringstream text;
    text << batch << ' ' << m << ' ' << n << ' ' << k << ' ' << transposed_a << ' ' << transposed_b << ' '
         << threads;
    return text.str();
}

GemmClass GemmClass::named(const std::string& name) {
    GemmClass g{};
    std::istringstream text(name);
    text >> g.batch >> g.m >> g.n >> g.k >> g.transposed_a >> g.transposed_b >> g.threads;
    if (!text) throw std::invalid_argument("name of a class of matrix products: got '" + name + "'");
    return g;
}

// torch refuses float32 too where a processor has no instructions for bfloat16 (AVX2 alone, say). Tried once.
bool onednn_multiplies() {
    static const bool found = [] {
        if (!at::globalContext().hasMKLDNN()) return false;
        const at::Tensor a = at::ones({kNarrowest, kNarrowest}, at::kFloat), c = at::zeros_like(a);
        try {
            by_onednn(c, a, a, false);
        } catch (const std::exception&) {
            return false;
        }
        return at::equal(c, at::mm(a, a));
    }();
    return found;
}

void multiply(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    if (onednn_chosen(c, a, b))
        by_onednn(c, a, b, accumulate);
    else
        by_blas(c, a, b, accumulate);
}

void set_gemm_policy(const std::string& named) {
    if (named == "measure")
        policy = Policy::measure;
    else if (named == "blas")
        policy = Policy::blas;
    else if (named == "onednn")
        policy = Policy::onednn;
    else
        throw std::invalid_argument("policy: expected measure, blas or onednn, got '" + named + "'");
}

std::map<std::string, bool> gemm_choices() {
    const std::lock_guard lock(choices_mutex);
    std::map<std::string, bool> named;
    for (const auto& [g, onednn] : choices) named[g.name()] = onednn;
    return named;
}

void set_gemm_choices(const std::map<std::string, bool>& named) {
    const std::lock_guard lock(choices_mutex);
    for (const auto& [name, onednn] : named) choices[GemmClass::named(name)] = onednn;
}

}  // namespace flatcore
