#include "estimator_space.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../kernels/probes.h"

namespace flatcore {
namespace {

constexpr int64_t kPiece = int64_t{1} << 14;  // columns summed in the vectors' own precision

}  // namespace

EstimatorSpace::EstimatorSpace(Apply apply, const at::Tensor& like, int64_t P, uint64_t seed)
    : TensorSpace(std::move(apply), P, like.options(), seed), probe_seed_(seed) {}

std::vector<double> EstimatorSpace::row_dots(const Block& X, const Block& Y) const {
    const int64_t P = X.size(1);
    at::Tensor sum = at::zeros({X.size(0)}, X.options().dtype(at::kDouble));
    for (int64_t first = 0; first < P; first += kPiece) {
        const int64_t n = std::min(kPiece, P - first);
        sum += (X.narrow(1, first, n) * Y.narrow(1, first, n)).sum(1, false, at::kDouble);
    }
    return to_matrix(sum.unsqueeze(0)).data;
}

std::vector<double> EstimatorSpace::norms(const Block& X) const {
    std::vector<double> lengths = row_dots(X, X);
    for (double& x : lengths) x = std::sqrt(x);
    return lengths;
}

at::Tensor EstimatorSpace::column_dots(const Block& X, const Block& Y) const {
    return (X * Y).sum(0, false, at::kDouble);
}

at::Tensor EstimatorSpace::signs(int64_t first, int64_t n) const {
    const Block like = allocate(0);
    at::Tensor host = at::empty({n, dimension()}, like.options().device(at::kCPU));
    if (host.scalar_type() == at::kFloat)
        rademacher_rows(probe_seed_, first, n, dimension(), host.mutable_data_ptr<float>());
    else
        rademacher_rows(probe_seed_, first, n, dimension(), host.mutable_data_ptr<double>());
    return host.to(like.options());
}

double EstimatorSpace::put_moments(at::Tensor& mean, at::Tensor& squares, int64_t first,
                                   const at::Tensor& base, const Block& S, const Block& U, const Block& V,
                                   const Block& R) const {
    const at::Tensor estimates = S.to(at::kDouble) * U + V.to(at::kDouble) * R + base;
    const at::Tensor centre = estimates.mean(0);
    const at::Tensor spread = (estimates - centre).square().sum(0);
    mean.narrow(0, first, base.size(0)).copy_(centre);
    squares.narrow(0, first, base.size(0)).copy_(spread);
    return spread.sum().item<double>();
}

at::Tensor EstimatorSpace::differences(const Block& S, const Block& E, const Block& V,
                                       const krylov::PairTerms& pairs) const {
    const at::Tensor c = to_tensor(pairs.coefficients).to(at::kDouble);
    const auto column = [&c](int64_t i) { return c.narrow(1, i, 1); };
    const at::Tensor tau = column(0) * S.roll(-pairs.shift, 0) + column(1) * S;
    const at::Tensor f = column(0) * E.roll(-pairs.shift, 0) + column(1) * E + column(2) * S;
    return tau * (2 * f + column(3) * tau) - V * (column(4) * tau + column(5) * f);
}

double EstimatorSpace::common(const Block& S, const Block& E, const Block& V, const krylov::PairTerms& there,
                              const krylov::PairTerms& back) const {
    const at::Tensor d = differences(S, E, V, there), e = differences(S, E, V, back);
    return (d * e.roll(-there.shift, 0)).sum().item<double>();
}

}  // namespace flatcore
