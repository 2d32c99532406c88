#include "example_probes.h"

#include "pass.h"
#include "rule.h"
#include "workspace.h"

namespace flatcore {

namespace {

void no_visit(const Op&, const Rule&) {}

int only_cut(const Program& program) {
    if (program.cut().size() != 1) throw std::invalid_argument("cut: expected one value");
    return program.cut()[0];
}

}  // namespace

void example_pass(const State& state, Mode mode, ExampleProbes& probes) {
    const Workspace workspace;
    Pass pass(state, mode, probes.block.probes, at::Tensor(), at::Tensor(), false);
    pass.set_probes(&probes);
    pass.tangent_sweep();
    pass.adjoint_sweep(no_visit);
    probes.injected.clear();  // within the workspace
}

at::Tensor cut_curvature(const State& state, const at::Tensor& directions) {
    const Program& program = state.program();
    const int cut = only_cut(program);
    Pass pass(state, Mode::ggn, directions.size(0), at::Tensor(), at::Tensor(), false);
    const auto behind = [&](size_t i) { return program.second_order(Mode::ggn, i); };
    pass.set_tangent(cut, directions);
    for (size_t i = 0; i < program.ops().size(); ++i)
        if (behind(i) && program.needs_tangent(Mode::ggn, program.ops()[i].output)) pass.compute_tangent(i);
    pass.adjoint_sweep(no_visit, behind);
    at::Tensor result = pass.cotangent_of(cut);
    return result.defined() ? result.contiguous() : at::zeros_like(directions);
}

void output_pass(const State& state, ExampleProbes& probes, int value, const at::Tensor& cotangents) {
    const Workspace workspace;
    Pass pass(state, Mode::gradient, cotangents.size(0), at::Tensor(), at::Tensor(), false);
    pass.set_probes(&probes);
    pass.cotangent_of(value) = cotangents;
    pass.adjoint_sweep(no_visit);
}

}  // namespace flatcore
