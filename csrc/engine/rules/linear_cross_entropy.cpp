// Cross-entropy against class indices of z = x W^T + b, N rows of V classes, with no N x V matrix that
// outlives a chunk of rows and with none that carries K.
//   tz_k = tx_k W^T + x tW_k^T + tb_k
//   tdz_k as in kernels/cross_entropy.h,  dz = dy (M p - m)
//   tdx_k = tdz_k W + dz tW_k ;  tdW_k = tdz_k^T x + dz^T tx_k ;  tdb_k = sum over rows of tdz_k
// Every sweep computes the logits of its chunk anew, one GEMM that all K directions share; compare Wijmans
// et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for the first two sweeps.
//
// Where the model's output, the cut, is z, the cut lists y, the losses of the rows, in its place. A GGN keeps
// the curvature of the softmax and leaves out the terms of the linear layer. A gradient covariance is the
// same at y: dz_n <dz_n, tz_n> = (dy/dz)^T (dy_n <dy_n, ty_n>), summed over an example's rows.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>

#include "engine/gemm_bf16.h"
#include "kernels/cross_entropy.h"
#include "kernels/softmax.h"
#include "losses.h"

namespace flatcore {

namespace {

enum Input { kX, kWeight, kBias, kMass, kIndex };
enum Saved { kProbability };

// Elements of a chunk's matrices, at most three of which live at once: 64 MiB each in float32. A GEMM reads
// the weights once per chunk, so a chunk needs some hundred rows: with 50,257 classes and width 768, 83 rows
// took 1.2 times as long per row as the 333 that this allows.
constexpr int64_t kChunkElements = 1 << 24;

// On a GPU an eighth of the room for buffers, rounded down to a power of two, so that small changes of the
// room change nothing. By counting, not measured: every chunk reads and writes the weights' products whole
// for each direction, so long as some 800 to 1,400 rows take to compute in TF32 and bfloat16; and logits
// computed anew, in full precision, take as long as eight products in TF32, of which a direction has six. In
// one chunk their probabilities are kept.
constexpr int64_t kShareOfRoom = 8;
constexpr int64_t kLeastOnGpu = 1 << 16, kMostOnGpu = 1 << 28;

int64_t chunk_elements(const Program& program) {
    if (!program.gpu() || program.room() <= 0) return kChunkElements;
    const auto share = static_cast<uint64_t>(program.room() / kShareOfRoom);
    return std::clamp(static_cast<int64_t>(std::bit_floor(share)), kLeastOnGpu, kMostOnGpu);
}

Integers with_last(Integers shape, int64_t size) {
    shape.push_back(size);
    return shape;
}

at::Tensor of_direction(const at::Tensor& t, int64_t k) { return t.defined() ? t.select(0, k) : t; }

at::Tensor rows_of(const at::Tensor& t, int64_t k, int64_t first, int64_t rows) {
    return t.defined() ? t.select(0, k).narrow(0, first, rows) : t;
}

template <class T>
const T* row_or_null(const at::Tensor& t, int64_t row) {
    return t.defined() ? t.const_data_ptr<T>() + row : nullptr;
}

}  // namespace

// What all chunks read: x (N, width), weight (width, V), bias (V), or the same with K in front; undefined
// where absent or not active.
struct LinearCrossEntropyRule::Operands {
    at::Tensor x, weight, bias;
};

LinearCrossEntropyRule::LinearCrossEntropyRule(const Program& program, const Op& op)
    : Rule(program, op), transposed_(op.attributes.flag("transposed")), rounds_(op.attributes.flag("round")) {
    if (active(kMass) || active(kIndex)) throw std::invalid_argument("the targets must be constants");
    if (input(kWeight).shape.size() != 2) throw std::invalid_argument("weight must be a matrix");
    width_ = input(kWeight).shape[transposed_ ? 0 : 1];
    classes_ = input(kWeight).shape[transposed_ ? 1 : 0];
    rows_ = output().numel;
    if (classes_ == 0 || input(kX).shape != with_last(output().shape, width_))
        throw std::invalid_argument("x must have the shape of the losses and " + std::to_string(width_) +
                                    " elements behind, and weight at least one class");
    if (input(kMass).shape != output().shape || input(kIndex).shape != output().shape)
        throw std::invalid_argument("masses and indices must have the shape of the losses");
    // As few as fit, of nearly equal length.
    const int64_t most = std::max<int64_t>(1, chunk_elements(program) / classes_);
    const int64_t rows = std::max<int64_t>(1, rows_), chunks = (rows + most - 1) / most;
    chunk_rows_ = (rows + chunks - 1) / chunks;
    const auto& cut = program.cut();
    holds_cut_ = std::find(cut.begin(), cut.end(), op.output) != cut.end();
}

// Calls body(first, rows) for each chunk, in order.
template <class Body>
void LinearCrossEntropyRule::for_each_chunk(const Body& body) const {
    for (int64_t first = 0; first < rows_; first += chunk_rows_)
        body(first, std::min(chunk_rows_, rows_ - first));
}

LinearCrossEntropyRule::Operands LinearCrossEntropyRule::values(const State& state) const {
    const at::Tensor& weight = state.value(op_.inputs[kWeight]);
    return {state.value(op_.inputs[kX]).reshape({rows_, width_}), transposed_ ? weight : weight.t(),
            has(kBias) ? state.value(op_.inputs[kBias]) : at::Tensor()};
}

LinearCrossEntropyRule::Operands LinearCrossEntropyRule::tangents(const Directions& d) const {
    Operands t;
    if (active(kX)) t.x = d.tangent(kX).reshape({d.K(), rows_, width_});
    if (active(kWeight)) t.weight = transposed_ ? d.tangent(kWeight) : d.tangent(kWeight).transpose(1, 2);
    if (active(kBias)) t.bias = d.tangent(kBias);
    return t;
}

at::Tensor LinearCrossEntropyRule::new_chunk(const State& state) const {
    return at::empty({chunk_rows_, classes_}, state.options());
}

// z of the chunk's rows, written into `z`.
void LinearCrossEntropyRule::logits(const Operands& v, int64_t first, const at::Tensor& z) const {
    if (v.bias.defined()) z.copy_(v.bias.expand_as(z));
    gemm(z, v.x.narrow(0, first, z.size(0)), v.weight, v.bias.defined());
    if (rounds_) z.copy_(z.to(at::kFloat));
}

// p of the chunk's rows: as kept, or computed into `buffer`.
at::Tensor LinearCrossEntropyRule::probabilities(const State& state, const Operands& v, int64_t first,
                                                 int64_t rows, const at::Tensor& buffer) const {
    if (keeps_probabilities()) return state.saved(op_)[kProbability];
    const at::Tensor p = buffer.narrow(0, 0, rows);
    logits(v, first, p);
    FLATCORE_DISPATCH(p, "linear_cross_entropy", [&] {
        FLATCORE_RUN(p, softmax_forward<scalar_t>, rows, classes_, p.const_data_ptr<scalar_t>(),
                     p.mutable_data_ptr<scalar_t>(), nullptr);
    });
    return p;
}

// tz of one direction for a chunk's rows x, written into `tz`; of tx, tweight and tbias some may be
// undefined.
void LinearCrossEntropyRule::logit_tangent(const Factor& x, const Factor& weight, const Factor& tx,
                                           const Factor& tweight, const at::Tensor& tbias,
                                           const at::Tensor& tz, Precision precision) const {
    bool started = false;
    if (tbias.defined()) {
        tz.copy_(tbias.expand_as(tz));
        started = true;
    }
    if (tx.full().defined()) {
        gemm(tz, tx, weight, started, precision);
        started = true;
    }
    if (tweight.full().defined()) gemm(tz, x, tweight, started, precision);
}

// Calls body(target, total) with the pointers that the kernels take for the rows from `first` on.
template <class T, class Body>
void LinearCrossEntropyRule::with_target(const State& state, int64_t first, const Body& body) const {
    const at::Tensor mass = state.value(op_.inputs[kMass]).contiguous(),
                     index = state.value(op_.inputs[kIndex]).contiguous();
    const T* total = mass.const_data_ptr<T>() + first;
    body(OneClass<T>{index.const_data_ptr<int64_t>() + first, total}, total);
}

at::Tensor LinearCrossEntropyRule::forward(State& state) const {
    const Operands v = values(state);
    const at::Tensor loss = at::empty(output().shape, state.options()), p = new_chunk(state);
    for_each_chunk([&](int64_t first, int64_t rows) {
        const at::Tensor z = p.narrow(0, 0, rows);
        logits(v, first, z);
        FLATCORE_DISPATCH(z, "linear_cross_entropy", [&] {
            with_target<scalar_t>(state, first, [&](auto target, const scalar_t*) {
                scalar_t* data = z.mutable_data_ptr<scalar_t>();
                FLATCORE_RUN(z, cross_entropy_forward<scalar_t>, rows, classes_, data, target,
                             loss.mutable_data_ptr<scalar_t>() + first, data, nullptr);
            });
        });
    });
    if (keeps_probabilities()) state.saved(op_) = {p};
    return loss;
}

at::Tensor LinearCrossEntropyRule::tangent(const Directions& d) const {
    const State& state = d.state();
    const Operands v = values(state), t = tangents(d);
    const at::Tensor tloss = new_directions(d.K(), output(), state.options());
    const at::Tensor buffer = keeps_probabilities() ? at::Tensor() : new_chunk(state);
    const at::Tensor tz_buffer = new_chunk(state);
    const Factor weight = v.weight;
    for_each_chunk([&](int64_t first, int64_t rows) {
        const at::Tensor p = probabilities(state, v, first, rows, buffer);
        const at::Tensor tz = tz_buffer.narrow(0, 0, rows);
        const Factor x = v.x.narrow(0, first, rows);
        for (int64_t k = 0; k < d.K(); ++k) {
            logit_tangent(x, weight, rows_of(t.x, k, first, rows), of_direction(t.weight, k),
                          of_direction(t.bias, k), tz, d.precision());
            FLATCORE_DISPATCH(tz, "linear_cross_entropy", [&] {
                with_target<scalar_t>(state, first, [&](auto target, const scalar_t* total) {
                    FLATCORE_RUN(tz, cross_entropy_tangent<scalar_t>, 1, rows, classes_, target,
                                 p.const_data_ptr<scalar_t>(), total, tz.const_data_ptr<scalar_t>(),
                                 tloss.mutable_data_ptr<scalar_t>() + k * rows_ + first);
                });
            });
        }
    });
    return tloss;
}

void LinearCrossEntropyRule::adjoint(Directions& d) const {
    if (rows_ == 0) return;
    const State& state = d.state();
    const bool cross = d.second_order() && active(kX) && active(kWeight);
    const Operands v = values(state), t = d.curved() ? tangents(d) : Operands{};
    const at::Tensor tdloss = d.cotangent().defined() ? d.cotangent().contiguous() : at::Tensor();
    const at::Tensor dloss = d.curved() ? state.adjoint(op_.output).contiguous() : at::Tensor();
    const auto zeroed = [&](int i) {  // every chunk adds
        if (!d.wants(i)) return at::Tensor();
        const auto [buffer, fresh] = d.accumulator(i);
        if (fresh) buffer.zero_();
        return buffer;
    };
    // The chunks take rows of x: where its adjoint has other strides (an image lies channels last), they are
    // added to it after.
    const at::Tensor x_buffer = zeroed(kX);
    const bool x_apart = x_buffer.defined() && d.K() > 0 && !x_buffer.select(0, 0).is_contiguous();
    const at::Tensor tdx = x_apart ? at::zeros({d.K(), rows_, width_}, state.options()) : x_buffer;
    const at::Tensor tdbias = zeroed(kBias);
    // The weight is large: its first product is written, not added to zeros.
    const auto [tdweight, weight_fresh] = d.wants(kWeight) ? d.accumulator(kWeight) : Accumulator{};
    const at::Tensor p_buffer = keeps_probabilities() ? at::Tensor() : new_chunk(state);
    const at::Tensor dz_buffer = cross ? new_chunk(state) : at::Tensor(), tz_buffer = new_chunk(state);

    const Factor weight = v.weight;
    for_each_chunk([&](int64_t first, int64_t rows) {
        const at::Tensor p = probabilities(state, v, first, rows, p_buffer);
        // out = tdloss g + dloss p (tz - <p, tz>), the last two undefined where that term is left out
        const auto logit_adjoint = [&](const at::Tensor& buffer, const at::Tensor& own,
                                       const at::Tensor& curvature, const at::Tensor& tz) {
            const at::Tensor out = buffer.narrow(0, 0, rows);
            FLATCORE_DISPATCH(out, "linear_cross_entropy", [&] {
                with_target<scalar_t>(state, first, [&](auto target, const scalar_t* total) {
                    FLATCORE_RUN(out, cross_entropy_adjoint<scalar_t>, 1, rows, classes_, target,
                                 p.const_data_ptr<scalar_t>(), total, row_or_null<scalar_t>(own, first),
                                 row_or_null<scalar_t>(curvature, first), pointer_or_null<scalar_t>(tz),
                                 out.mutable_data_ptr<scalar_t>());
                });
            });
            return out;
        };
        // What several products read.
        const Factor x = v.x.narrow(0, first, rows),
                     dz = cross ? logit_adjoint(dz_buffer, dloss, {}, {}) : at::Tensor();
        for (int64_t k = 0; k < d.K(); ++k) {
            const Factor tx = rows_of(t.x, k, first, rows), tweight = of_direction(t.weight, k);
            at::Tensor tz;
            if (d.curved()) {
                tz = tz_buffer.narrow(0, 0, rows);
                logit_tangent(x, weight, tx, tweight, of_direction(t.bias, k), tz, d.precision());
            }
            const Factor tdz = logit_adjoint(tz_buffer, of_direction(tdloss, k), dloss, tz);
            if (tdx.defined()) {
                const at::Tensor out = tdx.view({d.K(), rows_, width_}).select(0, k).narrow(0, first, rows);
                gemm(out, tdz, weight.t(), true, d.precision());
                if (cross) gemm(out, dz, tweight.t(), true, d.precision());
            }
            if (tdweight.defined()) {
                const auto add = [&](const Factor& adjoint, const Factor& features, bool write) {
                    const Factor &left = transposed_ ? features : adjoint,
                                 &right = transposed_ ? adjoint : features;
                    gemm(tdweight.select(0, k), left.t(), right, !write, d.precision());
                };
                add(tdz, x, weight_fresh && first == 0);
                if (cross) add(dz, tx, false);
            }
            if (tdbias.defined()) tdbias.select(0, k).add_(tdz.full().sum(0));
        }
    });
    if (x_apart) x_buffer.add_(tdx.view(x_buffer.sizes()));
}

double LinearCrossEntropyRule::flops(int64_t K, bool second_order) const {
    const int directions = active(kX) + active(kWeight);
    const double products =
        (keeps_probabilities() ? 0.0 : 1.0) +
        static_cast<double>(K) * (2 * directions + (second_order && directions == 2 ? 2 : 0));
    return 2.0 * static_cast<double>(rows_ * width_ * classes_) * products;
}

// The logits are values, in full precision. Of a chunk's factors the smaller are rounded ahead, on a GPU all:
// tdz and dz, the weights and their tangent, x and its tangent.
Rounding LinearCrossEntropyRule::rounding(int64_t K, bool second_order) const {
    if (!bf16_pays(chunk_rows_, width_, classes_)) return {};
    if (program_.gpu())
        return {flops(K, second_order) - flops(0, second_order),
                rounded_whole(2 * (chunk_rows_ * classes_ + width_ * classes_ + chunk_rows_ * width_))};
    return {flops(K, second_order) - flops(0, second_order),
            std::max({bf16_workspace(chunk_rows_, width_), bf16_workspace(width_, chunk_rows_),
                      bf16_workspace(chunk_rows_, classes_)})};
}

// tz or tdz; p and its rounded logits where p is not kept; one direction's sums for the bias; x's
// adjoint-tangent.
int64_t LinearCrossEntropyRule::workspace(int64_t K) const {
    const int64_t matrices = keeps_probabilities() ? 1 : 2 + rounds_;
    const int64_t apart = input(kX).channels_last ? K * input(kX).numel : 0;
    return matrices * chunk_rows_ * classes_ + (active(kBias) ? classes_ : 0) + apart;
}

// dz.
int64_t LinearCrossEntropyRule::second_order_workspace() const {
    return active(kX) && active(kWeight) ? chunk_rows_ * classes_ : 0;
}

}  // namespace flatcore
