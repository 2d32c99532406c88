#include "rule.h"

#include <functional>
#include <stdexcept>
#include <unordered_map>

#include "rules/external.h"
#include "rules/losses.h"
#include "rules/probe.h"
#include "rules/rules.h"

namespace flatcore {

double Rule::flops(int64_t K, bool second_order) const {
    // A multiply per element in each sweep, and a multiply-add more for the second-derivative term.
    return static_cast<double>(K * output().numel) * (second_order && has_second_order() ? 4 : 2);
}

namespace {

using Make = std::function<std::unique_ptr<Rule>(const Program&, const Op&)>;

struct Kind {
    Make make;
    size_t least, most;  // number of inputs, absent ones included
};

template <class R>
Kind kind(size_t least, size_t most) {
    return {[](const Program& program, const Op& op) { return std::make_unique<R>(program, op); }, least,
            most};
}

const std::unordered_map<std::string, Kind>& kinds() {
    static const std::unordered_map<std::string, Kind> table{
        {"linear", kind<LinearRule>(2, 3)},
        {"matmul", kind<MatmulRule>(2, 2)},
        {"conv2d", kind<ConvolutionRule>(2, 3)},
        {"batch_norm", kind<BatchNormRule>(5, 5)},
        {"unary", kind<UnaryRule>(1, 1)},
        {"add", kind<AddRule>(2, 2)},
        {"mul", kind<MulRule>(2, 2)},
        {"affine", kind<AffineRule>(1, 1)},
        {"sum", kind<SumRule>(1, 1)},
        {"max_pool2d", kind<MaxPoolRule>(1, 1)},
        {"avg_pool2d", kind<AveragePoolRule>(1, 1)},
        {"adaptive_avg_pool2d", kind<AdaptiveAveragePoolRule>(1, 1)},
        {"view", kind<ViewRule>(1, 1)},
        {"permute", kind<PermuteRule>(1, 1)},
        {"expand", kind<ExpandRule>(1, 1)},
        {"cross_entropy", kind<CrossEntropyRule>(3, 3)},
        {"linear_cross_entropy", kind<LinearCrossEntropyRule>(5, 5)},
        {"normalise", kind<NormaliseRule>(3, 3)},
        {"softmax", kind<SoftmaxRule>(1, 1)},
        {"logsumexp", kind<LogSumExpRule>(1, 1)},
        {"attention", kind<AttentionRule>(4, 4)},
        {"slice", kind<SliceRule>(1, 1)},
        {"cat", kind<CatRule>(1, 1 << 20)},
        {"pad", kind<PadRule>(1, 1)},
        {"rows", kind<RowsRule>(2, 2)},
        {"where", kind<WhereRule>(3, 3)},
        {"round", kind<RoundRule>(1, 1)},
        {"external", kind<ExternalRule>(1, 1 << 20)},
        {"probe_broadcast", kind<BroadcastProbeRule>(2, 3)},
        {"probe_rows", kind<RowsProbeRule>(2, 2)},
        {"probe_linear", kind<LinearProbeRule>(3, 3)},
        {"probe_conv2d", kind<ConvolutionProbeRule>(3, 3)},
    };
    return table;
}

}  // namespace

std::unique_ptr<Rule> make_rule(const Program& program, const Op& op) {
    const auto entry = kinds().find(op.kind);
    if (entry == kinds().end()) throw std::invalid_argument("unknown op kind");
    const auto& [make, least, most] = entry->second;
    if (op.inputs.size() < least || op.inputs.size() > most)
        throw std::invalid_argument("takes " + std::to_string(least) + " to " + std::to_string(most) +
                                    " inputs, got " + std::to_string(op.inputs.size()));
    return make(program, op);
}

std::vector<std::string> rule_kinds() {
    std::vector<std::string> names;
    for (const auto& [name, entry] : kinds())
        if (!name.starts_with("probe_")) names.push_back(name);
    return names;
}

}  // namespace flatcore
