// A probe stands behind a use of a parameter: y is what the use gives with the parameter as a constant, and
// the probe adds what a direction v_n of example n's own changes there, e = use(v_n). Every use is linear in
// the parameter, so that tr H_n restricted to it is <tdy, e> on average, tdy the adjoint-tangent of y:
//   ty += e ;  sum_n += <tdy_n, e_n>
// Terms of second order in the parameter and in what it meets, x V tx, vanish on average where the parameter
// has this one use, and are left out. Where it has several (`repeated`), they are kept.
#pragma once

#include "engine/example_probes.h"
#include "rules.h"

namespace flatcore {

class ProbeRule : public Rule {
 public:
    ProbeRule(const Program& program, const Op& op);
    at::Tensor forward(State& state) const override { return state.value(op_.inputs[0]); }
    at::Tensor tangent(const Directions& d) const override;
    void adjoint(Directions& d) const override;
    bool has_second_order() const override { return repeated_ && factor() > 0 && active(factor()); }
    bool reads_value(int i) const override { return i > 0; }
    bool reads_output_adjoint() const override { return has_second_order(); }
    bool reads_tangent_in_adjoint(int i) const override { return has_second_order() && i == factor(); }
    bool channels_last_output() const override { return input(0).channels_last; }
    double flops(int64_t K, bool second_order) const override = 0;

 protected:
    // The input that the parameter meets; 0: none, the use is the parameter itself, moved.
    virtual int factor() const { return 0; }
    // e for all probes, (K, *S) in the output's layout; undefined where there is none.
    virtual at::Tensor inject(const Directions& d, const ExampleProbes& probes) const = 0;
    // The sums that come back with tdy, (K, examples) double, and the diagonal.
    virtual at::Tensor collect(const Directions& d, ExampleProbes& probes) const = 0;
    // Second-derivative terms of a repeated parameter: adds to the factor's adjoint-tangent, and returns
    // their share of the sums.
    virtual at::Tensor cross_terms(Directions& d, const ExampleProbes& probes) const;

    // What several uses add to an entry in one example is one sample: its spread is not seen use by use.
    bool wants_diagonal(const ExampleProbes& probes) const { return probes.diagonal.defined() && !repeated_; }
    ExampleBlock block(const ExampleProbes& probes, int64_t first, int64_t count) const;
    // tdy as (K, examples, positions of an example, channels), contiguous.
    at::Tensor positions_first(const at::Tensor& directions) const;
    int64_t channels() const {
        return output().shape[output().channels_last ? 1 : output().shape.size() - 1];
    }

    int64_t parameter_, offset_, examples_;
    bool repeated_;
};

// (K, N) double from (K, N, m).
at::Tensor dots(const at::Tensor& a, const at::Tensor& b);

// A bias, a norm's gain, an embedding of positions: y = ... + scale p[index] m, `index` the same for all
// examples, m absent or a value of y's size.
class BroadcastProbeRule final : public ProbeRule {
 public:
    BroadcastProbeRule(const Program& program, const Op& op);
    double flops(int64_t K, bool second_order) const override;

 private:
    int factor() const override { return has(2) ? 2 : 0; }
    at::Tensor inject(const Directions& d, const ExampleProbes& probes) const override;
    at::Tensor collect(const Directions& d, ExampleProbes& probes) const override;
    at::Tensor cross_terms(Directions& d, const ExampleProbes& probes) const override;
    at::Tensor signs(const Directions& d, const ExampleProbes& probes) const;  // (K, N, count)
    at::Tensor spread(const at::Tensor& signs) const;                          // to (K, *S)
    at::Tensor gather(const at::Tensor& directions) const;                     // its transpose
    double scale_;
    int64_t rows_, count_, size_;  // axis 0 of an example; elements of the index; of the parameter
    bool distinct_;                // no element twice in the index
    Integers shape_;               // of the index, aligned with y's axes behind the first
};

// Rows of an embedding: y = p[index], one index for each position.
class RowsProbeRule final : public ProbeRule {
 public:
    RowsProbeRule(const Program& program, const Op& op);
    double flops(int64_t K, bool second_order) const override;

 private:
    at::Tensor inject(const Directions& d, const ExampleProbes& probes) const override;
    at::Tensor collect(const Directions& d, ExampleProbes& probes) const override;
    int64_t frozen_, positions_, width_;
};

// Weights that meet features of their input: `linear` and `conv2d` (patches), groups among them. At each of
// an example's T positions, y = W x.
class FeatureProbeRule : public ProbeRule {
 public:
    using ProbeRule::ProbeRule;
    double flops(int64_t K, bool second_order) const override;
    int64_t workspace(int64_t K) const override;

 protected:
    int factor() const override { return 1; }
    // x of examples [first, first + count): (count, groups, T, in).
    virtual at::Tensor features(const State& state, int64_t first, int64_t count) const = 0;
    // From the parameter's own layout to (groups, out, in), a view.
    virtual at::Tensor as_matrices(const at::Tensor& flat) const = 0;
    // Does the parameter hold the matrix as (in, out)?
    virtual bool transposed() const { return false; }

    at::Tensor inject(const Directions& d, const ExampleProbes& probes) const override;
    at::Tensor collect(const Directions& d, ExampleProbes& probes) const override;
    at::Tensor cross_terms(Directions& d, const ExampleProbes& probes) const override;

    int64_t positions_ = 0, groups_ = 1, in_ = 0, out_ = 0;

 private:
    at::Tensor relative_factor(const State& state) const;
    int64_t signs_a_row(const ExampleProbes& probes) const;
    bool by_length(const ExampleProbes& probes) const;
    bool by_gram(const ExampleProbes& probes) const;
    void inject_by_length(const State& state, const ExampleProbes& probes, const at::Tensor& e) const;
    void inject_by_gram(const State& state, const ExampleProbes& probes, const at::Tensor& e) const;
    void inject_explicitly(const State& state, const ExampleProbes& probes, const at::Tensor& e) const;
    at::Tensor squares(const State& state, ExampleProbes& probes, const at::Tensor& tdy) const;
    void add_diagonal(const State& state, ExampleProbes& probes, const at::Tensor& tdy,
                      const at::Tensor& e) const;
    template <class Body>
    void each_example(const Body& body) const;
    template <class Draw>
    void for_each_drawn(const ExampleBlock& one, const ExampleProbes& probes, int64_t group,
                        const at::TensorOptions& options, const Draw& draw) const;
    int64_t chunk(int64_t elements_of_one) const;
};

class LinearProbeRule final : public FeatureProbeRule {
 public:
    LinearProbeRule(const Program& program, const Op& op);

 private:
    at::Tensor features(const State& state, int64_t first, int64_t count) const override;
    at::Tensor as_matrices(const at::Tensor& flat) const override;
    bool transposed() const override { return transposed_; }
    bool transposed_;
};

class ConvolutionProbeRule final : public FeatureProbeRule {
 public:
    ConvolutionProbeRule(const Program& program, const Op& op);

 private:
    at::Tensor features(const State& state, int64_t first, int64_t count) const override;
    at::Tensor as_matrices(const at::Tensor& flat) const override;
    Integers kernel_, stride_, padding_, dilation_;
};

}  // namespace flatcore
