// A function the vocabulary cannot say, differentiated elsewhere: what the engine asks of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace flatcore {

// y = f(x) of several tensors. Directions of a tensor of shape S are (K, *S). An undefined tensor stands for
// one that is not active, not asked for, or zero. Results are memory of their own.
class ExternalFunction {
 public:
    using Tensors = std::vector<at::Tensor>;
    virtual ~ExternalFunction() = default;

    virtual at::Tensor forward(const Tensors& x) const = 0;
    // ty = f'(x) tx
    virtual at::Tensor tangent(const Tensors& x, const Tensors& tx) const = 0;
    // tdx = f'(x)^T tdy, plus (f'(x)^T)' applied to (tx, dy) where dy is defined; for the inputs in `wants`.
    virtual Tensors adjoint(const Tensors& x, const Tensors& tx, const at::Tensor& dy, const at::Tensor& tdy,
                            const std::vector<bool>& wants) const = 0;

    // Of tangent and adjoint for one direction; and the elements that they hold at once besides directions.
    virtual double flops() const = 0;
    virtual int64_t workspace() const = 0;
};

}  // namespace flatcore
