#include "state.h"

#include <stdexcept>
#include <string>
#include <unordered_set>

#include "float32_products.h"
#include "rule.h"
#include "sweep.h"

namespace flatcore {

State::State(const Program& program, const std::unordered_map<int, at::Tensor>& leaves, double seed)
    : program_(program), values_(program.values().size()), adjoints_(program.values().size()),
      saved_(program.ops().size()) {
    // Parameters come first among the values, whether they are the program's own or constants of it.
    int first = static_cast<int>(values_.size());
    for (const auto& [id, tensor] : leaves) {
        values_[static_cast<size_t>(id)] = tensor;
        if (id < first && tensor.is_floating_point()) {
            first = id;
            options_ = tensor.options();
        }
    }
    const Float32Products arithmetic(options_.device(), Precision::full);
    for (size_t i = 0; i < program.ops().size(); ++i) {
        const Op& op = program.ops()[i];
        values_[static_cast<size_t>(op.output)] = program.rule(i).forward(*this);
    }
    loss_ = value(program.loss()).item<double>();
    backward_sweep(*this, seed);
    for (const Op& op : program.ops())
        if (!program.keeps_value(op.output)) values_[static_cast<size_t>(op.output)] = at::Tensor();
}

const at::Tensor& State::value(int id) const {
    const at::Tensor& found = values_[static_cast<size_t>(id)];
    if (!found.defined())
        throw std::logic_error("value " + std::to_string(id) + " of the program is read after it was freed");
    return found;
}

void State::release_after_backward(const Op& op) {
    if (!program_.keeps_adjoint(op.output)) adjoints_[static_cast<size_t>(op.output)] = at::Tensor();
}

int64_t State::bytes() const {
    std::unordered_set<const void*> seen;
    int64_t total = 0;
    const auto count = [&](const at::Tensor& t) {
        if (t.defined() && seen.insert(t.storage().unsafeGetStorageImpl()).second)
            total += t.storage().nbytes();
    };
    for (size_t id = 0; id < values_.size(); ++id)
        if (program_.values()[id].kind == ValueKind::activation) {
            count(values_[id]);
            count(adjoints_[id]);
        }
    for (const auto& tensors : saved_)
        for (const at::Tensor& t : tensors) count(t);
    return total;
}

}  // namespace flatcore
