// The first two sweeps of one batch, kept across products: values, adjoints, and what each rule saved.
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

#include "program.h"
#include "workspace.h"

namespace flatcore {

class State {
 public:
    // Runs forward and backward. `parameters` and `constants` hold a tensor per value id, of one floating
    // dtype and on one device; constants that are not floating (indices) are allowed. `seed` is the adjoint
    // of the loss: the weight of this batch in the objective. The program must outlive the state.
    State(const Program& program, const std::unordered_map<int, at::Tensor>& leaves, double seed);

    const Program& program() const { return program_; }
    // Throws std::logic_error where the value was freed: then a rule does not say in reads_value what it
    // reads.
    const at::Tensor& value(int id) const;
    const at::Tensor& adjoint(int id) const { return adjoints_[static_cast<size_t>(id)]; }
    std::vector<at::Tensor>& saved(const Op& op) { return saved_[static_cast<size_t>(op.index)]; }
    const std::vector<at::Tensor>& saved(const Op& op) const { return saved_[static_cast<size_t>(op.index)]; }

    double loss() const { return loss_; }
    at::TensorOptions options() const { return options_; }
    int64_t bytes() const;  // held beyond the parameters and constants

    void set_adjoint(int id, at::Tensor adjoint) { adjoints_[static_cast<size_t>(id)] = std::move(adjoint); }
    void release_after_backward(const Op& op);

 private:
    const WorkspaceUser user_;
    const Program& program_;
    std::vector<at::Tensor> values_, adjoints_;
    std::vector<std::vector<at::Tensor>> saved_;
    at::TensorOptions options_;
    double loss_ = 0;
};

}  // namespace flatcore
