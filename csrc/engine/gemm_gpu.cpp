// Float32 products with operands rounded to bfloat16 on a GPU: torch's products of bfloat16 that give
// float32. cuBLAS rounds nothing itself, so both operands are rounded ahead: 6 bytes of traffic an element,
// which a product with some hundred rows outweighs.
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include "gemm_bf16.h"
#include "on_device.h"

namespace flatcore {

namespace {

// A matrix that stands for a whole batch is rounded once.
at::Tensor rounded(const at::Tensor& t) {
    if (t.dim() == 3 && t.size(0) > 1 && t.stride(0) == 0)
        return t.select(0, 0).to(at::kBFloat16).unsqueeze(0).expand(t.sizes());
    return t.to(at::kBFloat16);
}

}  // namespace

void multiply_bf16_on_gpu(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    at::Tensor out = c, left = rounded(a), right = rounded(b);
    if (c.dim() == 3) {
        if (left.dim() == 2) left = left.unsqueeze(0).expand({c.size(0), a.size(0), a.size(1)});
        if (right.dim() == 2) right = right.unsqueeze(0).expand({c.size(0), b.size(0), b.size(1)});
    }
    const bool batched = c.dim() == 3;
    if (c.is_cpu()) {  // emulated: the CPU has no such product
        left = left.to(c.scalar_type());
        right = right.to(c.scalar_type());
        if (batched)
            accumulate ? at::baddbmm_out(out, c, left, right) : at::bmm_out(out, left, right);
        else
            accumulate ? at::addmm_out(out, c, left, right) : at::mm_out(out, left, right);
    } else if (batched) {
        accumulate ? at::baddbmm_out(out, c, left, right, at::kFloat)
                   : at::bmm_out(out, left, right, at::kFloat);
    } else {
        accumulate ? at::addmm_out(out, c, left, right, at::kFloat)
                   : at::mm_out(out, left, right, at::kFloat);
    }
}

}  // namespace flatcore
