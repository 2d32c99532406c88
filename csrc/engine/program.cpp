#include "program.h"

#include <algorithm>
#include <stdexcept>

#include "rule.h"

namespace flatcore {

Program::~Program() = default;

Program::Program(std::vector<Value> values, std::vector<Op> ops, int64_t parameters, int loss,
                 std::vector<int> cut, bool gpu, int64_t room)
    : values_(std::move(values)), ops_(std::move(ops)), parameters_(parameters), loss_(loss),
      cut_(std::move(cut)), gpu_(gpu), room_(room) {
    mark_active();
    for (size_t i = 0; i < ops_.size(); ++i) {
        ops_[i].index = static_cast<int>(i);
        try {
            rules_.push_back(make_rule(*this, ops_[i]));
            Value& output = values_[static_cast<size_t>(ops_[i].output)];
            output.channels_last = rules_.back()->channels_last_output();
            output.order = rules_.back()->output_order();
        } catch (const std::exception& error) {
            throw std::invalid_argument("op " + std::to_string(i) + " (" + ops_[i].kind + ", " +
                                        ops_[i].path + "): " + error.what());
        }
    }
    // The model's side: ops from which the cut can be reached.
    std::vector<bool> model_side(ops_.size(), false), reaches_cut(values_.size(), false);
    for (int id : cut_) reaches_cut[static_cast<size_t>(id)] = true;
    for (size_t i = ops_.size(); i-- > 0;) {
        if (!reaches_cut[static_cast<size_t>(ops_[i].output)]) continue;
        model_side[i] = true;
        for (int input : ops_[i].inputs)
            if (input >= 0) reaches_cut[static_cast<size_t>(input)] = true;
    }
    for (Mode mode : {Mode::hessian, Mode::ggn, Mode::covariance, Mode::gradient, Mode::remainder})
        make_plan(mode, model_side);
    mark_kept();
    mark_parts();
}

void Program::mark_active() {
    const auto check = [&](int id) {
        if (id < -1 || id >= static_cast<int>(values_.size()))
            throw std::invalid_argument("value " + std::to_string(id) + " does not exist");
    };
    std::vector<bool> defined(values_.size(), false);
    for (size_t id = 0; id < values_.size(); ++id) {
        Value& value = values_[id];
        value.numel = 1;
        for (int64_t size : value.shape) value.numel *= size;
        value.active = value.kind == ValueKind::parameter;
        defined[id] = value.kind != ValueKind::activation;
        if (value.active && (value.offset < 0 || value.offset + value.numel > parameters_))
            throw std::invalid_argument("parameter value " + std::to_string(id) +
                                        " lies outside the flat vector");
    }
    for (const Op& op : ops_) {
        for (int input : op.inputs) {
            check(input);
            if (input < 0) continue;
            if (!defined[static_cast<size_t>(input)])
                throw std::invalid_argument("value " + std::to_string(input) +
                                            " is read before it is computed");
            if (values_[static_cast<size_t>(input)].active)
                values_[static_cast<size_t>(op.output)].active = true;
        }
        // A probe stands for a parameter that is no value of the program's (example_probes.h).
        if (op.kind.starts_with("probe_")) values_[static_cast<size_t>(op.output)].active = true;
        if (defined[static_cast<size_t>(op.output)])
            throw std::invalid_argument("value " + std::to_string(op.output) + " is computed twice");
        defined[static_cast<size_t>(op.output)] = true;
    }
    check(loss_);
    if (loss_ < 0 || values_[static_cast<size_t>(loss_)].numel != 1)
        throw std::invalid_argument("the loss must be one number");
    for (int id : cut_) {
        check(id);
        if (id < 0 || values_[static_cast<size_t>(id)].kind != ValueKind::activation)
            throw std::invalid_argument("the cut must consist of activations");
    }
}

void Program::make_plan(Mode mode, const std::vector<bool>& model_side) {
    Plan& p = plans_[static_cast<size_t>(mode)];
    const size_t n = ops_.size(), m = values_.size();
    p.second_order.assign(n, false);
    p.curved.assign(n, false);
    p.in_adjoint.assign(n, true);
    p.needs_tangent.assign(m, false);
    p.keeps_tangent.assign(m, false);
    p.last_tangent_use.assign(m, -1);
    p.first_tangent_use.assign(m, -1);
    for (size_t i = n; i-- > 0;) {
        p.second_order[i] = mode == Mode::hessian || (mode == Mode::ggn && !model_side[i]) ||
                            (mode == Mode::remainder && model_side[i]);
        p.curved[i] = p.second_order[i] || (mode == Mode::ggn && rules_[i]->holds_cut());
        p.in_adjoint[i] = (mode != Mode::covariance && mode != Mode::remainder) || model_side[i];
        if (!p.curved[i]) continue;
        for (size_t j = 0; j < ops_[i].inputs.size(); ++j) {
            const int id = ops_[i].inputs[j];
            if (id < 0 || !values_[static_cast<size_t>(id)].active) continue;
            if (!rules_[i]->reads_tangent_in_adjoint(static_cast<int>(j))) continue;
            p.needs_tangent[static_cast<size_t>(id)] = p.keeps_tangent[static_cast<size_t>(id)] = true;
            p.first_tangent_use[static_cast<size_t>(id)] = static_cast<int>(i);
        }
    }
    if (mode == Mode::covariance)
        for (int id : cut_)
            p.needs_tangent[static_cast<size_t>(id)] = p.keeps_tangent[static_cast<size_t>(id)] = true;
    for (size_t i = n; i-- > 0;) {
        if (!p.needs_tangent[static_cast<size_t>(ops_[i].output)]) continue;
        for (int id : ops_[i].inputs) {
            if (id < 0 || !values_[static_cast<size_t>(id)].active) continue;
            p.needs_tangent[static_cast<size_t>(id)] = true;
            int& last = p.last_tangent_use[static_cast<size_t>(id)];
            last = std::max(last, static_cast<int>(i));
        }
    }
}

void Program::mark_kept() {
    keeps_value_.assign(values_.size(), false);
    keeps_adjoint_.assign(values_.size(), false);
    for (size_t i = 0; i < ops_.size(); ++i) {
        const auto output = static_cast<size_t>(ops_[i].output);
        for (size_t j = 0; j < ops_[i].inputs.size(); ++j)
            if (ops_[i].inputs[j] >= 0 && rules_[i]->reads_value(static_cast<int>(j)))
                keeps_value_[static_cast<size_t>(ops_[i].inputs[j])] = true;
        if (rules_[i]->reads_output_adjoint()) keeps_adjoint_[output] = true;
    }
    for (int id : cut_) keeps_adjoint_[static_cast<size_t>(id)] = true;
}

void Program::mark_parts() {
    part_of_.assign(values_.size(), {});
    std::vector<std::vector<size_t>> readers(values_.size());
    std::vector<int> made_by(values_.size(), -1);
    for (size_t i = 0; i < ops_.size(); ++i) {
        made_by[static_cast<size_t>(ops_[i].output)] = static_cast<int>(i);
        for (int id : ops_[i].inputs)
            if (id >= 0) readers[static_cast<size_t>(id)].push_back(i);
    }
    const auto read_by_disjoint_parts = [&](int value) {
        std::vector<Part> parts;
        for (size_t i : readers[static_cast<size_t>(value)]) {
            const std::optional<Part> part = rules_[i]->part();
            if (!part || (!parts.empty() && part->dim != parts.front().dim)) return false;
            parts.push_back(*part);
        }
        std::ranges::sort(parts, {}, &Part::first);
        for (size_t i = 1; i < parts.size(); ++i)
            if (parts[i].first < parts[i - 1].last) return false;
        return true;
    };
    std::vector<std::optional<bool>> known(values_.size());
    const auto by_disjoint_parts = [&](int value) {
        std::optional<bool>& answer = known[static_cast<size_t>(value)];
        if (!answer) answer = read_by_disjoint_parts(value);
        return *answer;
    };
    const auto read_once = [&](int value) {
        return value != loss_ && readers[static_cast<size_t>(value)].size() == 1 &&
               std::ranges::find(cut_, value) == cut_.end();
    };
    for (size_t id = 0; id < values_.size(); ++id) {
        std::vector<int> ops;
        int value = static_cast<int>(id);
        while (read_once(value)) {
            const int maker = made_by[static_cast<size_t>(value)];
            if (maker < 0) break;
            ops.push_back(maker);
            value = ops_[static_cast<size_t>(maker)].inputs.empty()
                        ? -1
                        : ops_[static_cast<size_t>(maker)].inputs[0];
            const Rule& rule = *rules_[static_cast<size_t>(maker)];
            if (rule.part()) {
                if (by_disjoint_parts(value)) part_of_[id] = ops;
                break;
            }
            if (!rule.is_view()) break;
        }
    }
}

bool Program::has_remainder() const {
    for (size_t i = 0; i < ops_.size(); ++i)
        if (second_order(Mode::remainder, i) && rules_[i]->has_second_order()) return true;
    return false;
}

double Program::flops(Mode mode, int64_t K) const {
    double total = 0;
    for (size_t i = 0; i < ops_.size(); ++i) total += rules_[i]->flops(K, second_order(mode, i));
    return total;
}

double Program::rounded_flops(Mode mode, int64_t K) const {
    double total = 0;
    for (size_t i = 0; i < ops_.size(); ++i) total += rules_[i]->rounding(K, second_order(mode, i)).flops;
    return total;
}

int64_t Program::state_bytes(int64_t itemsize) const {
    int64_t elements = 0;
    for (size_t i = 0; i < ops_.size(); ++i) {
        const auto output = static_cast<size_t>(ops_[i].output);
        const int64_t held =
            (keeps_value_[output] && !rules_[i]->aliases()) + (keeps_adjoint_[output] ? 1 : 0);
        elements += held * values_[output].numel + rules_[i]->saved();
    }
    return elements * itemsize;
}

namespace {

// Buffers counted by the storage they stand in: an alias keeps its base alive and costs nothing itself.
class Ledger {
 public:
    explicit Ledger(size_t values) : base_(values, -1), references_(values, 0), size_(values, 0) {}

    void allocate(size_t id, int64_t size) {
        base_[id] = static_cast<int>(id);
        references_[id] = 1;
        size_[id] = size;
        live_ += size;
        peak_ = std::max(peak_, live_);
    }
    void alias(size_t id, size_t of) {
        base_[id] = base_[of];
        if (base_[of] >= 0) ++references_[static_cast<size_t>(base_[of])];
    }
    bool holds(size_t id) const { return base_[id] >= 0; }
    void free(size_t id) {
        if (base_[id] < 0) return;
        const auto base = static_cast<size_t>(base_[id]);
        base_[id] = -1;
        if (--references_[base] == 0) live_ -= size_[base];
    }
    void touch(int64_t workspace) { peak_ = std::max(peak_, live_ + workspace); }
    int64_t live() const { return live_; }
    int64_t peak() const { return peak_; }

 private:
    std::vector<int> base_;
    std::vector<int> references_;
    std::vector<int64_t> size_;
    int64_t live_ = 0, peak_ = 0;
};

}  // namespace

int64_t Program::peak_bytes(Mode mode, int64_t K, int64_t itemsize, Precision precision) const {
    const size_t m = values_.size();
    const auto workspace = [&](size_t i) {
        const bool rounds = precision == Precision::bf16;
        return rules_[i]->workspace(K) +
               (rounds ? rules_[i]->rounding(K, second_order(mode, i)).workspace : 0);
    };
    // One ledger: tangents are its first m entries, cotangents the next m.
    Ledger ledger(2 * m);
    const auto elements = [&](size_t id) { return K * values_[id].numel; };
    const auto is_buffer = [&](int id) {
        return id >= 0 && values_[static_cast<size_t>(id)].active &&
               values_[static_cast<size_t>(id)].kind == ValueKind::activation;
    };
    for (size_t i = 0; i < ops_.size(); ++i) {
        const auto output = static_cast<size_t>(ops_[i].output);
        if (!needs_tangent(mode, ops_[i].output)) continue;
        if (rules_[i]->aliases() && is_buffer(ops_[i].inputs[0]))
            ledger.alias(output, static_cast<size_t>(ops_[i].inputs[0]));
        else if (!rules_[i]->aliases())
            ledger.allocate(output, elements(output));
        ledger.touch(workspace(i));
        for (int id : ops_[i].inputs)
            if (is_buffer(id) && last_tangent_use(mode, id) == static_cast<int>(i) &&
                !keeps_tangent(mode, id))
                ledger.free(static_cast<size_t>(id));
    }
    for (size_t i = ops_.size(); i-- > 0;) {
        if (!in_adjoint(mode, i)) continue;
        const auto output = static_cast<size_t>(ops_[i].output);
        for (int id : ops_[i].inputs) {
            if (!is_buffer(id) || ledger.holds(m + static_cast<size_t>(id))) continue;
            // What comes back to a part, or to what is expanded, is summed elsewhere.
            const bool same = elements(static_cast<size_t>(id)) == elements(output);
            if (rules_[i]->aliases() && same && ledger.holds(m + output))
                ledger.alias(m + static_cast<size_t>(id), m + output);
            else
                ledger.allocate(m + static_cast<size_t>(id), elements(static_cast<size_t>(id)));
        }
        ledger.touch(workspace(i) + (second_order(mode, i) ? rules_[i]->second_order_workspace() : 0));
        ledger.free(m + output);
        for (int id : ops_[i].inputs)
            if (is_buffer(id) && first_tangent_use(mode, id) == static_cast<int>(i))
                ledger.free(static_cast<size_t>(id));
    }
    return ledger.peak() * itemsize;
}

}  // namespace flatcore
