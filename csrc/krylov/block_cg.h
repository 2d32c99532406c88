// Conjugate gradients for several right-hand sides at once: X (A + damping I) = B, rows, A + damping I
// positive definite.
//
// O'Leary, "The block conjugate gradient algorithm and related methods", Linear Algebra Appl. 29 (1980)
// 293-322, in the form of Dubrulle, "Retooling the method of block conjugate gradients", Electron. Trans.
// Numer. Anal. 12 (2001) 216-233 (BCGrQ): the residuals are kept as
//
//     B - X (A + damping I) = C Q       C (K, r), Q (r, P), Q Qᵀ = I
//
// so that residuals that become dependent, as those of repeated right-hand sides are from the start, do no
// harm: the orthonormalisation reveals the rank r, and the block narrows. With directions S (r, P) and
// T = S (A + damping I), M = S Tᵀ:
//
//     X += C M⁻¹ S,    Q - M⁻¹ T = Z Q',    S' = Q' + Zᵀ S,    C' = C Z
//
// Ledger of one iteration: r products; 10 r² P operations; memory K + 5 r rows. Where vectors are on a
// device, the host waits for it three times.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "linear_solve.h"
#include "matrix.h"
#include "orthonormalise.h"

namespace flatcore::krylov {

enum class SolveStatus { converged, out_of_products, singular };

template <class Block>
struct SolveResult {
    Block X;
    int64_t products = 0;
    int64_t iterations = 0;
    double curvature = 0.0;  // the least <v, (A + damping I) v> / <v, v> met
    SolveStatus status = SolveStatus::out_of_products;
};

template <class Space>
class BlockCG {
 public:
    using Block = typename Space::Block;

    BlockCG(Space& space, double damping) : space_(space), damping_(damping) {}

    // B (K, P), rows of unit length or zero, is overwritten. Until every residual, by the recurrence, is at
    // most tol.
    SolveResult<Block> solve(Block B, double tol, int64_t max_products) {
        SolveResult<Block> result;
        const int64_t K = space_.count(B);
        result.X = space_.zeros(K);
        Matrix C = scaled_identity(K, 1.0);
        Block Q = residual_basis(B, C, 1.0);
        Block S = space_.combine(scaled_identity(space_.count(Q), 1.0), Q);
        bool first = true;
        while (longest_row(C) > tol) {
            const int64_t r = space_.count(Q);
            if (result.products + r > max_products) return result;
            Block T = space_.apply(S);
            result.products += r;
            space_.update(T, scaled_identity(r, -damping_), S);
            const std::vector<Matrix> found = space_.fetch({space_.gram_there(S, T), space_.gram_there(S, S),
                                                            space_.row_dots(S, S), space_.row_dots(T, T)});
            const std::vector<double> lengths = roots(found[3]);
            const Matrix M = symmetric_part(found[0], roots(found[2]), lengths);
            const double curvature = least_curvature(M, found[1], result.iterations + 1);
            result.curvature = first ? curvature : std::min(result.curvature, curvature);
            first = false;
            if (curvature <= kRounding * space_.epsilon() * size_) {
                result.status = SolveStatus::singular;
                return result;
            }
            const Matrix step = inverse(M);
            Matrix along = multiply(C, step);
            for (double& x : along.data) x = -x;
            space_.update(result.X, along, S);
            double longest = 1.0;
            for (int64_t i = 0; i < r; ++i) {
                double sum = 0.0;
                for (int64_t j = 0; j < r; ++j) sum += std::abs(step(i, j)) * lengths[static_cast<size_t>(j)];
                longest = std::max(longest, sum);
            }
            space_.update(Q, step, T);
            Matrix Z = scaled_identity(r, 1.0);
            Q = residual_basis(Q, Z, longest);
            Block next = space_.combine(transpose(Z), S);
            space_.update(next, scaled_identity(space_.count(Q), -1.0), Q);
            S = next;
            C = multiply(C, Z);
            ++result.iterations;
        }
        result.status = SolveStatus::converged;
        return result;
    }

 private:
    static constexpr double kRounding = 32.0;

    // W = Z' Q with orthonormal rows Q, up to rows as short as the rounding of vectors of length `size`;
    // Z becomes Z Z'.
    Block residual_basis(Block W, Matrix& Z, double size) {
        const Orthonormal<Block> once = orthonormalise(space_, W, 8.0 * space_.epsilon() * size);
        const Orthonormal<Block> twice = orthonormalise(space_, once.rows, kLostLength);
        Z = multiply(Z, multiply(once.factor, twice.factor));
        return twice.rows;
    }

    static double longest_row(const Matrix& C) {
        const Matrix t = transpose(C);
        double longest = 0.0;
        for (int64_t i = 0; i < t.cols; ++i) longest = std::max(longest, column_norm(t, i));
        return longest;
    }

    static std::vector<double> roots(const Matrix& squares) {
        std::vector<double> result = squares.data;
        for (double& x : result) x = std::sqrt(x);
        return result;
    }

    // s and t: the lengths of the rows of S and T.
    Matrix symmetric_part(Matrix M, const std::vector<double>& s, const std::vector<double>& t) {
        if (!all_finite(M)) throw OperatorError(kNotFinite);
        for (size_t i = 0; i < s.size(); ++i) size_ = std::max(size_, t[i] / s[i]);
        for (int64_t i = 0; i < M.rows; ++i)
            for (int64_t j = 0; j < i; ++j) {
                const double scale = size_ * s[static_cast<size_t>(i)] * s[static_cast<size_t>(j)];
                if (std::abs(M(i, j) - M(j, i)) > std::sqrt(space_.epsilon()) * scale)
                    throw OperatorError("A is not symmetric, or two products with it differ: <u, A v> = " +
                                        text(M(i, j)) + " but <A u, v> = " + text(M(j, i)) +
                                        "; give a symmetric operator, e.g. (A + A.T) / 2.");
                M(i, j) = M(j, i) = 0.5 * (M(i, j) + M(j, i));
            }
        return M;
    }

    // The least quotient of M and G = S Sᵀ over directions that G resolves.
    double least_curvature(const Matrix& M, const Matrix& G, int64_t step) {
        const Spectral lengths = space_.eigh(G);
        const double longest = lengths.values.back();
        std::vector<int64_t> kept;
        for (size_t i = 0; i < lengths.values.size(); ++i)
            if (lengths.values[i] > 1e-8 * longest) kept.push_back(static_cast<int64_t>(i));
        Matrix U = columns(lengths.vectors, kept);
        for (int64_t j = 0; j < U.cols; ++j) {
            const double scale =
                1.0 / std::sqrt(lengths.values[static_cast<size_t>(kept[static_cast<size_t>(j)])]);
            for (int64_t i = 0; i < U.rows; ++i) U(i, j) *= scale;
        }
        const double least = space_.eigh(multiply(transpose(U), multiply(M, U))).values.front();
        if (least < -kRounding * space_.epsilon() * size_)
            throw OperatorError(
                "A + damping I is not positive definite, which conjugate gradients need: step " +
                std::to_string(step) + " met a direction v with <v, (A + damping I) v> / <v, v> = " +
                text(least) + "; raise damping from " + text(damping_) + " by more than " + text(-least) +
                ", or take a positive semidefinite operator.");
        return least;
    }

    static std::string text(double value) {
        std::ostringstream stream;
        stream.precision(6);
        stream << value;
        return stream.str();
    }

    Space& space_;
    double damping_;
    double size_ = 0.0;  // largest |v (A + damping I)| / |v| seen
};

}  // namespace flatcore::krylov
