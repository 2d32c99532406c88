#include "estimator_space.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "random_rows.h"
#include "tall_rows.h"

namespace flatcore {
namespace {

// Columns summed in the vectors' own precision, and those whose moments are taken at once: on the CPU what
// stays in the cache.
constexpr int64_t kPiece = int64_t{1} << 14;
constexpr int64_t kMomentsPiece = int64_t{1} << 12;

int64_t columns_at_once(const at::Device& device, int64_t rows, int64_t on_cpu) {
    if (device.is_cpu()) return on_cpu;
    return std::max<int64_t>(1, panel_entries(device) / std::max<int64_t>(rows, 1));
}

}  // namespace

EstimatorSpace::EstimatorSpace(Apply apply, const at::Tensor& like, int64_t P, uint64_t seed)
    : TensorSpace(std::move(apply), P, like.options(), seed), probe_seed_(seed) {}

at::Tensor EstimatorSpace::row_dots(const Block& X, const Block& Y) const {
    const int64_t P = X.size(1), piece = columns_at_once(device(), X.size(0), kPiece);
    at::Tensor sum = at::zeros({X.size(0)}, X.options().dtype(at::kDouble));
    for (int64_t first = 0; first < P; first += piece) {
        const int64_t n = std::min(piece, P - first);
        sum += (X.narrow(1, first, n) * Y.narrow(1, first, n)).sum(1, false, at::kDouble);
    }
    return sum.unsqueeze(0);
}

int64_t EstimatorSpace::piece(int64_t rows) const { return columns_at_once(device(), rows, kMomentsPiece); }

std::vector<at::Tensor> EstimatorSpace::project_twice(const Block& W, const Block& V) const {
    std::vector<Numbers> found;
    for (int pass = 0; pass < 2; ++pass) {
        found.push_back(gram_there(W, V));
        update(W, found.back(), V);
    }
    found.push_back(row_dots(W, W));
    return found;
}

std::vector<double> EstimatorSpace::norms(const Block& X) const {
    std::vector<double> lengths = to_matrix(row_dots(X, X)).data;
    for (double& x : lengths) x = std::sqrt(x);
    return lengths;
}

at::Tensor EstimatorSpace::column_dots(const Block& X, const Block& Y) const {
    return (X * Y).sum(0, false, at::kDouble);
}

at::Tensor EstimatorSpace::signs(int64_t first, int64_t n) const {
    return sign_rows(probe_seed_, first, n, dimension(), allocate(0).options());
}

at::Tensor EstimatorSpace::put_moments(at::Tensor& mean, at::Tensor& squares, int64_t first,
                                       const at::Tensor& base, const Block& S, const Block& U, const Block& V,
                                       const Block& R) const {
    const at::Tensor estimates = S.to(at::kDouble) * U + V.to(at::kDouble) * R + base;
    const at::Tensor centre = estimates.mean(0);
    const at::Tensor spread = (estimates - centre).square().sum(0);
    mean.narrow(0, first, base.size(0)).copy_(centre);
    squares.narrow(0, first, base.size(0)).copy_(spread);
    return spread.sum().reshape({1, 1});
}

at::Tensor EstimatorSpace::differences(const Block& S, const Block& E, const Block& V,
                                       const krylov::PairTerms& pairs) const {
    const at::Tensor c = place(pairs.coefficients).to(at::kDouble);
    const auto column = [&c](int64_t i) { return c.narrow(1, i, 1); };
    const at::Tensor tau = column(0) * S.roll(-pairs.shift, 0) + column(1) * S;
    const at::Tensor f = column(0) * E.roll(-pairs.shift, 0) + column(1) * E + column(2) * S;
    return tau * (2 * f + column(3) * tau) - V * (column(4) * tau + column(5) * f);
}

at::Tensor EstimatorSpace::common(const Block& S, const Block& E, const Block& V,
                                  const krylov::PairTerms& there, const krylov::PairTerms& back) const {
    const at::Tensor d = differences(S, E, V, there), e = differences(S, E, V, back);
    return (d * e.roll(-there.shift, 0)).sum().reshape({1, 1});
}

}  // namespace flatcore
