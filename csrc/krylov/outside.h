// What a block of rows has outside an orthonormal basis, as orthonormal rows.
//
// Two projections, each followed by an orthonormalisation, keep V Vᵀ = I to rounding (Barlow and
// Smoktunowicz, "Reorthogonalized block classical Gram-Schmidt", Numer. Math. 123 (2013) 395-423).
//
// All of it is started before the host has seen any number: the rows of a block are independent almost
// always, and then Cholesky factors of their Gram matrices will do (Cholesky-QR), which the vectors' device
// computes itself. The host gets everything in one fetch, at the end, and judges by the Gram matrices; where
// rows were close to dependent it throws the block away and takes the way of `orthonormalise`, which looks
// first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "matrix.h"
#include "operator_error.h"
#include "orthonormalise.h"

namespace flatcore::krylov {

// W = insideᵀ V + coefficients rows.
template <class Block>
struct Outside {
    Matrix inside;
    Block rows;
    Matrix coefficients;
    bool stored;                 // behind V in the basis, that is
    std::vector<double> errors;  // of the stored rows, if it rounds
};

template <class Space>
class OutsideOfBasis {
 public:
    using Block = typename Space::Block;
    using Basis = typename Space::Basis;
    using Numbers = typename Space::Numbers;

    // V: the first m rows of the basis. `scale`: the largest |x A| seen, |x| = 1, of which W may know more.
    OutsideOfBasis(Space& space, Basis& basis, int64_t m, double& scale)
        : space_(space), basis_(basis), m_(m), scale_(scale) {}

    // W is overwritten.
    Outside<Block> of(Block W) {
        const int64_t room = std::min(space_.dimension(), basis_.capacity()) - m_;
        if (space_.count(W) > room) return by_looking_first(W, basis_.project(W, m_));
        return at_once(std::move(W));
    }

 private:
    Outside<Block> at_once(Block W) {
        const auto once = basis_.project_there(W, m_);
        const auto first = space_.cholesky_rows(W, once.gram);
        const auto twice = basis_.project_there(first.rows, m_);
        const auto second = space_.cholesky_rows(first.rows, twice.gram);
        std::vector<Numbers> numbers{once.inside,  once.gram,  first.factor,
                                     twice.inside, twice.gram, second.factor};
        const bool rounds = basis_.rounding() > 0.0;
        Numbers errors = basis_.put(m_, second.rows);
        if (rounds) numbers.push_back(std::move(errors));
        std::vector<Matrix> found = space_.fetch(numbers);

        Projection seen{std::move(found[0]), std::move(found[1])};
        if (!resolved(seen.gram, shortest(seen.inside))) return by_looking_first(W, std::move(seen));
        Projection again{std::move(found[3]), std::move(found[4])};
        if (!resolved(again.gram, kLostLength))
            return second_pass(std::move(seen.inside), first.rows, found[2], std::move(again));
        add(seen.inside, multiply(again.inside, transpose(found[2])));
        Matrix coefficients = multiply(found[2], found[5]);
        grow_scale(transpose(coefficients));
        return {std::move(seen.inside), second.rows, std::move(coefficients), true,
                rounds ? std::move(found[6].data) : std::vector<double>{}};
    }

    Outside<Block> by_looking_first(Block W, Projection once) {
        const double drop = shortest(once.inside);
        Orthonormal<Block> first = orthonormalise(space_, std::move(W), std::move(once.gram), drop);
        Projection twice = basis_.project(first.rows, m_);
        return second_pass(std::move(once.inside), std::move(first.rows), first.factor, std::move(twice));
    }

    Outside<Block> second_pass(Matrix inside, Block rows, const Matrix& factor, Projection twice) {
        add(inside, multiply(twice.inside, transpose(factor)));
        Orthonormal<Block> second =
            orthonormalise(space_, std::move(rows), std::move(twice.gram), kLostLength);
        Matrix coefficients = multiply(factor, second.factor);
        grow_scale(transpose(coefficients));
        return {std::move(inside), std::move(second.rows), std::move(coefficients), false, {}};
    }

    // What is shorter than the rounding of A Q is no direction. Keeping such a row would be harmless (it acts
    // as a random one), dividing by it unchecked would not.
    double shortest(const Matrix& inside) {
        if (!all_finite(inside)) throw OperatorError(kNotFinite);
        grow_scale(inside);
        return 8.0 * space_.epsilon() * scale_;
    }

    void grow_scale(const Matrix& columns) {
        for (int64_t j = 0; j < columns.cols; ++j) scale_ = std::max(scale_, column_norm(columns, j));
    }

    Space& space_;
    Basis& basis_;
    int64_t m_;
    double& scale_;
};

}  // namespace flatcore::krylov
