// The second derivative of a composition along one direction is a sum over its ops, of the second derivative
// of each along the tangents of its inputs, weighed by the adjoint of its output:
//   v^T H v = sum over ops f of  <dy, f''(x)[tx, tx]>
// The adjoints are in the state, the tangents come by the tangent sweep, and nothing is swept backward: no
// adjoint-tangents, nothing of the parameters' size. A linear layer takes three products instead of six. A
// GGN adds up the ops behind the cut only. The terms of one op are what its `adjoint` gives for no cotangent,
// times the tangents.
#include "quadratic_form.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "covariance.h"
#include "kernels/direction_dots.h"
#include "pass.h"
#include "workspace.h"

namespace flatcore {

namespace {

bool contiguous_each(const at::Tensor& t) { return t.numel() > 0 && t.select(0, 0).is_contiguous(); }

// One op seen alone: nothing comes back to it, and what it gives is kept aside.
class OneOp final : public Directions {
 public:
    OneOp(const Pass& pass, const Program& program, const Op& op, bool bilinear)
        : pass_(pass), program_(program), op_(op), bilinear_(bilinear) {}

    int64_t K() const override { return pass_.K(); }
    const State& state() const override { return pass_.state(); }
    Precision precision() const override { return pass_.precision(); }
    bool second_order() const override { return pass_.second_order(); }
    bool curved() const override { return pass_.curved(); }
    at::Tensor tangent(int i) const override { return pass_.tangent(i); }
    at::Tensor cotangent() const override { return {}; }
    std::vector<at::Tensor>& kept() const override { return pass_.kept(); }
    // Of f bilinear in two inputs, <dy, f''[t, t]> is twice what either input gets.
    bool wants(int i) const override { return pass_.wants(i) && !(bilinear_ && i != 0); }
    void add(int i, at::Tensor contribution, bool owned) override {
        terms_.push_back({i, std::move(contribution), owned});
    }
    at::Tensor so_far(int) const override { return {}; }
    void replace(int i, at::Tensor sum) override { add(i, std::move(sum), true); }
    Accumulator accumulator(int i, bool ordered) override {
        const Value& value = program_.values()[static_cast<size_t>(op_.inputs[static_cast<size_t>(i)])];
        terms_.push_back({i, new_directions(K(), value, state().options(), ordered), true});
        return {terms_.back().value, true};
    }

    at::Tensor place(int) override { return {}; }
    bool placed() const override { return false; }

    // (K) doubles
    at::Tensor sum() {
        at::Tensor total = at::zeros({K()}, state().options().dtype(at::kDouble));
        at::Tensor workspace;
        for (auto& [i, value, owned] : terms_) {
            const at::Tensor t = tangent(i);
            if (contiguous_each(value) && contiguous_each(t)) {
                if (!workspace.defined()) workspace = at::empty({K(), kDotPieces}, total.options());
                FLATCORE_DISPATCH(value, "quadratic_form", [&] {
                    FLATCORE_RUN(value, direction_dots<scalar_t>, K(), value.numel() / K(),
                                 value.const_data_ptr<scalar_t>(), value.stride(0),
                                 t.const_data_ptr<scalar_t>(), t.stride(0),
                                 workspace.mutable_data_ptr<double>(), total.mutable_data_ptr<double>());
                });
                continue;
            }
            at::Tensor product = owned ? value.mul_(t) : value * t;
            total += product.reshape({K(), -1}).sum(1, /*keepdim=*/false, at::kDouble);
        }
        return bilinear_ ? total * 2 : total;
    }

 private:
    struct Term {
        int input;
        at::Tensor value;
        bool owned;
    };
    const Pass& pass_;
    const Program& program_;
    const Op& op_;
    const bool bilinear_;
    std::vector<Term> terms_;
};

}  // namespace

void quadratic_form(const State& state, Mode mode, const at::Tensor& V, const at::Tensor& q,
                    int64_t batch_examples, double examples, Precision precision) {
    const Workspace workspace;
    const Program& program = state.program();
    Pass pass(state, mode, V.size(0), V, V, false, precision);  // results are asked for, and stay in OneOp
    const auto curved = [&](size_t i) {
        pass.enter(program.ops()[i]);
        return pass.has_second_order_terms(program.rule(i));
    };
    std::vector<size_t> last_use(program.values().size(), 0);
    for (size_t i = 0; i < program.ops().size(); ++i)
        if (program.needs_tangent(mode, program.ops()[i].output) || curved(i))
            for (int input : program.ops()[i].inputs)
                if (input >= 0) last_use[static_cast<size_t>(input)] = i;
    at::Tensor total = at::zeros({V.size(0)}, state.options().dtype(at::kDouble));
    for (size_t i = 0; i < program.ops().size(); ++i) {
        const Op& op = program.ops()[i];
        if (program.needs_tangent(mode, op.output)) pass.compute_tangent(i);
        if (curved(i)) {
            OneOp alone(pass, program, op, program.rule(i).bilinear());
            if (!program.rule(i).add_quadratic_form(alone, total)) {
                program.rule(i).adjoint(alone);
                total += alone.sum();
            }
        }
        const bool cut = mode == Mode::covariance;
        for (int input : op.inputs)
            if (input >= 0 && last_use[static_cast<size_t>(input)] == i &&
                !(cut && program.keeps_tangent(mode, input)))
                pass.release_tangent(input);
    }
    if (mode == Mode::covariance)
        total += cut_inner_products(state, pass, batch_examples).square().sum({1, 2}) * examples;
    at::Tensor sums = q;
    sums += total.cpu();
}

}  // namespace flatcore
