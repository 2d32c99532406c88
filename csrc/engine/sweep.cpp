#include "sweep.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "covariance.h"
#include "pass.h"
#include "workspace.h"

namespace flatcore {
namespace {

void no_visit(const Op&, const Rule&) {}

// Elements of an adjoint that is kept contiguous whatever it came as, a mean's repeats one number, so that
// products need not copy it.
constexpr int64_t kWrittenOut = 1 << 16;

at::Tensor loss_seed(const State& state, double seed) {
    return at::full(
        with_directions(1, state.program().values()[static_cast<size_t>(state.program().loss())].shape), seed,
        state.options());
}

}  // namespace

void backward_sweep(State& state, double seed) {
    Pass pass(state, Mode::gradient, 1, at::Tensor(), at::Tensor(), false);
    const int loss = state.program().loss();
    state.set_adjoint(loss, at::full({}, seed, state.options()));
    pass.cotangent_of(loss) = loss_seed(state, seed);
    const Op* previous = nullptr;
    const auto release = [&] {
        if (previous) state.release_after_backward(*previous);
    };
    pass.adjoint_sweep([&](const Op& op, const Rule& rule) {
        release();
        previous = &op;
        if (pass.cotangent().defined()) {
            const at::Tensor adjoint = pass.cotangent().select(0, 0);
            state.set_adjoint(op.output, adjoint.numel() <= kWrittenOut ? adjoint.contiguous() : adjoint);
        }
        rule.finish_backward(state);
    });
    release();
}

// tdz_n = N dz_n <dz_n, tz_n> at the cut
static void seed_covariance(const State& state, Pass& pass, int64_t batch_examples, double examples) {
    const int64_t K = pass.K();
    const at::Tensor inner = cut_inner_products(state, pass, batch_examples) * examples;
    for (int id : state.program().cut())
        if (state.adjoint(id).defined())
            pass.cotangent_of(id) =
                (inner * state.adjoint(id).reshape({1, batch_examples, -1}))
                    .reshape(with_directions(K, state.program().values()[static_cast<size_t>(id)].shape));
}

void product(const State& state, Mode mode, const at::Tensor& V, const at::Tensor& Y, bool accumulate,
             int64_t batch_examples, double examples, Precision precision) {
    const Workspace workspace;
    Pass pass(state, mode, V.size(0), V, Y, accumulate, precision);
    pass.tangent_sweep();
    if (mode == Mode::covariance) seed_covariance(state, pass, batch_examples, examples);
    pass.adjoint_sweep(no_visit);
    pass.finish();
}

void gradient(const State& state, const at::Tensor& y, bool accumulate, double seed) {
    const Workspace workspace;
    Pass pass(state, Mode::gradient, 1, at::Tensor(), y.unsqueeze(0), accumulate);
    pass.cotangent_of(state.program().loss()) = loss_seed(state, seed);
    pass.adjoint_sweep(no_visit);
    pass.finish();
}

}  // namespace flatcore
