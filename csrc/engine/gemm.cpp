#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "tensor_ops.h"

namespace flatcore {

void gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    at::Tensor out = c;
    if (accumulate)
        at::addmm_out(out, c, a, b);
    else
        at::mm_out(out, a, b);
}

void gemm_shared(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
    if (c.is_contiguous()) {
        gemm(c.flatten(0, 1), a.reshape({-1, a.size(2)}), b, accumulate);
    } else {  // a slice of the result: directions lie P apart
        for (int64_t k = 0; k < c.size(0); ++k) gemm(c.select(0, k), a.select(0, k), b, accumulate);
    }
}

}  // namespace flatcore
