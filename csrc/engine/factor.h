// A factor of matrix products, one matrix or a batch of them, that is rounded to bfloat16 at most once
// however many products read it.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace flatcore {

class Factor {
 public:
    Factor(at::Tensor full) : full_(std::move(full)) {}  // any tensor is one
    Factor(const Factor&) = delete;
    Factor& operator=(const Factor&) = delete;

    const at::Tensor& full() const { return full_; }
    // Of the same sizes and strides, where those are dense. Kept until the factor is gone.
    at::Tensor rounded() const {
        if (of_) return of_->rounded().transpose(-2, -1);
        if (!rounded_.defined()) rounded_ = round(full_);
        return rounded_;
    }
    // Its transpose, which shares what is rounded and must not outlive it.
    Factor t() const& { return {full_.transpose(-2, -1), this}; }
    Factor t() const&& = delete;

 private:
    Factor(at::Tensor full, const Factor* of) : full_(std::move(full)), of_(of) {}
    // A matrix that stands for a whole batch stays one.
    static at::Tensor round(const at::Tensor& t) {
        if (t.dim() == 3 && t.size(0) > 1 && t.stride(0) == 0)
            return t.select(0, 0).to(at::kBFloat16).unsqueeze(0).expand(t.sizes());
        return t.to(at::kBFloat16);
    }

    at::Tensor full_;
    mutable at::Tensor rounded_;
    const Factor* of_ = nullptr;
};

}  // namespace flatcore
