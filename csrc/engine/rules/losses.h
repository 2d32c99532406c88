// The rules of losses that have kernels of their own.
#pragma once

#include "rules.h"

namespace flatcore {

// cross_entropy.cpp
class CrossEntropyRule final : public Rule {
 public:
    CrossEntropyRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return true; }
    bool reads_value(int i) const override { return i > 0; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int) const override { return true; }
    int64_t saved() const override { return rows_ * (classes_ + 1); }

 private:
    template <class T, class Body>
    void with_target(const State& state, const Body& body) const;
    int64_t rows_, classes_;
};

// linear_cross_entropy.cpp
class LinearCrossEntropyRule final : public Rule {
 public:
    LinearCrossEntropyRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return true; }
    bool holds_cut() const override { return holds_cut_; }
    bool reads_value(int) const override { return true; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int i) const override { return i < 3; }
    double flops(int64_t K, bool second_order) const override;
    int64_t saved() const override { return keeps_probabilities() ? rows_ * classes_ : 0; }
    Rounding rounding(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;
    int64_t second_order_workspace() const override;

 private:
    struct Operands;
    template <class Body>
    void for_each_chunk(const Body& body) const;
    template <class T, class Body>
    void with_target(const State& state, int64_t first, const Body& body) const;
    // The probabilities of a single chunk are kept; more are computed in every sweep.
    bool keeps_probabilities() const { return rows_ <= chunk_rows_; }
    Operands values(const State& state) const;
    Operands tangents(const Directions& d) const;
    at::Tensor new_chunk(const State& state) const;
    void logits(const Operands& v, int64_t first, const at::Tensor& z) const;
    at::Tensor probabilities(const State& state, const Operands& v, int64_t first, int64_t rows,
                             const at::Tensor& buffer) const;
    void logit_tangent(const Factor& x, const Factor& weight, const Factor& tx, const Factor& tweight,
                       const at::Tensor& tbias, const at::Tensor& tz, Precision precision) const;
    int64_t rows_, width_, classes_, chunk_rows_;
    bool transposed_, rounds_, holds_cut_;
};

}  // namespace flatcore
