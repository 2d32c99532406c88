// Ops that move elements: slices, concatenation, padding, rows picked by an index. All linear, with no
// arithmetic but the sums where an element is read more than once.
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/zeros.h>

#include "kernels/embedding.h"
#include "rules.h"

namespace flatcore {

namespace {

int64_t axis_of(const Op& op, const Value& x) {
    const auto rank = static_cast<int64_t>(x.shape.size());
    int64_t dim = op.attributes.integer("dim");
    if (dim < -rank || dim >= rank)
        throw std::invalid_argument("dim: axis " + std::to_string(dim) + " does not exist");
    return dim < 0 ? dim + rank : dim;
}

}  // namespace

SliceRule::SliceRule(const Program& program, const Op& op)
    : Rule(program, op), dim_(axis_of(op, input(0))), start_(op.attributes.integer("start")),
      step_(op.attributes.integer("step")) {
    const int64_t length = output().shape[static_cast<size_t>(dim_)];
    const int64_t last = start_ + (length - 1) * step_;
    if (start_ < 0 || step_ < 1 || (length > 0 && last >= input(0).shape[static_cast<size_t>(dim_)]))
        throw std::invalid_argument("start, step and the output's length must stay within the axis");
    stop_ = length > 0 ? last + 1 : start_;
}

at::Tensor SliceRule::forward(State& state) const {
    return state.value(op_.inputs[0]).slice(dim_, start_, stop_, step_);
}

at::Tensor SliceRule::view(const at::Tensor& directions) const {
    return directions.slice(dim_ + 1, start_, stop_, step_);
}

at::Tensor SliceRule::tangent(const Directions& d) const { return view(d.tangent(0)); }

std::optional<Part> SliceRule::part() const {
    return step_ == 1 ? std::optional<Part>({dim_, start_, stop_}) : std::nullopt;
}

void SliceRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    // On the CPU parts are added faster to what is dense itself, by more than the copy that follows costs.
    auto [buffer, fresh] = d.accumulator(0, program_.gpu());
    if (fresh) buffer.zero_();
    const at::Tensor part = view(buffer), tdy = d.cotangent();
    if (d.placed() && part.is_alias_of(tdy)) return;  // it is there
    fresh || d.placed() ? part.copy_(tdy) : part.add_(tdy);
}

CatRule::CatRule(const Program& program, const Op& op) : Rule(program, op), dim_(axis_of(op, output())) {}

at::Tensor CatRule::forward(State& state) const {
    std::vector<at::Tensor> parts;
    for (int id : op_.inputs) parts.push_back(state.value(id));
    return at::cat(parts, dim_);
}

at::Tensor CatRule::tangent(const Directions& d) const {
    std::vector<at::Tensor> parts;
    for (int i = 0; i < static_cast<int>(op_.inputs.size()); ++i)
        parts.push_back(
            active(i) ? d.tangent(i)
                      : at::zeros({1}, d.state().options()).expand(with_directions(d.K(), input(i).shape)));
    return at::cat(parts, dim_ + 1);
}

void CatRule::adjoint(Directions& d) const {
    if (!d.cotangent().defined()) return;
    int64_t start = 0;
    for (int i = 0; i < static_cast<int>(op_.inputs.size()); ++i) {
        const int64_t length = input(i).shape[static_cast<size_t>(dim_)];
        if (d.wants(i)) d.add(i, d.cotangent().narrow(dim_ + 1, start, length), false);
        start += length;
    }
}

PadRule::PadRule(const Program& program, const Op& op)
    : Rule(program, op), pads_(op.attributes.integers("pads")), value_(op.attributes.real("value")) {
    if (pads_.size() % 2 || pads_.size() > 2 * input(0).shape.size())
        throw std::invalid_argument("pads must be pairs, for at most every axis of x");
    for (int64_t pad : pads_) reversed_.push_back(-pad);
}

at::Tensor PadRule::forward(State& state) const {
    return at::constant_pad_nd(state.value(op_.inputs[0]), pads_, value_);
}

at::Tensor PadRule::tangent(const Directions& d) const { return at::constant_pad_nd(d.tangent(0), pads_, 0); }

void PadRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined())
        d.add(0, at::constant_pad_nd(d.cotangent(), reversed_, 0), true);
}

// y[i, ...] = x[index[i], ...]: rows of the first axis. A row of `frozen` (an embedding's padding) is a
// constant. See kernels/embedding.h.
RowsRule::RowsRule(const Program& program, const Op& op)
    : Rule(program, op), frozen_(op.attributes.integer("frozen")) {
    if (input(0).shape.empty()) throw std::invalid_argument("x must have rows");
    if (active(1)) throw std::invalid_argument("the index must be a constant");
    width_ = 1;
    for (size_t axis = 1; axis < input(0).shape.size(); ++axis) width_ *= input(0).shape[axis];
}

namespace {

enum SavedOfRows { kIndex, kOrder, kStarts };

// What scatter_rows is told of an index: its places sorted by the row they read, and where each row's begin.
std::pair<at::Tensor, at::Tensor> segments_of(const at::Tensor& index) {
    const auto [sorted, order] = at::sort(index, std::optional<bool>(true), 0);
    const at::Tensor counts = std::get<2>(at::unique_consecutive(sorted, false, /*return_counts=*/true));
    const at::Tensor ends = counts.cumsum(0);
    return {order.contiguous(), at::cat({at::zeros({1}, ends.options()), ends})};
}

}  // namespace

at::Tensor RowsRule::forward(State& state) const {
    const at::Tensor index = state.value(op_.inputs[1]).to(at::kLong).reshape({-1}).contiguous();
    const auto [order, starts] = segments_of(index);
    state.saved(op_) = {index, order, starts};
    return state.value(op_.inputs[0]).index_select(0, index).view(output().shape);
}

at::Tensor RowsRule::tangent(const Directions& d) const {
    const at::Tensor& index = d.state().saved(op_)[kIndex];
    const at::Tensor tx = each_contiguous(d.tangent(0));
    at::Tensor ty = at::empty(with_directions(d.K(), output().shape), d.state().options());
    FLATCORE_DISPATCH(ty, "rows", [&] {
        FLATCORE_RUN(ty, gather_rows<scalar_t>, d.K(), index.numel(), width_, index.const_data_ptr<int64_t>(),
                     frozen_, tx.const_data_ptr<scalar_t>(), tx.stride(0), ty.mutable_data_ptr<scalar_t>());
    });
    return ty;
}

void RowsRule::adjoint(Directions& d) const {
    if (!d.wants(0) || !d.cotangent().defined()) return;
    const auto& saved = d.state().saved(op_);
    const at::Tensor tdy = d.cotangent().contiguous();
    auto [buffer, fresh] = d.accumulator(0);
    if (fresh) buffer.zero_();
    // Where x lies channels last, its rows are gathered apart.
    const bool apart = d.K() > 0 && !buffer.select(0, 0).is_contiguous();
    const at::Tensor tdx = apart ? at::zeros(buffer.sizes(), buffer.options()) : buffer;
    const RowSegments segments{saved[kStarts].numel() - 1, saved[kOrder].const_data_ptr<int64_t>(),
                               saved[kStarts].const_data_ptr<int64_t>()};
    FLATCORE_DISPATCH(tdx, "rows", [&] {
        FLATCORE_RUN(tdx, scatter_rows<scalar_t>, d.K(), saved[kIndex].numel(), width_,
                     saved[kIndex].const_data_ptr<int64_t>(), segments, frozen_,
                     tdy.const_data_ptr<scalar_t>(), tdx.mutable_data_ptr<scalar_t>(), tdx.stride(0));
    });
    if (apart) buffer.add_(tdx);
}

// y = mask ? a : b; broadcast. The mask is bool, or ones and zeros that depend on the parameters by jumps
// only.
namespace {

at::Tensor as_bool(const at::Tensor& mask) { return mask.scalar_type() == at::kBool ? mask : mask.ne(0); }

}  // namespace

at::Tensor WhereRule::forward(State& state) const {
    return state.value(op_.inputs[1]).where(as_bool(state.value(op_.inputs[0])), state.value(op_.inputs[2]));
}

at::Tensor WhereRule::tangent(const Directions& d) const {
    const at::Tensor mask = as_bool(d.state().value(op_.inputs[0]));
    const auto rank = static_cast<int64_t>(output().shape.size());
    const at::Tensor zero = at::zeros({}, d.state().options());
    const auto side = [&](int i) { return active(i) ? align_directions(d.tangent(i), rank) : zero; };
    return side(1).where(mask, side(2)).expand(with_directions(d.K(), output().shape));
}

void WhereRule::adjoint(Directions& d) const {
    if (!d.cotangent().defined()) return;
    const at::Tensor mask = as_bool(d.state().value(op_.inputs[0]));
    const at::Tensor zero = at::zeros({}, d.state().options());
    if (d.wants(1)) d.add(1, reduce_directions(d.cotangent().where(mask, zero), input(1).shape), true);
    if (d.wants(2)) d.add(2, reduce_directions(zero.where(mask, d.cotangent()), input(2).shape), true);
}

// The same number in a coarser format and back: what a cast inside the model leaves of it. Its derivative is
// one.
at::Tensor RoundRule::forward(State& state) const {
    const at::Tensor& x = state.value(op_.inputs[0]);
    return x.to(at::kFloat).to(x.scalar_type());
}

at::Tensor RoundRule::tangent(const Directions& d) const { return d.tangent(0); }

void RoundRule::adjoint(Directions& d) const {
    if (d.wants(0) && d.cotangent().defined()) d.add(0, d.cotangent(), false);
}

}  // namespace flatcore
