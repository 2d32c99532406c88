#include "sweep.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "rule.h"
#include "tensor_ops.h"

namespace flatcore {
namespace {

// Buffers of one pass over K directions, seen by one rule at a time.
class Pass final : public Directions {
 public:
    Pass(const State& state, Mode mode, int64_t K, at::Tensor V, at::Tensor Y, bool accumulate,
         Precision precision = Precision::full)
        : state_(state), program_(state.program()), mode_(mode), K_(K), precision_(precision),
          V_(std::move(V)), Y_(std::move(Y)), tangents_(program_.values().size()),
          cotangents_(program_.values().size()), owned_(program_.values().size(), false),
          written_(program_.values().size(), accumulate) {}

    void tangent_sweep() {
        for (size_t i = 0; i < program_.ops().size(); ++i) {
            const Op& op = program_.ops()[i];
            if (!program_.needs_tangent(mode_, op.output)) continue;
            op_ = &op;
            tangents_[static_cast<size_t>(op.output)] = program_.rule(i).tangent(*this);
            for (int input : op.inputs)
                if (input >= 0 && program_.last_tangent_use(mode_, input) == op.index &&
                    !program_.keeps_tangent(mode_, input))
                    tangents_[static_cast<size_t>(input)] = at::Tensor();
        }
    }

    // `visit(op, cotangent)` is called before each op's rule runs.
    template <class Visit>
    void adjoint_sweep(const Visit& visit) {
        for (size_t i = program_.ops().size(); i-- > 0;) {
            if (!program_.in_adjoint(mode_, i)) continue;
            const Op& op = program_.ops()[i];
            const Rule& rule = program_.rule(i);
            op_ = &op;
            visit(op, rule);
            const bool cross = curved() && rule.has_second_order();
            if (cotangent().defined() || cross) rule.adjoint(*this);
            cotangents_[static_cast<size_t>(op.output)] = at::Tensor();
            for (int input : op.inputs)
                if (input >= 0 && program_.first_tangent_use(mode_, input) == op.index)
                    tangents_[static_cast<size_t>(input)] = at::Tensor();
        }
    }

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

    Accumulator accumulator(int i) override {
        const auto id = static_cast<size_t>(op_->inputs[i]);
        if (program_.values()[id].kind == ValueKind::parameter) {
            const bool fresh = !written_[id];
            written_[id] = true;
            return {slice(Y_, id), fresh};
        }
        at::Tensor& current = cotangents_[id];
        const bool fresh = !current.defined();
        if (fresh)
            current = new_directions(K_, program_.values()[id], state_.options());
        else if (!owned_[id])
            current = current.clone(at::MemoryFormat::Contiguous);
        owned_[id] = true;
        return {current, fresh};
    }

    const at::Tensor& tangent_of(int id) const { return tangents_[static_cast<size_t>(id)]; }
    at::Tensor& cotangent_of(int id) { return cotangents_[static_cast<size_t>(id)]; }

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
    const at::Tensor V_, Y_;
    const Op* op_ = nullptr;
    std::vector<at::Tensor> tangents_, cotangents_;
    std::vector<bool> owned_;    // a cotangent buffer no one else holds
    std::vector<bool> written_;  // a parameter's slice of Y that holds something
};

void no_visit(const Op&, const Rule&) {}

at::Tensor loss_seed(const State& state, double seed) {
    return at::full(
        with_directions(1, state.program().values()[static_cast<size_t>(state.program().loss())].shape), seed,
        state.options());
}

}  // namespace

void backward_sweep(State& state, double seed) {
    Pass pass(state, Mode::gradient, 1, at::Tensor(), at::Tensor(), false);
    const int loss = state.program().loss();
    state.set_adjoint(loss, at::full({}, seed, state.options()));
    pass.cotangent_of(loss) = loss_seed(state, seed);
    const Op* previous = nullptr;
    const auto release = [&] {
        if (previous) state.release_after_backward(*previous);
    };
    pass.adjoint_sweep([&](const Op& op, const Rule& rule) {
        release();
        previous = &op;
        if (pass.cotangent().defined()) state.set_adjoint(op.output, pass.cotangent().select(0, 0));
        rule.finish_backward(state);
    });
    release();
}

// tdz_n = N dz_n <dz_n, tz_n> at the cut, the inner product over all of example n's rows of all cut values.
static void seed_covariance(const State& state, Pass& pass, int64_t K, int64_t batch_examples,
                            double examples) {
    const auto rows = [&](int id) { return state.adjoint(id).reshape({1, batch_examples, -1}); };
    at::Tensor inner = at::zeros({K, batch_examples, 1}, state.options());
    for (int id : state.program().cut())
        if (state.adjoint(id).defined())
            inner += (pass.tangent_of(id).reshape({K, batch_examples, -1}) * rows(id)).sum(2, true);
    inner *= examples;
    for (int id : state.program().cut())
        if (state.adjoint(id).defined())
            pass.cotangent_of(id) =
                (inner * rows(id))
                    .reshape(with_directions(K, state.program().values()[static_cast<size_t>(id)].shape));
}

void product(const State& state, Mode mode, const at::Tensor& V, const at::Tensor& Y, bool accumulate,
             int64_t batch_examples, double examples, Precision precision) {
    Pass pass(state, mode, V.size(0), V, Y, accumulate, precision);
    pass.tangent_sweep();
    if (mode == Mode::covariance) seed_covariance(state, pass, V.size(0), batch_examples, examples);
    pass.adjoint_sweep(no_visit);
    pass.finish();
}

void gradient(const State& state, const at::Tensor& y, bool accumulate, double seed) {
    Pass pass(state, Mode::gradient, 1, at::Tensor(), y.unsqueeze(0), accumulate);
    pass.cotangent_of(state.program().loss()) = loss_seed(state, seed);
    pass.adjoint_sweep(no_visit);
    pass.finish();
}

}  // namespace flatcore
