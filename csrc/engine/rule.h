// What an op kind must say of itself. With x its inputs, y its output, d. an adjoint of the loss, t. a
// tangent:
//   forward          y = f(x)
//   tangent          ty = f'(x) tx                                            K directions at once
//   adjoint          tdx += f'(x)^T tdy                        + (f'(x)^T)' applied to (tx, dy) where
//   second_order
// The backward sweep is `adjoint` for one direction with tdy = dy and no second-derivative term.
// Every rule must be right for any subset of its inputs being active. Directions of a value of shape S are
// (K, *S).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "program.h"

namespace flatcore {

class State;
struct ExampleProbes;

// A buffer that a rule adds to: result = fresh ? written : added.
struct Accumulator {
    at::Tensor buffer;  // (K, *S); for a parameter a slice of the result, directions P apart
    bool fresh;         // nothing in it yet: write, do not read
};

// One op's view of a pass over K directions.
class Directions {
 public:
    virtual ~Directions() = default;
    virtual int64_t K() const = 0;
    virtual const State& state() const = 0;
    virtual Precision precision() const = 0;
    virtual bool second_order() const = 0;
    // Are those behind the cut asked for, where the op holds it? True with second_order too.
    virtual bool curved() const = 0;
    // Tangent of input i, of any strides (a parameter's is a slice of V, a view's stands in its base);
    // undefined where the input is not active.
    virtual at::Tensor tangent(int i) const = 0;
    // Tangent of the output's adjoint; undefined where it is zero.
    virtual at::Tensor cotangent() const = 0;
    // Is the adjoint-tangent of input i asked for?
    virtual bool wants(int i) const = 0;
    // Adds a contribution to the adjoint-tangent of input i. `owned`: no one else holds this memory.
    virtual void add(int i, at::Tensor contribution, bool owned) = 0;
    // What has come to input i, for rules that write its sum with their contribution and hand that to
    // `replace`. Undefined: nothing, or a parameter's.
    virtual at::Tensor so_far(int i) const = 0;
    virtual void replace(int i, at::Tensor sum) = 0;
    // The buffer itself, for rules that write or add in place. Once taken it counts as written. A fresh one
    // is dense; `ordered`: where the value is a permuted view, once it is seen as what it is a view of.
    virtual Accumulator accumulator(int i, bool ordered = false) = 0;
    // Where input i is a part of a value that is read by parts alone: memory in that value's sum, for a
    // contribution that is written whole before it is added. Undefined where there is none.
    virtual at::Tensor place(int i) = 0;
    // Was such a place given for this op's output, so that nothing else comes there?
    virtual bool placed() const = 0;
    // What the op's tangent leaves for its adjoint in the same pass.
    virtual std::vector<at::Tensor>& kept() const = 0;
    // Of a pass over probes of each example's own; null in any other.
    virtual ExampleProbes* probes() const { return nullptr; }
};

// Of matrix products whose operands are rounded where that is asked for: their flops, and the elements that
// rounding holds beside the workspace.
struct Rounding {
    double flops = 0;
    int64_t workspace = 0;
};

// Of an axis, from `first` up to `last`.
struct Part {
    int64_t dim, first, last;
};

class Rule {
 public:
    Rule(const Program& program, const Op& op) : program_(program), op_(op) {}
    virtual ~Rule() = default;

    virtual at::Tensor forward(State& state) const = 0;
    // Called once after the output's adjoint is final: turn what forward saved into what the products read.
    virtual void finish_backward(State&) const {}
    virtual at::Tensor tangent(const Directions& d) const = 0;
    virtual void adjoint(Directions& d) const = 0;
    // Adds <dy, f''(x)[tx, tx]> for every direction to `total` (K doubles), or returns false: then it is what
    // `adjoint` gives without a cotangent, times tx.
    virtual bool add_quadratic_form(const Directions& /*d*/, const at::Tensor& /*total*/) const {
        return false;
    }

    // What tangent and adjoint read. Values and the output's adjoint are kept for it, tangents until it has
    // run.
    virtual bool reads_value(int /*input*/) const { return false; }
    virtual bool reads_output_value() const { return false; }
    virtual bool reads_output_adjoint() const { return false; }
    virtual bool reads_tangent_in_adjoint(int /*input*/) const { return false; }
    // The output's tangent is the first input's, seen through other strides: no memory of its own.
    virtual bool aliases() const { return false; }
    // Is it the first input, element by element, in the same memory where its strides allow that? Then view()
    // gives directions of the output in those of the input, or an undefined tensor where they do not.
    virtual bool is_view() const { return false; }
    virtual at::Tensor view(const at::Tensor& /*directions*/) const { return {}; }
    // Is it this part of the first input? Then view() gives it too.
    virtual std::optional<Part> part() const { return std::nullopt; }
    // Is the output an image stored with channels last? The convolutions' layout (a third to a half faster in
    // oneDNN than N C H W where channels are few), passed on by what works element by element.
    virtual bool channels_last_output() const { return false; }
    // The order of its output (Value::order).
    virtual Integers output_order() const { return {}; }
    // Has a second derivative at all. Linear rules do not and are skipped where the cotangent is zero.
    virtual bool has_second_order() const { return false; }
    // Is that of f(a, b) alone, linear in each of its first two inputs, both active?
    virtual bool bilinear() const { return false; }
    // The cut lies within the op: it is listed as the op's output, and a GGN asks for the second-derivative
    // terms behind it only.
    virtual bool holds_cut() const { return false; }

    // Floating-point operations of tangent plus adjoint for K directions.
    virtual double flops(int64_t K, bool second_order) const;
    virtual Rounding rounding(int64_t /*K*/, bool /*second_order*/) const { return {}; }
    // Elements, not counting outputs, that tangent or adjoint hold at once; and that forward saves.
    virtual int64_t workspace(int64_t /*K*/) const { return 0; }
    // More of them where adjoint carries all second-derivative terms.
    virtual int64_t second_order_workspace() const { return 0; }
    virtual int64_t saved() const { return 0; }

 protected:
    bool has(int i) const { return i < static_cast<int>(op_.inputs.size()) && op_.inputs[i] >= 0; }
    bool active(int i) const { return has(i) && input(i).active; }
    const Value& input(int i) const { return program_.values()[op_.inputs[i]]; }
    const Value& output() const { return program_.values()[op_.output]; }

    // For ops of two broadcast inputs: an image of the output's shape is among them.
    bool either_channels_last() const {
        return (input(0).channels_last && input(0).shape == output().shape) ||
               (input(1).channels_last && input(1).shape == output().shape);
    }

    const Program& program_;
    const Op& op_;
};

// Throws std::invalid_argument naming the kind when it is unknown, and on wrong attributes or arity.
std::unique_ptr<Rule> make_rule(const Program& program, const Op& op);
// Of the vocabulary: probes are none of it.
std::vector<std::string> rule_kinds();

}  // namespace flatcore
