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

void multiply_bf16_on_gpu(const at::Tensor& c, const Factor& a, const Factor& b, bool accumulate) {
    at::Tensor out = c, left = a.rounded(), right = b.rounded();
    if (c.dim() == 3) {
        if (left.dim() == 2) left = left.unsqueeze(0).expand({c.size(0), left.size(0), left.size(1)});
        if (right.dim() == 2) right = right.unsqueeze(0).expand({c.size(0), right.size(0), right.size(1)});
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
