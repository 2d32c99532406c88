#include "gemm_bf16.h"
#include "gemm_choice.h"
#include "tensor_ops.h"

namespace flatcore {

namespace {

bool rounds(const at::Tensor& c, const at::Tensor& a, Precision precision) {
    return precision == Precision::bf16 && c.stride(-1) == 1 &&
           bf16_pays(c.size(-2), c.size(-1), a.size(-1));
}

// The same matrix for K directions.
at::Tensor for_each_direction(const at::Tensor& t, int64_t K) {
    return t.dim() == 3 ? t : t.unsqueeze(0).expand({K, t.size(0), t.size(1)});
}

}  // namespace

void gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
          Precision precision) {
    if (rounds(c, a, precision))
        multiply_bf16(c, a, b, accumulate);
    else
        multiply(c, a, b, accumulate);
}

void gemm_shared(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                 Precision precision) {
    if (rounds(c, a, precision)) {
        multiply_bf16(c, a, for_each_direction(b, c.size(0)), accumulate);
    } else if (c.is_contiguous()) {
        gemm(c.flatten(0, 1), a.reshape({-1, a.size(2)}), b, accumulate);
    } else {  // a slice of the result: directions lie P apart
        for (int64_t k = 0; k < c.size(0); ++k) gemm(c.select(0, k), a.select(0, k), b, accumulate);
    }
}

namespace {

// A batched GEMM needs contiguous results. A slice of the flat vector is not; where its matrices are small,
// one more pass over them costs less than K calls.
constexpr int64_t kSmall = 1 << 16;

}  // namespace

int64_t gemm_each_workspace(int64_t K, int64_t numel) { return K > 1 && numel <= kSmall ? K * numel : 0; }

void gemm_each(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
               Precision precision) {
    const int64_t K = c.size(0);
    if (rounds(c, a, precision)) {
        multiply_bf16(c, for_each_direction(a, K), for_each_direction(b, K), accumulate);
        return;
    }
    const auto matrix = [](const at::Tensor& t, int64_t k) { return t.dim() == 3 ? t.select(0, k) : t; };
    const bool batched = K > 1 && (c.is_contiguous() || c.numel() / K <= kSmall);
    if (!batched) {
        for (int64_t k = 0; k < K; ++k) gemm(c.select(0, k), matrix(a, k), matrix(b, k), accumulate);
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
