// The tangents and adjoint-tangents of one pass over K directions, handed to one rule at a time.
#pragma once

#include <unordered_map>
#include <utility>
#include <vector>

#include "float32_products.h"
#include "rule.h"
#include "state.h"
#include "tensor_ops.h"

namespace flatcore {

// Buffers of one pass over K directions, seen by one rule at a time.
class Pass final : public Directions {
 public:
    Pass(const State& state, Mode mode, int64_t K, at::Tensor V, at::Tensor Y, bool accumulate,
         Precision precision = Precision::full)
        : state_(state), program_(state.program()), mode_(mode), K_(K), precision_(precision),
          arithmetic_(state.options().device(), precision), V_(std::move(V)), Y_(std::move(Y)),
          tangents_(program_.values().size()), cotangents_(program_.values().size()),
          owned_(program_.values().size(), false), of_parts_(program_.values().size(), false),
          placed_(program_.ops().size(), false), written_(program_.values().size(), accumulate) {}

    void tangent_sweep() {
        for (size_t i = 0; i < program_.ops().size(); ++i) {
            const Op& op = program_.ops()[i];
            if (!program_.needs_tangent(mode_, op.output)) continue;
            compute_tangent(i);
            for (int input : op.inputs)
                if (input >= 0 && program_.last_tangent_use(mode_, input) == op.index &&
                    !program_.keeps_tangent(mode_, input))
                    release_tangent(input);
        }
    }

    // `visit(op, cotangent)` is called before each op's rule runs.
    template <class Visit>
    void adjoint_sweep(const Visit& visit) {
        adjoint_sweep(visit, [this](size_t i) { return program_.in_adjoint(mode_, i); });
    }

    // Of the ops for which included(index).
    template <class Visit, class Included>
    void adjoint_sweep(const Visit& visit, const Included& included) {
        for (size_t i = program_.ops().size(); i-- > 0;) {
            if (!included(i)) continue;
            const Op& op = program_.ops()[i];
            const Rule& rule = program_.rule(i);
            enter(op);
            visit(op, rule);
            if (cotangent().defined() || has_second_order_terms(rule)) rule.adjoint(*this);
            kept_.erase(op.index);
            cotangents_[static_cast<size_t>(op.output)] = at::Tensor();
            for (int input : op.inputs)
                if (input >= 0 && program_.first_tangent_use(mode_, input) == op.index)
                    release_tangent(input);
        }
    }

    bool has_second_order_terms(const Rule& rule) const { return curved() && rule.has_second_order(); }

    // Parameters that nothing reached have a zero product.
    void finish() {
        for (size_t id = 0; id < program_.values().size(); ++id)
            if (program_.values()[id].kind == ValueKind::parameter && !written_[id]) slice(Y_, id).zero_();
    }

    int64_t K() const override { return K_; }
    const State& state() const override { return state_; }
    Precision precision() const override { return precision_; }
    bool second_order() const override {
        return program_.second_order(mode_, static_cast<size_t>(op_->index)) && adjoint_reached();
    }
    bool curved() const override {
        return program_.curved(mode_, static_cast<size_t>(op_->index)) && adjoint_reached();
    }
    bool wants(int i) const override {
        if (i >= static_cast<int>(op_->inputs.size()) || op_->inputs[i] < 0) return false;
        const Value& value = program_.values()[static_cast<size_t>(op_->inputs[i])];
        return value.active && (value.kind != ValueKind::parameter || Y_.defined());
    }
    at::Tensor tangent(int i) const override {
        const auto id = static_cast<size_t>(op_->inputs[i]);
        return program_.values()[id].kind == ValueKind::parameter ? slice(V_, id) : tangents_[id];
    }
    at::Tensor cotangent() const override { return cotangents_[static_cast<size_t>(op_->output)]; }

    void add(int i, at::Tensor contribution, bool owned) override {
        const auto id = static_cast<size_t>(op_->inputs[i]);
        if (program_.values()[id].kind == ValueKind::parameter) {
            at::Tensor target = slice(Y_, id);
            if (written_[id])
                target.add_(contribution);
            else
                target.copy_(contribution);
            written_[id] = true;
            return;
        }
        at::Tensor& current = cotangents_[id];
        if (!current.defined()) {
            current = std::move(contribution);
            owned_[id] = owned;
        } else if (owned_[id]) {
            current.add_(contribution);
        } else {
            current = current + contribution;
            owned_[id] = true;
        }
    }

    at::Tensor so_far(int i) const override { return cotangents_[static_cast<size_t>(op_->inputs[i])]; }
    void replace(int i, at::Tensor sum) override {
        const auto id = static_cast<size_t>(op_->inputs[i]);
        cotangents_[id] = std::move(sum);
        owned_[id] = true;
    }

    Accumulator accumulator(int i, bool ordered) override {
        const auto id = static_cast<size_t>(op_->inputs[i]);
        if (program_.values()[id].kind == ValueKind::parameter) {
            const bool fresh = !written_[id];
            written_[id] = true;
            return {slice(Y_, id), fresh};
        }
        at::Tensor& current = cotangents_[id];
        const bool fresh = !current.defined();
        if (fresh) {
            current = new_directions(K_, program_.values()[id], state_.options(), ordered);
            of_parts_[id] = ordered;
        } else if (!owned_[id])
            current = current.clone(at::MemoryFormat::Contiguous);
        owned_[id] = true;
        return {current, fresh};
    }

    at::Tensor place(int i) override {
        const std::vector<int>& ops = program_.part_of(op_->inputs[i]);
        if (ops.empty()) return {};
        const auto op_of = [&](int index) -> const Op& { return program_.ops()[static_cast<size_t>(index)]; };
        const auto whole = static_cast<size_t>(op_of(ops.back()).inputs[0]);
        at::Tensor& sum = cotangents_[whole];
        if (program_.values()[whole].kind == ValueKind::parameter || (sum.defined() && !of_parts_[whole]))
            return {};
        if (!sum.defined()) {
            sum = new_directions(K_, program_.values()[whole], state_.options(), true).zero_();
            owned_[whole] = of_parts_[whole] = true;
        }
        at::Tensor part = sum;
        for (size_t n = ops.size(); n-- > 0 && part.defined();)
            part = program_.rule(static_cast<size_t>(ops[n])).view(part);
        placed_[static_cast<size_t>(ops.back())] = true;
        return part;
    }
    bool placed() const override { return placed_[static_cast<size_t>(op_->index)]; }

    std::vector<at::Tensor>& kept() const override { return kept_[op_->index]; }
    ExampleProbes* probes() const override { return probes_; }
    void set_probes(ExampleProbes* probes) { probes_ = probes; }

    void set_tangent(int id, at::Tensor t) { tangents_[static_cast<size_t>(id)] = std::move(t); }
    const at::Tensor& tangent_of(int id) const { return tangents_[static_cast<size_t>(id)]; }
    at::Tensor& cotangent_of(int id) { return cotangents_[static_cast<size_t>(id)]; }

    // The op whose rule runs, or is about to.
    void enter(const Op& op) { op_ = &op; }
    void release_tangent(int id) { tangents_[static_cast<size_t>(id)] = at::Tensor(); }
    void compute_tangent(size_t i) {
        enter(program_.ops()[i]);
        tangents_[static_cast<size_t>(op_->output)] = program_.rule(i).tangent(*this);
    }

 private:
    // An output through which no derivative goes back, the mask of a `where` say, has no adjoint and so no
    // terms in it.
    bool adjoint_reached() const {
        return !program_.rule(static_cast<size_t>(op_->index)).reads_output_adjoint() ||
               state_.adjoint(op_->output).defined();
    }
    at::Tensor slice(const at::Tensor& matrix, size_t id) const {
        const Value& value = program_.values()[id];
        return matrix.narrow(1, value.offset, value.numel).view(with_directions(K_, value.shape));
    }

    const State& state_;
    const Program& program_;
    const Mode mode_;
    const int64_t K_;
    const Precision precision_;
    const Float32Products arithmetic_;
    const at::Tensor V_, Y_;
    const Op* op_ = nullptr;
    ExampleProbes* probes_ = nullptr;
    std::vector<at::Tensor> tangents_, cotangents_;
    mutable std::unordered_map<int, std::vector<at::Tensor>> kept_;  // by op
    std::vector<bool> owned_;                                        // a cotangent buffer no one else holds
    std::vector<bool> of_parts_;  // a cotangent that began as zeros, to which parts of it come
    std::vector<bool> placed_;    // by op, a slice
    std::vector<bool> written_;   // a parameter's slice of Y that holds something
};

}  // namespace flatcore
