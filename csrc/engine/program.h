// The program as plain data, and what is known of it before it runs: which values depend on the parameters,
// which ops lie on the model's side of the cut, what each mode of product must compute and keep.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attributes.h"

namespace flatcore {

class Rule;

enum class ValueKind { parameter, constant, activation };

// What a pass through the program computes. `gradient` is the backward sweep with the parameters included,
// `remainder` the Hessian without the Gauss-Newton matrix: second derivatives of the model alone.
enum class Mode { hessian, ggn, covariance, gradient, remainder };
constexpr int kModes = 5;

// What the operands of a product's large matrix products are rounded to; everything else has the parameters'
// precision. tf32 (10 bits of mantissa, on a GPU) is the library's rounding in all of them; under bf16 it is
// that of the products which are too small to gain from bfloat16.
enum class Precision { full, tf32, bf16 };

struct Value {
    ValueKind kind;
    Integers shape;
    int64_t numel;
    int64_t offset = -1;         // of a parameter in the flat vector
    bool active = false;         // depends on a parameter
    bool channels_last = false;  // an image N C H W stored as N H W C
    Integers order = {};         // of a permuted view: axes from the one whose steps are longest; else empty
};

struct Op {
    std::string kind;
    std::vector<int> inputs;  // value ids; -1: absent
    int output;
    Attributes attributes;
    std::string path;  // module path in the user's model
    int index = -1;    // position in the program
};

class Program {
 public:
    // gpu: the tensors will be a GPU's, where other sizes of buffers pay; some of them go by the room, the
    // numbers that fit into the memory meant for the buffers of a product (0: not known).
    Program(std::vector<Value> values, std::vector<Op> ops, int64_t parameters, int loss,
            std::vector<int> cut, bool gpu = false, int64_t room = 0);
    ~Program();

    const std::vector<Value>& values() const { return values_; }
    const std::vector<Op>& ops() const { return ops_; }
    const Rule& rule(size_t op) const { return *rules_[op]; }
    int64_t parameters() const { return parameters_; }
    int loss() const { return loss_; }
    const std::vector<int>& cut() const { return cut_; }
    bool gpu() const { return gpu_; }
    int64_t room() const { return room_; }

    // In `mode`: does op's adjoint carry its second-derivative terms / at least those behind the cut that it
    // holds / run at all; is the tangent of a value computed.
    bool second_order(Mode mode, size_t op) const { return plan(mode).second_order[op]; }
    bool curved(Mode mode, size_t op) const { return plan(mode).curved[op]; }
    bool in_adjoint(Mode mode, size_t op) const { return plan(mode).in_adjoint[op]; }
    bool needs_tangent(Mode mode, int value) const { return plan(mode).needs_tangent[value]; }
    // The tangent of a value is read by some adjoint, so it outlives the tangent sweep.
    bool keeps_tangent(Mode mode, int value) const { return plan(mode).keeps_tangent[value]; }
    // Index of the last op in the tangent sweep that reads a value's tangent; -1: none.
    int last_tangent_use(Mode mode, int value) const { return plan(mode).last_tangent_use[value]; }
    // Index of the last op, in the reverse order of the adjoint sweep, that reads a value's tangent.
    int first_tangent_use(Mode mode, int value) const { return plan(mode).first_tangent_use[value]; }

    // Values and adjoints that some mode's product reads after the backward sweep; the others are freed.
    bool keeps_value(int value) const { return keeps_value_[value]; }
    bool keeps_adjoint(int value) const { return keeps_adjoint_[value]; }

    // Where a value is, through views, a part of one that is read by disjoint parts alone: the ops between
    // the two, from the value back to the slice. Else none.
    const std::vector<int>& part_of(int value) const { return part_of_[static_cast<size_t>(value)]; }

    // Is there a second derivative on the model's side at all?
    bool has_remainder() const;

    // Floating-point operations of one product with K directions.
    double flops(Mode mode, int64_t K) const;
    // Of them, those of matrix products with rounded operands, where bf16 is asked for.
    double rounded_flops(Mode mode, int64_t K) const;
    // The most bytes that buffers of one product occupy at once (V and the result not counted), and the bytes
    // of the forward and backward state kept between products.
    int64_t peak_bytes(Mode mode, int64_t K, int64_t itemsize, Precision precision = Precision::full) const;
    int64_t state_bytes(int64_t itemsize) const;

 private:
    struct Plan {
        std::vector<bool> second_order, curved, in_adjoint, needs_tangent, keeps_tangent;
        std::vector<int> last_tangent_use, first_tangent_use;
    };
    const Plan& plan(Mode mode) const { return plans_[static_cast<size_t>(mode)]; }
    void mark_active();
    void make_plan(Mode mode, const std::vector<bool>& model_side);
    void mark_kept();
    void mark_parts();

    std::vector<Value> values_;
    std::vector<Op> ops_;
    std::vector<std::unique_ptr<Rule>> rules_;
    int64_t parameters_;
    int loss_;
    std::vector<int> cut_;
    bool gpu_;
    int64_t room_;
    std::array<Plan, kModes> plans_;
    std::vector<bool> keeps_value_, keeps_adjoint_;
    std::vector<std::vector<int>> part_of_;
};

}  // namespace flatcore
