// The rule classes, one op family per file.
#pragma once

#include "attention_tiles.h"
#include "engine/rule.h"
#include "engine/state.h"
#include "engine/tensor_ops.h"
#include "kernels/fused_attention.h"

namespace flatcore {

#define FLATCORE_RULE_METHODS                               \
    at::Tensor forward(State& state) const override;        \
    at::Tensor tangent(const Directions& d) const override; \
    void adjoint(Directions& d) const override;

// linear.cpp
class LinearRule final : public Rule {
 public:
    LinearRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return active(0) && active(1); }
    bool bilinear() const override { return true; }
    bool reads_value(int i) const override { return (i == 0 && active(1)) || (i == 1 && active(0)); }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int i) const override { return has_second_order() && i < 2; }
    double flops(int64_t K, bool second_order) const override;
    Rounding rounding(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;

 private:
    bool bias_joins(const Directions& d) const;
    at::Tensor weight_as_matrix(const at::Tensor& weight) const;  // (in, out), a view
    int64_t rows_, in_, out_;
    bool transposed_;
};

// matmul.cpp
class MatmulRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return active(0) && active(1); }
    bool bilinear() const override { return true; }
    bool reads_value(int i) const override { return active(1 - i); }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int) const override { return has_second_order(); }
    double flops(int64_t K, bool second_order) const override;
    Rounding rounding(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;
};

// convolution.cpp
class ConvolutionRule final : public Rule {
 public:
    ConvolutionRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return active(0) && active(1); }
    bool bilinear() const override { return true; }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int i) const override { return has_second_order() && i < 2; }
    bool channels_last_output() const override { return true; }
    double flops(int64_t K, bool second_order) const override;
    Rounding rounding(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;
    int64_t saved() const override;

 private:
    // Are the terms with an operand of each direction computed for all at once?
    bool together(int64_t K) const;
    at::ScalarType operand_type(const Directions& d) const;
    at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight) const;
    at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) const;
    at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) const;
    bool skips_pixels(const at::Tensor& x, const at::Tensor& weight) const;
    Integers stride_, padding_, dilation_;
    int64_t groups_;
};

// batch_norm.cpp
class BatchNormRule final : public Rule {
 public:
    BatchNormRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return active(0) && active(1); }
    bool bilinear() const override { return true; }
    bool reads_value(int i) const override { return i == 0 && active(1); }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int i) const override { return has_second_order() && i < 2; }
    bool channels_last_output() const override { return output().shape.size() == 4; }

 private:
    at::Tensor rows_of(const at::Tensor& t) const;  // (..., C) contiguous, from a value or directions
    at::Tensor value_of(const at::Tensor& rows, int64_t K) const;  // the inverse
    double eps_;
    int64_t rows_, channels_;
};

// unary.cpp
class UnaryRule final : public Rule {
 public:
    UnaryRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    void finish_backward(State& state) const override;
    bool add_quadratic_form(const Directions& d, const at::Tensor& total) const override;
    bool has_second_order() const override { return curved_; }
    bool reads_tangent_in_adjoint(int) const override { return curved_; }
    bool channels_last_output() const override { return input(0).channels_last; }
    int64_t saved() const override { return output().numel * (curved_ ? 2 : 1); }

 private:
    int function_;
    double a_, b_, c_;
    bool curved_;
};

// arithmetic.cpp
class AddRule final : public Rule {
 public:
    AddRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return either_channels_last(); }

 private:
    double alpha_;
};

class MulRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return either_channels_last(); }
    bool has_second_order() const override { return active(0) && active(1); }
    bool bilinear() const override { return true; }
    bool reads_value(int i) const override { return active(1 - i); }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int) const override { return has_second_order(); }
};

class AffineRule final : public Rule {
 public:
    AffineRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return input(0).channels_last; }

 private:
    double scale_, shift_;
};

class SumRule final : public Rule {
 public:
    SumRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS

 private:
    Integers dims_;
    bool keepdim_;
    double scale_;
};

// pooling.cpp
class MaxPoolRule final : public Rule {
 public:
    MaxPoolRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return true; }
    int64_t saved() const override { return 2 * output().numel; }  // 64-bit indices

 private:
    Integers kernel_, stride_, padding_, dilation_;
    bool ceil_mode_;
};

class AveragePoolRule final : public Rule {
 public:
    AveragePoolRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return true; }
    // A tensor that tells torch's backward kernel the shape and layout of x.
    int64_t workspace(int64_t K) const override { return K * input(0).numel; }

 private:
    Integers kernel_, stride_, padding_;
    bool ceil_mode_, count_include_pad_;
    std::optional<int64_t> divisor_;
};

class AdaptiveAveragePoolRule final : public Rule {
 public:
    AdaptiveAveragePoolRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool channels_last_output() const override { return true; }
    // A tensor that tells torch's backward kernel the shape and layout of x.
    int64_t workspace(int64_t K) const override { return K * input(0).numel; }

 private:
    Integers output_size_;
};

// shape.cpp
class ViewRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool aliases() const override { return true; }
    bool is_view() const override { return true; }
    at::Tensor view(const at::Tensor& directions) const override;
};

class PermuteRule final : public Rule {
 public:
    PermuteRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool aliases() const override { return true; }
    bool is_view() const override { return true; }
    at::Tensor view(const at::Tensor& directions) const override;
    Integers output_order() const override;

 private:
    Integers dims_, inverse_;
};

class ExpandRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool aliases() const override { return true; }
};

// normalise.cpp
class NormaliseRule final : public Rule {
 public:
    NormaliseRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return active(0) || active(1); }
    bool reads_value(int i) const override { return i == 1; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int i) const override { return i < 2; }
    int64_t saved() const override { return rows_ * (columns_ + 1); }

 private:
    double eps_;
    bool centred_;
    int64_t rows_, columns_;
};

// softmax.cpp
class SoftmaxRule final : public Rule {
 public:
    SoftmaxRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return true; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int) const override { return true; }
    int64_t saved() const override { return output().numel; }

 private:
    int64_t rows_, columns_;
};

class LogSumExpRule final : public Rule {
 public:
    LogSumExpRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool has_second_order() const override { return true; }
    bool reads_output_adjoint() const override { return true; }
    bool reads_tangent_in_adjoint(int) const override { return true; }
    int64_t saved() const override { return input(0).numel; }

 private:
    int64_t rows_, columns_;
};

// attention.cpp
struct AttentionWork;
struct AttentionTileAdjoint;

class AttentionRule final : public Rule {
 public:
    AttentionRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    void finish_backward(State& state) const override;
    bool has_second_order() const override { return active(0) || active(1); }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int i) const override { return has_second_order() && i < 3; }
    int64_t saved() const override;
    double flops(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;

 private:
    // In this order forward saves its inputs; and for kernels on a GPU the output, the rows' normalisers, do
    // and <do, o>.
    enum Input { kQuery, kKey, kValue, kMask };
    enum SavedOnGpu { kOutput = kMask + 1, kNormaliser, kDout, kDoutO };

    // attention_fused.cpp: one kernel for each sweep on a GPU. Does forward prepare for it; does a product of
    // this precision use it?
    bool fuses() const;
    bool fuses(const State& state, Precision precision) const;
    void fused_forward(State& state, const at::Tensor& o) const;
    at::Tensor fused_tangent(const Directions& d) const;
    void fused_adjoint(Directions& d, bool cross) const;
    template <class T>
    AttentionInputs<T> fused_inputs(const State& state) const;
    AttentionShape fused_shape() const;

    template <class Body>
    void for_each_unit(const State& state, int64_t K, int64_t buffers, const Body& body) const;
    at::Tensor probabilities(const AttentionWork& work, const AttentionTile& tile) const;
    at::Tensor logit_tangent(const AttentionWork& work, const AttentionTile& tile, const at::Tensor& tq,
                             const at::Tensor& tk) const;
    void adjoint_of_tile(const AttentionWork& work, const AttentionTile& tile,
                         const AttentionTileAdjoint& a) const;

    bool causal_;
    double scale_;
    AttentionTiling tiling_;
};

// structure.cpp
class SliceRule final : public Rule {
 public:
    SliceRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    bool aliases() const override { return true; }
    at::Tensor view(const at::Tensor& directions) const override;
    std::optional<Part> part() const override;
    Integers output_order() const override { return input(0).order; }

 private:
    int64_t dim_, start_, step_, stop_;
};

class CatRule final : public Rule {
 public:
    CatRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS

 private:
    int64_t dim_;
};

class PadRule final : public Rule {
 public:
    PadRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS

 private:
    Integers pads_, reversed_;
    double value_;
};

class RowsRule final : public Rule {
 public:
    RowsRule(const Program& program, const Op& op);
    FLATCORE_RULE_METHODS
    int64_t saved() const override { return 4 * input(1).numel; }  // indices and their order, 64 bits each

 private:
    int64_t frozen_, width_;
};

class WhereRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool reads_value(int i) const override { return i == 0; }
};

class RoundRule final : public Rule {
 public:
    using Rule::Rule;
    FLATCORE_RULE_METHODS
    bool aliases() const override { return true; }
};

}  // namespace flatcore
