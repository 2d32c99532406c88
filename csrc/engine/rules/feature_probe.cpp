// e = V x for weights that meet features x at the T positions of an example. V need not exist where only its
// action on these is seen: of rows independent of each other and of covariance I, V x has covariance <x_p,
// x_q> between positions p and q. So at one position it is |x| times random signs, and at few it is L S with
// L L^T = X X^T, S random signs; only at many positions, or where entries of the weight are asked for, is V
// drawn.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/im2col.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/var.h>

#include <algorithm>
#include <limits>

#include "probe.h"

namespace flatcore {

namespace {

// Elements of the temporaries of one chunk of examples: 8 MB of floats.
constexpr int64_t kChunk = int64_t{1} << 21;
// What drawing a sign costs, in multiply-adds of a matrix product.
constexpr int64_t kSignCost = 16;
// Elements of V drawn at once where a weight is large.
constexpr int64_t kDrawn = int64_t{1} << 20;

}  // namespace

int64_t FeatureProbeRule::chunk(int64_t elements_of_one) const {
    return std::clamp<int64_t>(kChunk / std::max<int64_t>(elements_of_one, 1), 1, examples_);
}

// Does V need no entries: one position, one use, no diagonal?
bool FeatureProbeRule::by_length(const ExampleProbes&) const { return positions_ == 1 && !repeated_; }

bool FeatureProbeRule::by_gram(const ExampleProbes& probes) const {
    if (repeated_ || wants_diagonal(probes) || positions_ >= in_) return false;
    const int64_t T = positions_, columns = signs_a_row(probes);
    // The Gram matrix, its factor (in double: twice the price) and L S, against V and X V^T; two probes.
    return 2 * T * T * in_ + T * T * T + 2 * T * (T + kSignCost) * columns <
           2 * in_ * columns * (T + kSignCost);
}

at::Tensor FeatureProbeRule::inject(const Directions& d, const ExampleProbes& probes) const {
    if (probes.relative && repeated_) return {};  // its cross terms would need W A x at every use
    at::Tensor e = at::empty({d.K(), examples_, positions_, groups_ * out_}, d.state().options());
    if (by_length(probes))
        inject_by_length(d.state(), probes, e);
    else if (by_gram(probes))
        inject_by_gram(d.state(), probes, e);
    else
        inject_explicitly(d.state(), probes, e);
    if (!output().channels_last) return e.view(with_directions(d.K(), output().shape));
    const Integers& s = output().shape;
    return e.view({d.K(), s[0], s[2], s[3], s[1]}).permute({0, 1, 4, 2, 3});
}

// F with F F^T = W W^T, (groups, out, the fewer of in and out): F S of random signs S has the covariance of W
// A.
at::Tensor FeatureProbeRule::relative_factor(const State& state) const {
    const at::Tensor weights = as_matrices(state.value(op_.inputs[2]).reshape({-1}));
    if (in_ <= out_) return weights;
    const at::Tensor wide = weights.to(at::kDouble);
    const auto [values, vectors] = at::linalg_eigh(at::matmul(wide, wide.transpose(-2, -1)));
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(weights.scalar_type());
}

// Signs that a probe takes for one feature.
int64_t FeatureProbeRule::signs_a_row(const ExampleProbes& probes) const {
    return probes.relative ? std::min(in_, out_) : out_;
}

namespace {

// Where the signs of a parameter's relative probes begin: apart from those of its entries and of any other's.
int64_t relative_element(int64_t parameter) { return (parameter + 1) << 40; }

at::Tensor new_signs(const ExampleBlock& block, int64_t first, int64_t count,
                     const at::TensorOptions& options) {
    at::Tensor signs = at::empty({block.probes, block.examples, count}, options);
    FLATCORE_DISPATCH(signs, "signs", [&] {
        FLATCORE_RUN(signs, example_signs<scalar_t>, block, first, count, signs.mutable_data_ptr<scalar_t>());
    });
    return signs;
}

}  // namespace

void FeatureProbeRule::inject_by_length(const State& state, const ExampleProbes& probes,
                                        const at::Tensor& e) const {
    const int64_t K = e.size(0), N = examples_, columns = signs_a_row(probes);
    const int64_t first = probes.relative ? relative_element(parameter_) : offset_;
    const at::Tensor x = features(state, 0, N).squeeze(2);  // (N, groups, in)
    at::Tensor v = new_signs(block(probes, 0, N), first, groups_ * columns, e.options())
                       .view({K, N, groups_, columns})
                       .mul_(x.norm(2, -1, true));
    if (!probes.relative) {
        e.copy_(v.view(e.sizes()));
        return;
    }
    const at::Tensor weights = relative_factor(state);
    for (int64_t g = 0; g < groups_; ++g)
        e.view({K * N, groups_, out_})
            .select(1, g)
            .copy_(at::matmul(v.view({K * N, groups_, columns}).select(1, g), weights.select(0, g).t()));
}

void FeatureProbeRule::inject_by_gram(const State& state, const ExampleProbes& probes,
                                      const at::Tensor& e) const {
    const int64_t K = e.size(0), T = positions_, columns = signs_a_row(probes);
    const int64_t first = probes.relative ? relative_element(parameter_) : offset_;
    const int64_t step = chunk(groups_ * T * std::max({2 * in_, K * columns, 4 * T}));
    const at::Tensor weights = probes.relative ? relative_factor(state) : at::Tensor();
    for (int64_t n = 0; n < examples_; n += step) {
        const int64_t count = std::min(step, examples_ - n);
        const at::Tensor x = features(state, n, count).to(at::kDouble);
        const at::Tensor gram = at::matmul(x, x.transpose(-2, -1));
        // Positions may be dependent, padding say: what makes the factor exist is the rounding of the Gram
        // matrix.
        at::Tensor lengths = gram.diagonal(0, -2, -1);
        const double rounding = 16 * std::numeric_limits<double>::epsilon() * static_cast<double>(T);
        lengths.add_(lengths.amax(-1, true) * rounding + std::numeric_limits<double>::min());
        const at::Tensor factor = std::get<0>(at::linalg_cholesky_ex(gram)).to(e.scalar_type());
        const at::Tensor signs = new_signs(block(probes, n, count), first, groups_ * T * columns, e.options())
                                     .view({K, count, groups_, T, columns});
        at::Tensor part = at::matmul(factor, signs);
        if (probes.relative) part = at::matmul(part, weights.transpose(-2, -1));
        e.narrow(1, n, count).view({K, count, T, groups_, out_}).copy_(part.transpose(2, 3));
    }
}

void FeatureProbeRule::inject_explicitly(const State& state, const ExampleProbes& probes,
                                         const at::Tensor& e) const {
    const int64_t K = e.size(0);
    at::Tensor weights;
    if (probes.relative) weights = relative_factor(state);
    const auto one_example = [&](int64_t n) {
        const at::Tensor x = features(state, n, 1).select(0, 0);  // (groups, T, in)
        for (int64_t k = 0; k < K; ++k) {
            const at::Tensor y = e.select(0, k).select(0, n).view({positions_, groups_, out_});
            ExampleBlock one = block(probes, n, 1);
            one.first_probe += k;
            one.probes = 1;
            for (int64_t g = 0; g < groups_; ++g)
                for_each_drawn(one, probes, g, e.options(), [&](int64_t first, const at::Tensor& v) {
                    if (probes.relative)
                        gemm(y.select(1, g), at::matmul(x.select(0, g), v.t()), weights.select(0, g).t(),
                             false);
                    else
                        gemm(y.select(1, g).narrow(1, first, v.size(0)), x.select(0, g), v.t(), false);
                });
        }
    };
    each_example(one_example);
}

// Examples are what the threads share, unless there are few.
template <class Body>
void FeatureProbeRule::each_example(const Body& body) const {
    const auto some = [&](int64_t first, int64_t last) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // set for each thread
        for (int64_t n = first; n < last; ++n) body(n);
    };
    if (!program_.gpu() && examples_ >= 2 * at::get_num_threads() && !at::in_parallel_region())
        at::parallel_for(0, examples_, 1, some);
    else
        some(0, examples_);
}

// draw(first row, V) for rows (some, in) of one example's matrix of a group.
template <class Draw>
void FeatureProbeRule::for_each_drawn(const ExampleBlock& one, const ExampleProbes& probes, int64_t group,
                                      const at::TensorOptions& options, const Draw& draw) const {
    if (probes.relative) {
        const int64_t rows = signs_a_row(probes);
        const int64_t first = relative_element(parameter_) + group * rows * in_;
        draw(0, new_signs(one, first, rows * in_, options).view({rows, in_}));
        return;
    }
    if (transposed()) {
        draw(0, as_matrices(new_signs(one, offset_, in_ * out_, options).view({-1})).select(0, 0));
        return;
    }
    const int64_t step = std::max<int64_t>(1, kDrawn / in_);
    for (int64_t row = 0; row < out_; row += step) {
        const int64_t rows = std::min(step, out_ - row);
        draw(row,
             new_signs(one, offset_ + (group * out_ + row) * in_, rows * in_, options).view({rows, in_}));
    }
}

at::Tensor FeatureProbeRule::collect(const Directions& d, ExampleProbes& probes) const {
    if (probes.relative && repeated_) return {};
    const at::Tensor tdy = positions_first(d.cotangent());
    if (probes.squares) return squares(d.state(), probes, tdy);
    const auto kept = probes.injected.find(op_.index);
    const at::Tensor e = positions_first(kept == probes.injected.end() ? inject(d, probes) : kept->second);
    if (wants_diagonal(probes)) add_diagonal(d.state(), probes, tdy, e);
    return dots(e.flatten(2), tdy.flatten(2));
}

// <dy, V tx> and tdx += dy V
at::Tensor FeatureProbeRule::cross_terms(Directions& d, const ExampleProbes& probes) const {
    const int64_t K = d.K();
    if (groups_ != 1) throw std::logic_error("a repeated weight must be a matrix");
    const at::Tensor dy = d.state().adjoint(op_.output).reshape({examples_, positions_, out_});
    at::Tensor b = at::zeros({K, examples_, positions_, in_}, d.state().options());
    each_example([&](int64_t n) {
        for (int64_t k = 0; k < K; ++k) {
            ExampleBlock one = block(probes, n, 1);
            one.first_probe += k;
            one.probes = 1;
            for_each_drawn(one, probes, 0, b.options(), [&](int64_t first, const at::Tensor& v) {
                gemm(b.select(0, k).select(0, n), dy.select(0, n).narrow(1, first, v.size(0)), v, true);
            });
        }
    });
    const at::Tensor sums = dots(b.flatten(2), d.tangent(1).reshape({K, examples_, -1}));
    if (d.wants(1)) d.add(1, b.view(with_directions(K, input(1).shape)), true);
    return sums;
}

// |sum over positions of tdy x^T|^2 for every example, without the matrix where the Gram matrices are
// smaller.
at::Tensor FeatureProbeRule::squares(const State& state, ExampleProbes& probes, const at::Tensor& tdy) const {
    const int64_t K = tdy.size(0), N = examples_, T = positions_;
    at::Tensor sums = at::zeros({K, N}, tdy.options().dtype(at::kDouble));
    at::Tensor diagonal;
    if (probes.diagonal.defined())
        diagonal = as_matrices(probes.diagonal.narrow(0, offset_, groups_ * out_ * in_));
    if (T == 1) {
        const at::Tensor x = features(state, 0, N).squeeze(2);  // (N, groups, in)
        const at::Tensor back = tdy.view({K, N * groups_, out_});
        if (diagonal.defined())
            diagonal.add_(at::matmul(back.square().sum(0).view({N, groups_, out_}).permute({1, 2, 0}),
                                     x.square().transpose(0, 1)));
        return (dots(back, back).view({K, N, groups_}) * dots(x, x)).sum(-1);
    }
    if (diagonal.defined()) {
        const int64_t step = chunk(groups_ * (K * in_ * out_ + T * in_));
        for (int64_t n = 0; n < N; n += step) {
            const int64_t count = std::min(step, N - n);
            const at::Tensor back =
                tdy.narrow(1, n, count).view({K, count, T, groups_, out_}).permute({0, 1, 3, 4, 2});
            const at::Tensor squared = at::matmul(back, features(state, n, count)).square_();
            diagonal.add_(squared.sum(Integers{0, 1}, false, at::kDouble));
            sums.narrow(1, n, count).copy_(squared.sum(Integers{2, 3, 4}, false, at::kDouble));
        }
        return sums;
    }
    const bool gram = T * (in_ + out_) < in_ * out_;
    each_example([&](int64_t n) {
        const at::Tensor x = features(state, n, 1).select(0, 0);  // (groups, T, in)
        const at::Tensor back = tdy.select(1, n).view({K, T, groups_, out_}).transpose(1, 2);
        const at::Tensor xx = gram ? at::matmul(x, x.transpose(-2, -1)) : at::Tensor();
        for (int64_t k = 0; k < K; ++k) {
            const at::Tensor one = back.select(0, k);  // (groups, T, out)
            const at::Tensor product =
                at::matmul(gram ? one : one.transpose(-2, -1), gram ? one.transpose(-2, -1) : x);
            sums.select(0, k).select(0, n).copy_(
                dots(product.reshape({1, 1, -1}), (gram ? xx : product).reshape({1, 1, -1}))
                    .select(0, 0)
                    .select(0, 0));
        }
    });
    return sums;
}

// The mean over K of V * (tdy^T x), summed over examples, and its variance. At one position V is known by its
// product e = V x alone, and e x^T / |x|^2, its mean given that, takes its place.
void FeatureProbeRule::add_diagonal(const State& state, ExampleProbes& probes, const at::Tensor& tdy,
                                    const at::Tensor& e) const {
    const int64_t K = tdy.size(0), N = examples_, T = positions_, size = groups_ * out_ * in_;
    const at::Tensor diagonal = as_matrices(probes.diagonal.narrow(0, offset_, size));
    at::Tensor variance;
    if (probes.variance.defined()) variance = as_matrices(probes.variance.narrow(0, offset_, size));
    if (by_length(probes)) {
        const at::Tensor x2 = features(state, 0, N).squeeze(2).square();  // (N, groups, in)
        const at::Tensor length2 = x2.sum(-1, true);
        const at::Tensor u = (e * tdy).view({K, N, groups_, out_}) /
                             length2.masked_fill(length2.eq(0), std::numeric_limits<double>::infinity());
        const auto over_examples = [&](const at::Tensor& weights, const at::Tensor& x) {
            return at::matmul(weights.permute({1, 2, 0}), x.transpose(0, 1));  // (groups, out, in)
        };
        diagonal.add_(over_examples(u.mean(0), x2));
        if (variance.defined()) variance.add_(over_examples(u.var(0, true) / K, x2.square()));
        return;
    }
    // Pieces of the examples, which do not depend on the number of threads, add up on their own.
    const int64_t pieces = std::min<int64_t>(8, N);
    const at::TensorOptions sums = tdy.options().dtype(at::kDouble);
    const at::Tensor means = at::zeros({pieces, size}, sums), spreads = at::zeros({pieces, size}, sums);
    const auto one_piece = [&](int64_t piece) {
        for (int64_t n = N * piece / pieces; n < N * (piece + 1) / pieces; ++n) {
            const at::Tensor x = features(state, n, 1).select(0, 0);  // (groups, T, in)
            const at::Tensor back = tdy.select(1, n).view({K, T, groups_, out_}).permute({0, 2, 3, 1});
            at::Tensor samples = at::matmul(back, x);  // (K, groups, out, in)
            samples.mul_(
                as_matrices(new_signs(block(probes, n, 1), offset_, size, tdy.options()).squeeze(1)));
            const at::Tensor mean = samples.mean(0);
            as_matrices(means.select(0, piece)).add_(mean);
            if (variance.defined())
                as_matrices(spreads.select(0, piece))
                    .add_(samples.sub_(mean).square_().sum(0), 1.0 / static_cast<double>(K * (K - 1)));
        }
    };
    const auto some = [&](int64_t first, int64_t last) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // set for each thread
        for (int64_t piece = first; piece < last; ++piece) one_piece(piece);
    };
    if (!program_.gpu() && pieces > 1 && !at::in_parallel_region())
        at::parallel_for(0, pieces, 1, some);
    else
        some(0, pieces);
    diagonal.add_(as_matrices(means.sum(0)));
    if (variance.defined()) variance.add_(as_matrices(spreads.sum(0)));
}

double FeatureProbeRule::flops(int64_t K, bool second_order) const {
    const double product = 2.0 * static_cast<double>(K * examples_ * positions_ * groups_) *
                           static_cast<double>(in_) * static_cast<double>(out_);
    if (repeated_) return product * (second_order ? 2 : 1);
    if (positions_ == 1) return static_cast<double>(4 * K * output().numel);
    return positions_ < in_ ? product * static_cast<double>(positions_) / static_cast<double>(in_) : product;
}

int64_t FeatureProbeRule::workspace(int64_t K) const {
    return K * output().numel + std::min(examples_ * groups_ * positions_ * in_, kChunk);
}

LinearProbeRule::LinearProbeRule(const Program& program, const Op& op)
    : FeatureProbeRule(program, op), transposed_(op.attributes.flag("transposed")) {
    const Integers& weight = input(2).shape;
    if (weight.size() != 2) throw std::invalid_argument("the weight must be a matrix");
    in_ = weight[transposed_ ? 0 : 1];
    out_ = weight[transposed_ ? 1 : 0];
    if (input(1).shape.empty() || input(1).shape.back() != in_ || output().shape.back() != out_)
        throw std::invalid_argument("x, the weight and y do not fit");
    positions_ = in_ ? input(1).numel / in_ / examples_ : 0;
}

at::Tensor LinearProbeRule::features(const State& state, int64_t first, int64_t count) const {
    return state.value(op_.inputs[1]).reshape({examples_, 1, positions_, in_}).narrow(0, first, count);
}

at::Tensor LinearProbeRule::as_matrices(const at::Tensor& flat) const {
    return transposed_ ? flat.unflatten(-1, {1, in_, out_}).transpose(-2, -1)
                       : flat.unflatten(-1, {1, out_, in_});
}

ConvolutionProbeRule::ConvolutionProbeRule(const Program& program, const Op& op)
    : FeatureProbeRule(program, op), stride_(op.attributes.integers("stride")),
      padding_(op.attributes.integers("padding")), dilation_(op.attributes.integers("dilation")) {
    const Integers &weight = input(2).shape, &y = output().shape;
    if (weight.size() != 4 || input(1).shape.size() != 4 || y.size() != 4 || repeated_)
        throw std::invalid_argument("x, the weight and y must have 4 axes, and the weight one use");
    kernel_ = {weight[2], weight[3]};
    groups_ = op.attributes.integer("groups");
    in_ = weight[1] * weight[2] * weight[3];
    out_ = weight[0] / groups_;
    positions_ = y[0] / examples_ * y[2] * y[3];
}

at::Tensor ConvolutionProbeRule::features(const State& state, int64_t first, int64_t count) const {
    const int64_t images = output().shape[0] / examples_;
    const at::Tensor x = state.value(op_.inputs[1]).narrow(0, first * images, count * images);
    return at::im2col(x.contiguous(), kernel_, dilation_, padding_, stride_)
        .view({count, images, groups_, in_, -1})
        .permute({0, 2, 1, 4, 3})
        .reshape({count, groups_, positions_, in_});
}

at::Tensor ConvolutionProbeRule::as_matrices(const at::Tensor& flat) const {
    return flat.unflatten(-1, {groups_, out_, in_});
}

}  // namespace flatcore
