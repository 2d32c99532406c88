// A few eigenpairs of every diagonal block A[s, s] of a symmetric operator, the Lanczos recurrences of all
// blocks in lock-step: a product with a vector that is zero outside of slice s gives A[s, s] v in that slice,
// so one block of rows advances as many recurrences as it has rows.
//
// Each recurrence is a Lanczos recurrence with full reorthogonalisation (two passes) in its slice: with its
// basis V (m, n), V A_s = T V + beta e_m w, T = V A_s Vᵀ, and a Ritz pair (theta, sᵀ V) has the residual
// beta |s_m|. Row j of the bases of all slices is one row of length P, so that m steps take m P words.
// Where a recurrence ends (beta is rounding), its Krylov space is invariant; a random row orthogonal to it
// starts anew, with beta = 0, until the wanted values hold fewer copies of one than there were starts, since
// one start finds one copy, and the last start had half as many steps again, 3 at least.
// A block that is zero gives rounding instead, which is not symmetric: one no larger than the rounding of the
// largest row A x of all blocks, without symmetry, is taken for zero. A small block that is symmetric stays.
//
// Beyond what range_basis.h asks of a Space:
//     project_twice(W, V)    w -= (w Vᵀ) V, twice; w Vᵀ of both times, and |w|² after them, as Numbers
//     scale(W, factor)
// Where vectors are on a device, the host waits for it once a step, whatever the number of recurrences.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "eigensolver.h"
#include "linear_solve.h"
#include "matrix.h"
#include "operator_error.h"
#include "orthonormalise.h"

namespace flatcore::krylov {

struct SliceOptions {
    int64_t k = 1;
    Which which = Which::LM;
    double tol = 1e-3;  // residuals, relative to the largest |theta| of the block
    int64_t width = 8;  // rows per product
    int64_t steps = 0;  // at most
};

template <class Block>
struct SlicePairs {
    std::vector<double> values;  // the most wanted first
    Block vectors;               // (k, n)
    std::vector<double> residuals;
    double scale = 0.0;
    double rounding = 0.0;  // of products, where the block is no larger, else zero
    int64_t products = 0;
};

template <class Space>
class SliceLanczos {
 public:
    using Block = typename Space::Block;
    using Slice = std::pair<int64_t, int64_t>;  // first, n
    using OnStep = std::function<void(int64_t, int64_t)>;

    SliceLanczos(Space& space, const std::vector<Slice>& slices, const SliceOptions& options)
        : space_(space), options_(options), V_(space.allocate(0)) {
        for (const auto& [first, n] : slices) {
            Recurrence r;
            r.first = first;
            r.n = n;
            r.k = std::min(options.k, n);
            recurrences_.push_back(std::move(r));
        }
    }

    std::vector<SlicePairs<Block>> solve(const OnStep& on_step) {
        Block next = space_.random(1);
        std::vector<typename Space::Numbers> squares;
        for (const Recurrence& r : recurrences_)
            squares.push_back(space_.row_dots(part(next, r), part(next, r)));
        const std::vector<Matrix> starts = space_.fetch(squares);
        for (size_t b = 0; b < recurrences_.size(); ++b) {
            const double length = std::sqrt(starts[b](0, 0));
            space_.scale(part(next, recurrences_[b]), length > 0.0 ? 1.0 / length : 0.0);
        }
        for (int64_t step = 0; step < options_.steps; ++step) {
            std::vector<Recurrence*> running;
            for (Recurrence& r : recurrences_)
                if (r.running) running.push_back(&r);
            if (running.empty()) break;
            reserve(step + 1);
            space_.assign(space_.rows(V_, step, 1), next);
            std::vector<typename Space::Numbers> numbers;
            Block images = multiply_slices(next, running, numbers);
            const size_t products = numbers.size();
            for (Recurrence* r : running) {
                ++r->m;
                Block w = part(images, *r);
                for (auto& found : space_.project_twice(w, basis(*r))) numbers.push_back(std::move(found));
            }
            const std::vector<Matrix> found = space_.fetch(numbers);
            for (size_t at = 0; at < running.size(); ++at) {
                note_row(*running[at], found, at);
                advance(*running[at], images, &found[products + 3 * at]);
            }
            next = images;
            on_step(products_, static_cast<int64_t>(recurrences_.size() - running.size()));
        }
        return finish();
    }

 private:
    struct Recurrence {
        int64_t first = 0, n = 0, k = 0, m = 0, starts = 1, started = 0, products = 0, next_check = 0;
        bool running = true;
        double scale = 0.0, beta = 0.0;
        double row = 0.0;      // the largest |A x|
        bool nothing = false;  // but rounding
        Matrix T;
    };

    void reserve(int64_t rows) {
        const int64_t have = space_.count(V_);
        if (rows <= have) return;
        Block larger = space_.allocate(std::min(options_.steps, std::max(rows, have + have / 2 + 8)));
        space_.assign(space_.rows(larger, 0, have), V_);
        V_ = larger;
    }

    Block basis(const Recurrence& r) { return space_.columns(space_.rows(V_, 0, r.m), r.first, r.n); }
    Block part(const Block& row, const Recurrence& r) { return space_.columns(row, r.first, r.n); }

    // Row of all slices -> row of all A_s v_s, `width` slices in a product; the |A x|² of each product.
    Block multiply_slices(const Block& row, const std::vector<Recurrence*>& running,
                          std::vector<typename Space::Numbers>& squares) {
        Block result = space_.zeros(1);
        const auto count = static_cast<int64_t>(running.size());
        for (int64_t at = 0; at < count; at += options_.width) {
            const int64_t rows = std::min(options_.width, count - at);
            Block X = space_.zeros(rows);
            for (int64_t i = 0; i < rows; ++i) {
                const Recurrence& r = *running[static_cast<size_t>(at + i)];
                space_.assign(part(space_.rows(X, i, 1), r), part(row, r));
            }
            const Block Y = space_.apply(X);
            squares.push_back(space_.row_dots(Y, Y));
            products_ += rows;
            for (int64_t i = 0; i < rows; ++i) {
                Recurrence& r = *running[static_cast<size_t>(at + i)];
                ++r.products;
                space_.assign(part(result, r), part(space_.rows(Y, i, 1), r));
            }
        }
        return result;
    }

    // From what multiply_slices left, of the recurrence in place `at`.
    void note_row(Recurrence& r, const std::vector<Matrix>& squares, size_t at) {
        const auto width = static_cast<size_t>(options_.width);
        const double length = std::sqrt(squares[at / width](0, static_cast<int64_t>(at % width)));
        if (!std::isfinite(length)) return;
        r.row = std::max(r.row, length);
        largest_row_ = std::max(largest_row_, length);
    }

    // One step of one recurrence: its slice of `images`, projected already, becomes the next unit vector.
    // found: what project_twice found.
    void advance(Recurrence& r, Block& images, const Matrix* found) {
        Block w = part(images, r);
        const Matrix &h = found[0], &again = found[1];
        if (!all_finite(h)) throw OperatorError(kNotFinite);
        const double before = r.beta;
        r.scale = std::max({r.scale, std::abs(h(0, r.m - 1)), before});
        if (r.m > 1 && !r.nothing) {
            const double difference = std::abs(h(0, r.m - 2) - before);
            const double allowed = std::sqrt(space_.epsilon()) * r.scale;
            r.nothing = difference > allowed && r.scale <= rounding(largest_row_);
            if (!r.nothing) check_symmetric(h(0, r.m - 2), before, allowed + 8.0 * rounding(r.row));
        }
        r.T = padded(r.T, r.m, r.m);
        r.T(r.m - 1, r.m - 1) = h(0, r.m - 1) + again(0, r.m - 1);
        if (r.m > 1) r.T(r.m - 2, r.m - 1) = r.T(r.m - 1, r.m - 2) = before;
        double length = std::sqrt(found[2](0, 0));
        r.beta = length;
        r.scale = std::max(r.scale, r.beta);
        const bool ended = r.nothing || r.beta <= 8.0 * space_.epsilon() * r.scale || r.m == r.n;
        if (ended) r.beta = 0.0;
        if (r.m >= r.k && (ended || r.m >= r.next_check)) {
            r.next_check = r.m + 1 + r.m / 8;
            r.running = r.m < r.n && !converged(r, ended);
        }
        if (!r.running) return;
        if (ended) {
            ++r.starts;
            r.started = r.m;
            space_.assign(w, part(space_.random(1), r));
            length = std::sqrt(space_.fetch({space_.project_twice(w, basis(r)).back()})[0](0, 0));
        }
        space_.scale(w, length > 0.0 ? 1.0 / length : 0.0);
    }

    double rounding(double row) const { return 8.0 * space_.epsilon() * row; }

    bool converged(const Recurrence& r, bool ended) {
        const Spectral ritz = space_.eigh(r.T);
        double size = 0.0;
        for (const double theta : ritz.values) size = std::max(size, std::abs(theta));
        const std::vector<int64_t> order = by_preference(ritz.values, options_.which);
        std::vector<double> wanted;
        for (int64_t i = 0; i < r.k; ++i) {
            const int64_t at = order[static_cast<size_t>(i)];
            if (r.beta * std::abs(ritz.vectors(r.m - 1, at)) > options_.tol * size) return false;
            wanted.push_back(ritz.values[static_cast<size_t>(at)]);
        }
        if (r.starts == 1 && !ended) return true;
        if (!ended && r.m - r.started < std::max<int64_t>(3, r.started / 2)) return false;
        std::sort(wanted.begin(), wanted.end());
        int64_t most = 0, run = 0;
        for (size_t i = 0; i < wanted.size(); ++i) {
            run = i > 0 && wanted[i] - wanted[i - 1] <= options_.tol * size ? run + 1 : 1;
            most = std::max(most, run);
        }
        return most < r.starts;
    }

    std::vector<SlicePairs<Block>> finish() {
        std::vector<SlicePairs<Block>> results;
        for (const Recurrence& r : recurrences_) {
            const Spectral ritz = space_.eigh(r.T);
            std::vector<int64_t> order = by_preference(ritz.values, options_.which);
            order.resize(static_cast<size_t>(std::min(r.k, r.m)));
            SlicePairs<Block> pairs;
            for (const int64_t i : order) pairs.values.push_back(ritz.values[static_cast<size_t>(i)]);
            for (const double theta : ritz.values) pairs.scale = std::max(pairs.scale, std::abs(theta));
            if (r.nothing) {
                pairs.scale = 0.0;
                pairs.values.assign(pairs.values.size(), 0.0);
            }
            pairs.vectors = space_.combine(transpose(columns(ritz.vectors, order)), basis(r));
            results.push_back(std::move(pairs));
        }
        // The residuals, from products of their own: the i-th pairs of all slices ride together.
        for (int64_t i = 0; i < options_.k; ++i) {
            Block row = space_.zeros(1);
            std::vector<Recurrence*> with;
            std::vector<size_t> which;
            for (size_t b = 0; b < recurrences_.size(); ++b) {
                if (i >= static_cast<int64_t>(results[b].values.size())) continue;
                space_.assign(part(row, recurrences_[b]), space_.rows(results[b].vectors, i, 1));
                with.push_back(&recurrences_[b]);
                which.push_back(b);
            }
            std::vector<typename Space::Numbers> squares;
            Block images = multiply_slices(row, with, squares);
            const size_t products = squares.size();
            for (size_t j = 0; j < with.size(); ++j) {
                const SlicePairs<Block>& pairs = results[which[j]];
                Block residual = part(images, *with[j]);
                space_.update(residual, scaled_identity(1, pairs.values[static_cast<size_t>(i)]),
                              part(row, *with[j]));
                squares.push_back(space_.row_dots(residual, residual));
            }
            const std::vector<Matrix> found = space_.fetch(squares);
            for (size_t j = 0; j < with.size(); ++j) {
                note_row(*with[j], found, j);
                results[which[j]].residuals.push_back(std::sqrt(found[products + j](0, 0)));
            }
        }
        for (size_t b = 0; b < results.size(); ++b) {
            results[b].products = recurrences_[b].products;
            results[b].rounding = recurrences_[b].nothing ? rounding(largest_row_) : 0.0;
        }
        return results;
    }

    Space& space_;
    SliceOptions options_;
    Block V_;  // (steps, P): row j holds the j-th basis vectors of all slices
    std::vector<Recurrence> recurrences_;
    int64_t products_ = 0;
    double largest_row_ = 0.0;  // |A x| of all products
};

}  // namespace flatcore::krylov
