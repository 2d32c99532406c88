#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "gemm_bf16.h"
#include "gemm_choice.h"
#include "tensor_ops.h"

namespace flatcore {

namespace {

bool rounds(const at::Tensor& c, const Factor& a, Precision precision) {
    return precision == Precision::bf16 && c.stride(-1) == 1 &&
           bf16_pays(c.size(-2), c.size(-1), a.full().size(-1));
}

// The same matrix for K directions.
at::Tensor for_each_direction(const at::Tensor& t, int64_t K) {
    return t.dim() == 3 ? t : t.unsqueeze(0).expand({K, t.size(0), t.size(1)});
}

}  // namespace

void gemm(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate, Precision precision) {
    if (rounds(c, a, precision))
        multiply_bf16(c, a, b, accumulate);
    else
        multiply(c, a.full(), b.full(), accumulate);
}

void gemm_shared(const at::Tensor& c, const Factor& left, const Factor& b, bool accumulate,
                 Precision precision) {
    const at::Tensor& a = left.full();
    if (rounds(c, left, precision)) {
        multiply_bf16(c, left, b, accumulate);
    } else if (c.is_contiguous()) {
        gemm(c.flatten(0, 1), a.reshape({-1, a.size(2)}), b, accumulate);
    } else if (on_gpu(c)) {
        multiply(c, a, for_each_direction(b.full(), c.size(0)), accumulate);
    } else {  // a slice of the result: directions lie P apart
        for (int64_t k = 0; k < c.size(0); ++k) gemm(c.select(0, k), a.select(0, k), b, accumulate);
    }
}

namespace {

// Multiply-adds from which a product is worth a call of its own. Smaller ones share one batched call, which
// wants contiguous results: one more pass over those of a slice of the flat vector costs less than K calls.
constexpr int64_t kLarge = int64_t{1} << 20;

// Whole directions to each thread, with no more than an eighth of the time lost to the last round.
bool share_directions(int64_t K) {
    const int64_t threads = at::get_num_threads(), rounds = (K + threads - 1) / threads;
    return threads > 1 && !at::in_parallel_region() && 8 * rounds * threads <= 9 * K;
}

}  // namespace

int64_t gemm_each_workspace(bool gpu, int64_t K, int64_t m, int64_t n, int64_t inner) {
    return !gpu && K > 1 && m * n * inner < kLarge ? K * m * n : 0;
}

void gemm_each(const at::Tensor& c, const Factor& left, const Factor& right, bool accumulate,
               Precision precision) {
    if (rounds(c, left, precision)) {
        multiply_bf16(c, left, right, accumulate);
        return;
    }
    const int64_t K = c.size(0);
    const at::Tensor &a = left.full(), &b = right.full();
    // cuBLAS takes results that lie apart, and one call fills a GPU best.
    if (K > 1 && on_gpu(c)) {
        multiply(c, for_each_direction(a, K), for_each_direction(b, K), accumulate);
        return;
    }
    const auto matrix = [](const at::Tensor& t, int64_t k) { return t.dim() == 3 ? t.select(0, k) : t; };
    const auto one_by_one = [&](int64_t first, int64_t last) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // set for each thread
        for (int64_t k = first; k < last; ++k) gemm(c.select(0, k), matrix(a, k), matrix(b, k), accumulate);
    };
    if (K == 1 || c.size(1) * c.size(2) * a.size(-1) >= kLarge) {
        if (share_directions(K))
            at::parallel_for(0, K, 1, one_by_one);
        else
            one_by_one(0, K);
        return;
    }
    if (c.is_contiguous()) {
        multiply(c, for_each_direction(a, K), for_each_direction(b, K), accumulate);
        return;
    }
    at::Tensor product = at::empty(c.sizes(), c.options());
    multiply(product, for_each_direction(a, K), for_each_direction(b, K), false);
    if (accumulate)
        c.add_(product);
    else
        c.copy_(product);
}

}  // namespace flatcore
