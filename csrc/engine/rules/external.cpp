// y = f(x) with derivatives that the engine does not know: it hands over the inputs and takes what comes
// back.
#include "external.h"

#include "engine/state.h"

namespace flatcore {

ExternalRule::ExternalRule(const Program& program, const Op& op)
    : Rule(program, op), function_(op.attributes.function("function")) {}

std::vector<at::Tensor> ExternalRule::inputs(const State& state) const {
    std::vector<at::Tensor> x;
    for (int id : op_.inputs) x.push_back(state.value(id));
    return x;
}

std::vector<at::Tensor> ExternalRule::tangents(const Directions& d) const {
    std::vector<at::Tensor> tx;
    for (int i = 0; i < static_cast<int>(op_.inputs.size()); ++i) tx.push_back(d.tangent(i));
    return tx;
}

at::Tensor ExternalRule::forward(State& state) const { return function_->forward(inputs(state)); }

at::Tensor ExternalRule::tangent(const Directions& d) const {
    return function_->tangent(inputs(d.state()), tangents(d));
}

void ExternalRule::adjoint(Directions& d) const {
    const at::Tensor dy = d.second_order() ? d.state().adjoint(op_.output) : at::Tensor();
    const std::vector<at::Tensor> tx =
        dy.defined() ? tangents(d) : std::vector<at::Tensor>(op_.inputs.size());
    std::vector<bool> wants;
    for (int i = 0; i < static_cast<int>(op_.inputs.size()); ++i) wants.push_back(d.wants(i));
    const std::vector<at::Tensor> results =
        function_->adjoint(inputs(d.state()), tx, dy, d.cotangent(), wants);
    for (int i = 0; i < static_cast<int>(results.size()); ++i)
        if (results[static_cast<size_t>(i)].defined()) d.add(i, results[static_cast<size_t>(i)], true);
}

double ExternalRule::flops(int64_t K, bool) const { return static_cast<double>(K) * function_->flops(); }

int64_t ExternalRule::workspace(int64_t K) const {
    int64_t results = 0;  // before they are added to what is there already
    for (int i = 0; i < static_cast<int>(op_.inputs.size()); ++i)
        if (active(i)) results += K * input(i).numel;
    return results + function_->workspace();
}

}  // namespace flatcore
