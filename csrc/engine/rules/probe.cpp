#include "probe.h"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/var.h>
#include <ATen/ops/zeros.h>

namespace flatcore {

ProbeRule::ProbeRule(const Program& program, const Op& op)
    : Rule(program, op), parameter_(op.attributes.integer("parameter")),
      offset_(op.attributes.integer("offset")), examples_(op.attributes.integer("examples")),
      repeated_(op.attributes.flag("repeated")) {
    if (input(0).shape != output().shape) throw std::invalid_argument("a probe keeps the shape of y");
    if (output().shape.empty() || examples_ < 1 || output().shape[0] % examples_)
        throw std::invalid_argument("axis 0 of y must be made of equal groups of rows, one for each example");
}

at::Tensor ProbeRule::tangent(const Directions& d) const {
    ExampleProbes* probes = d.probes();
    const at::Tensor ty = active(0) ? d.tangent(0) : at::Tensor();
    const at::Tensor e = probes ? inject(d, *probes) : at::Tensor();
    if (!e.defined())
        return ty.defined()
                   ? ty
                   : at::zeros({1}, d.state().options()).expand(with_directions(d.K(), output().shape));
    probes->injected[op_.index] = e;
    return ty.defined() ? e + ty : e;
}

void ProbeRule::adjoint(Directions& d) const {
    ExampleProbes* probes = d.probes();
    if (probes && d.cotangent().defined()) {
        const at::Tensor sums = collect(d, *probes);
        if (sums.defined()) probes->sums.select(1, parameter_).add_(sums);
    }
    if (probes && !probes->relative && has_second_order() && d.second_order())
        probes->sums.select(1, parameter_).add_(cross_terms(d, *probes));
    if (probes) probes->injected.erase(op_.index);
    if (d.wants(0) && d.cotangent().defined()) d.add(0, d.cotangent(), false);
}

at::Tensor ProbeRule::cross_terms(Directions&, const ExampleProbes&) const {
    throw std::logic_error("a use without second derivatives");
}

ExampleBlock ProbeRule::block(const ExampleProbes& probes, int64_t first, int64_t count) const {
    ExampleBlock part = probes.block;
    part.first_example += first;
    part.examples = count;
    return part;
}

at::Tensor ProbeRule::positions_first(const at::Tensor& t) const {
    const at::Tensor dense = dense_directions(t, output());
    return (output().channels_last ? dense.permute({0, 1, 3, 4, 2}) : dense)
        .reshape({t.size(0), examples_, -1, channels()});
}

at::Tensor dots(const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor x = a.contiguous(), y = b.contiguous();
    const int64_t rows = x.size(0) * x.size(1);
    at::Tensor result = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kDouble));
    if (!rows) return result;
    FLATCORE_DISPATCH(x, "dots", [&] {
        FLATCORE_RUN(x, row_dots<scalar_t>, rows, x.numel() / rows, x.const_data_ptr<scalar_t>(),
                     y.const_data_ptr<scalar_t>(), result.mutable_data_ptr<double>());
    });
    return result;
}

namespace {

// target[..., index[i], ...] += values[..., i, ...] along an axis. On a GPU index_add_ adds by atomics, in an
// order of their own; index_put_ sorts first.
at::Tensor add_in_order(at::Tensor target, int64_t axis, const at::Tensor& index, const at::Tensor& values) {
    if (!on_gpu(target)) return target.index_add_(axis, index, values);
    target.transpose(0, axis).index_put_({index}, values.transpose(0, axis), /*accumulate=*/true);
    return target;
}

// Samples (K, N, m) of m entries of the diagonal: the mean over K, and its variance, summed over N.
void add_at(ExampleProbes& probes, const at::Tensor& elements, const at::Tensor& samples) {
    const int64_t K = samples.size(0);
    add_in_order(probes.diagonal, 0, elements, samples.mean(0).sum(0, false, at::kDouble));
    if (probes.variance.defined())
        add_in_order(probes.variance, 0, elements,
                     samples.var(0, /*unbiased=*/true).sum(0, false, at::kDouble) / K);
}

}  // namespace

BroadcastProbeRule::BroadcastProbeRule(const Program& program, const Op& op)
    : ProbeRule(program, op), scale_(op.attributes.real("scale")), size_(op.attributes.integer("size")),
      distinct_(op.attributes.flag("distinct")) {
    rows_ = output().shape[0] / examples_;
    const Integers &index = input(1).shape, &y = output().shape;
    count_ = input(1).numel;
    if (index.size() > y.size() || (index.size() == y.size() && index[0] != 1))
        throw std::invalid_argument("the index must be the same for all examples");
    shape_ = index.size() == y.size() ? Integers(index.begin() + 1, index.end()) : index;
    shape_.insert(shape_.begin(), y.size() - 1 - shape_.size(), 1);
    for (size_t axis = 0; axis < shape_.size(); ++axis)
        if (shape_[axis] != 1 && shape_[axis] != y[axis + 1])
            throw std::invalid_argument("the index must broadcast to y");
}

// (K, N, count)
at::Tensor BroadcastProbeRule::signs(const Directions& d, const ExampleProbes& probes) const {
    const at::Tensor index = d.state().value(op_.inputs[1]).contiguous();
    at::Tensor result = at::empty({d.K(), examples_, count_}, d.state().options());
    FLATCORE_DISPATCH(result, "signs", [&] {
        FLATCORE_RUN(result, example_signs_at<scalar_t>, block(probes, 0, examples_), offset_,
                     index.const_data_ptr<int64_t>(), count_, result.mutable_data_ptr<scalar_t>());
    });
    return result;
}

at::Tensor BroadcastProbeRule::spread(const at::Tensor& signs) const {
    Integers narrow{signs.size(0), examples_, 1}, wide{signs.size(0), examples_, rows_};
    narrow.insert(narrow.end(), shape_.begin(), shape_.end());
    wide.insert(wide.end(), output().shape.begin() + 1, output().shape.end());
    return signs.view(narrow).expand(wide).reshape(with_directions(signs.size(0), output().shape));
}

at::Tensor BroadcastProbeRule::gather(const at::Tensor& directions) const {
    const at::Tensor apart = directions.unflatten(1, {examples_, rows_});
    Integers axes{2};
    for (size_t axis = 0; axis < shape_.size(); ++axis)
        if (shape_[axis] == 1) axes.push_back(static_cast<int64_t>(axis) + 3);
    return apart.sum(axes).reshape({directions.size(0), examples_, count_});
}

at::Tensor BroadcastProbeRule::inject(const Directions& d, const ExampleProbes& probes) const {
    if (probes.relative) return {};
    const at::Tensor e = spread(signs(d, probes).mul_(scale_));
    return has(2) ? e * d.state().value(op_.inputs[2]) : e;
}

at::Tensor BroadcastProbeRule::collect(const Directions& d, ExampleProbes& probes) const {
    if (probes.relative) return {};
    at::Tensor back = d.cotangent();
    if (has(2)) back = back * d.state().value(op_.inputs[2]);
    back = gather(back).mul_(scale_);
    at::Tensor elements = d.state().value(op_.inputs[1]).reshape({-1});
    const bool by_element = probes.squares || wants_diagonal(probes);
    if (by_element && !distinct_)
        back = add_in_order(at::zeros({d.K(), examples_, size_}, back.options()), 2, elements, back);
    if (by_element && !distinct_) elements = at::arange(size_, elements.options());
    if (probes.squares) {
        if (probes.diagonal.defined())
            add_in_order(probes.diagonal, 0, elements + offset_,
                         back.square().sum(Integers{0, 1}, false, at::kDouble));
        return dots(back, back);
    }
    at::Tensor v;
    if (by_element && !distinct_) {
        v = at::empty({d.K(), examples_, size_}, back.options());
        FLATCORE_DISPATCH(v, "signs", [&] {
            FLATCORE_RUN(v, example_signs<scalar_t>, block(probes, 0, examples_), offset_, size_,
                         v.mutable_data_ptr<scalar_t>());
        });
    } else {
        v = signs(d, probes);
    }
    if (wants_diagonal(probes)) add_at(probes, elements + offset_, v * back);
    return dots(v, back);
}

at::Tensor BroadcastProbeRule::cross_terms(Directions& d, const ExampleProbes& probes) const {
    const at::Tensor b = spread(signs(d, probes)) * (d.state().adjoint(op_.output) * scale_);
    const int64_t K = d.K();
    const at::Tensor tm = d.tangent(2);
    const at::Tensor sums = (b * align_directions(tm, static_cast<int64_t>(output().shape.size())))
                                .reshape({K, examples_, -1})
                                .sum(2, false, at::kDouble);
    if (d.wants(2)) d.add(2, reduce_directions(b, input(2).shape), true);
    return sums;
}

double BroadcastProbeRule::flops(int64_t K, bool) const {
    return static_cast<double>(K * output().numel) * (has(2) ? 4 : 2);
}

RowsProbeRule::RowsProbeRule(const Program& program, const Op& op)
    : ProbeRule(program, op), frozen_(op.attributes.integer("frozen")) {
    if (input(1).numel == 0 || input(1).shape.empty() || input(1).shape[0] % examples_)
        throw std::invalid_argument("axis 0 of the index must be made of equal groups, one for each example");
    positions_ = input(1).numel / examples_;
    width_ = output().numel / input(1).numel;
}

at::Tensor RowsProbeRule::inject(const Directions& d, const ExampleProbes& probes) const {
    if (probes.relative) return {};
    const at::Tensor index = d.state().value(op_.inputs[1]).to(at::kLong).contiguous();
    at::Tensor e = at::empty(with_directions(d.K(), output().shape), d.state().options());
    FLATCORE_DISPATCH(e, "row_signs", [&] {
        FLATCORE_RUN(e, example_row_signs<scalar_t>, block(probes, 0, examples_), offset_,
                     index.const_data_ptr<int64_t>(), positions_, width_, frozen_,
                     e.mutable_data_ptr<scalar_t>());
    });
    return e;
}

at::Tensor RowsProbeRule::collect(const Directions& d, ExampleProbes& probes) const {
    if (probes.relative) return {};
    const int64_t K = d.K(), N = examples_, T = positions_;
    const at::Tensor index = d.state().value(op_.inputs[1]).to(at::kLong).reshape({N, T});
    at::Tensor back = d.cotangent().reshape({K, N, T, width_});
    if (probes.squares && frozen_ >= 0) back = back * index.ne(frozen_).unsqueeze(-1);
    at::Tensor e;
    if (!probes.squares) {
        const auto kept = probes.injected.find(op_.index);
        e = (kept == probes.injected.end() ? inject(d, probes) : kept->second).reshape({K, N, T, width_});
    }
    if (wants_diagonal(probes)) {
        // What an example adds to one row is one number for each entry, however often it reads the row.
        const at::Tensor first = index + at::arange(N, index.options()).unsqueeze(1) * (index.max() + 1);
        auto [keys, place, counts] = at::_unique2(first, true, true);
        place = place.reshape({-1});
        const int64_t pairs = keys.size(0);
        const at::Tensor flat = back.reshape({K, N * T, width_});
        at::Tensor samples = add_in_order(at::zeros({K, pairs, width_}, back.options()), 1, place, flat);
        const at::Tensor rows = keys.remainder(index.max() + 1);
        const at::Tensor elements =
            (rows.unsqueeze(1) * width_ + at::arange(width_, index.options()) + offset_).reshape({-1});
        if (probes.squares) {
            add_in_order(probes.diagonal, 0, elements,
                         samples.square().sum(0, false, at::kDouble).reshape({-1}));
        } else {
            const at::Tensor signs =
                at::zeros_like(samples).index_copy_(1, place, e.reshape({K, N * T, width_}));
            add_at(probes, elements, (samples * signs).reshape({K, 1, -1}));
        }
    }
    if (!probes.squares) return dots(e.reshape({K, N, T * width_}), back.reshape({K, N, T * width_}));
    const at::Tensor same = index.unsqueeze(2).eq(index.unsqueeze(1));
    return (at::matmul(back, back.transpose(2, 3)) * same).sum(Integers{2, 3}, false, at::kDouble);
}

double RowsProbeRule::flops(int64_t K, bool) const { return static_cast<double>(2 * K * output().numel); }

}  // namespace flatcore
