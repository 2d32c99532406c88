// The rule of a function that is differentiated elsewhere.
#pragma once

#include "engine/external.h"
#include "engine/rule.h"

namespace flatcore {

class ExternalRule final : public Rule {
 public:
    ExternalRule(const Program& program, const Op& op);
    at::Tensor forward(State& state) const override;
    at::Tensor tangent(const Directions& d) const override;
    void adjoint(Directions& d) const override;
    bool has_second_order() const override { return true; }
    bool reads_value(int) const override { return true; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int) const override { return true; }
    double flops(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;

 private:
    std::vector<at::Tensor> inputs(const State& state) const;
    std::vector<at::Tensor> tangents(const Directions& d) const;
    External function_;
};

}  // namespace flatcore
