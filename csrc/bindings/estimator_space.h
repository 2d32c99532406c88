// The space of the trace estimators: sums over P in float64, pieces of columns, probes of random signs.
#pragma once

#include <utility>
#include <vector>

#include "../krylov/leave_one_out.h"
#include "tensor_space.h"

namespace flatcore {

class EstimatorSpace : public TensorSpace {
 public:
    EstimatorSpace(Apply apply, const at::Tensor& like, int64_t P, uint64_t seed);

    // Summed in float64, as is gram: what the estimators subtract from one another are sums over all P.
    Numbers row_dots(const Block& X, const Block& Y) const;
    std::vector<double> norms(const Block& X) const;
    std::vector<Numbers> project_twice(const Block& W, const Block& V) const;
    void scale(Block X, double factor) const { X.mul_(factor); }
    int64_t piece(int64_t rows) const;
    Block columns(const Block& X, int64_t first, int64_t n) const { return X.narrow(1, first, n); }
    at::Tensor column_dots(const Block& X, const Block& Y) const;
    Block zeros(int64_t p) const { return allocate(p).zero_(); }
    Block signs(int64_t first, int64_t n) const;
    // Returns the sum of the squares.
    Numbers put_moments(at::Tensor& mean, at::Tensor& squares, int64_t first, const at::Tensor& base,
                        const Block& S, const Block& U, const Block& V, const Block& R) const;
    Numbers common(const Block& S, const Block& E, const Block& V, const krylov::PairTerms& there,
                   const krylov::PairTerms& back) const;

 private:
    at::Tensor differences(const Block& S, const Block& E, const Block& V,
                           const krylov::PairTerms& pairs) const;

    uint64_t probe_seed_;
};

}  // namespace flatcore
