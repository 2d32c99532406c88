// A few eigenpairs of a symmetric operator by thick-restart block Lanczos: which ones, when to stop, when to
// restart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "block_lanczos.h"

namespace flatcore::krylov {

// largest magnitude; largest; smallest; both ends alternately, the upper first
enum class Which { LM, LA, SA, BE };

// Positions of `ascending` values, the most wanted first.
inline std::vector<int64_t> by_preference(const std::vector<double>& ascending, Which which) {
    const auto n = static_cast<int64_t>(ascending.size());
    std::vector<int64_t> order;
    for (int64_t low = 0, high = n - 1; low <= high;) {
        bool take_high = which == Which::LA;
        if (which == Which::LM)
            take_high = std::abs(ascending[static_cast<size_t>(high)]) >=
                        std::abs(ascending[static_cast<size_t>(low)]);
        if (which == Which::BE) take_high = order.size() % 2 == 0;
        order.push_back(take_high ? high-- : low++);
    }
    return order;
}

struct EigenOptions {
    int64_t k = 1;
    Which which = Which::LM;
    double tol = 1e-3;  // residuals, relative to the largest |theta| seen
    int64_t block = 1;
    int64_t capacity = 0;      // rows of basis and next block together
    int64_t max_products = 0;  // in all, the true residuals' included
};

enum class EigenStatus { converged, out_of_products, copies_not_checked };

template <class Block>
struct EigenResult {
    std::vector<double> values;     // (k,), the most wanted first
    Block vectors;                  // (k, P)
    std::vector<double> residuals;  // (k,), |x A - theta x| from products of their own
    double scale = 0.0;             // largest |theta| seen
    int64_t products = 0;
    int64_t steps = 0;
    int64_t restarts = 0;
    EigenStatus status = EigenStatus::out_of_products;
};

template <class Space>
class EigenSolver {
 public:
    using Block = typename Space::Block;
    using Lanczos = BlockLanczos<Space>;
    // Called after each step with the products used and the wanted pairs converged so far; may throw to stop.
    using OnStep = std::function<void(int64_t, int64_t)>;

    EigenSolver(Space& space, const EigenOptions& options, const Block& start)
        : space_(space), options_(options), lanczos_(space, start, options.block, options.capacity) {}

    EigenResult<Block> solve(const OnStep& on_step) {
        EigenResult<Block> result;
        typename Lanczos::Ritz ritz;
        std::vector<int64_t> order;
        for (;;) {
            if (lanczos_.rows_after_step() > lanczos_.capacity()) {
                restart(ritz, order, std::max(lanczos_.block_rows(), options_.block));
            }
            lanczos_.step();
            ritz = lanczos_.ritz();
            for (const double theta : ritz.values) scale_ = std::max(scale_, std::abs(theta));
            order = by_preference(ritz.values, options_.which);
            const int64_t converged = count_converged(ritz, order);
            on_step(lanczos_.applications(), converged);
            if (lanczos_.complete() || (converged == options_.k && copies_complete(ritz, order))) {
                result.status =
                    copies_not_checked_ ? EigenStatus::copies_not_checked : EigenStatus::converged;
                break;
            }
            const int64_t least_to_finish = lanczos_.block_rows() + options_.k;
            if (lanczos_.basis_rows() >= options_.k &&
                lanczos_.applications() + least_to_finish > options_.max_products) {
                result.status = EigenStatus::out_of_products;
                break;
            }
        }
        order.resize(static_cast<size_t>(options_.k));
        finish(ritz, order, result);
        return result;
    }

 private:
    // Keeps half of the unwanted Ritz vectors as well, lest the search rediscovers the edge of the wanted
    // part each time; leaves room for three blocks.
    void restart(const typename Lanczos::Ritz& ritz, const std::vector<int64_t>& order, int64_t block) {
        const int64_t m = lanczos_.basis_rows(), k = options_.k;
        const int64_t kept =
            std::min(m, std::max(k, std::min(k + (m - k) / 2, lanczos_.capacity() - 3 * block)));
        lanczos_.restart(ritz, {order.begin(), order.begin() + kept});
        ++restarts_;
    }

    int64_t count_converged(const typename Lanczos::Ritz& ritz, const std::vector<int64_t>& order) const {
        int64_t converged = 0;
        for (int64_t i = 0; i < options_.k && i < static_cast<int64_t>(order.size()); ++i)
            converged +=
                ritz.bounds[static_cast<size_t>(order[static_cast<size_t>(i)])] <= options_.tol * scale_;
        return converged;
    }

    // The Krylov space of p rows meets an eigenspace in at most p dimensions, so p copies of a wanted value
    // leave it open whether there are more. They are believed when they are fewer than the random rows that
    // have been explored; else fresh random rows join the block. Rows that joined at step s count after s / 2
    // further steps (3 at least): by then a missing copy stands out as a Ritz value that is not converged.
    bool copies_complete(const typename Lanczos::Ritz& ritz, const std::vector<int64_t>& order) {
        const int64_t copies = most_copies(ritz, order);
        int64_t explored = 0, all = 0;
        for (const auto& injection : lanczos_.injections()) {
            all += injection.rows;
            const int64_t age = lanczos_.steps() - injection.step;
            if (injection.step == 0 || age >= std::max<int64_t>(3, injection.step / 2))
                explored += injection.rows;
        }
        if (copies < explored) return true;
        if (copies < all) return false;
        int64_t block = lanczos_.block_rows() + std::max(options_.block, copies + 1 - all);
        if (lanczos_.capacity() < space_.dimension()) {
            block = std::min(block, (lanczos_.capacity() - options_.k) / 3);
            copies_not_checked_ = block <= lanczos_.block_rows();
            if (copies_not_checked_) return true;
            if (lanczos_.basis_rows() + 2 * block > lanczos_.capacity()) restart(ritz, order, block);
        }
        lanczos_.fill(block);
        return false;
    }

    // Values that agree to the tolerance asked for count as copies.
    int64_t most_copies(const typename Lanczos::Ritz& ritz, const std::vector<int64_t>& order) const {
        std::vector<double> wanted;
        for (int64_t i = 0; i < options_.k; ++i)
            wanted.push_back(ritz.values[static_cast<size_t>(order[static_cast<size_t>(i)])]);
        std::sort(wanted.begin(), wanted.end());
        const double near = std::max(options_.tol, 16.0 * space_.epsilon()) * scale_;
        int64_t most = 0, run = 0;
        for (size_t i = 0; i < wanted.size(); ++i) {
            run = i > 0 && wanted[i] - wanted[i - 1] <= near ? run + 1 : 1;
            most = std::max(most, run);
        }
        return most;
    }

    void finish(const typename Lanczos::Ritz& ritz, const std::vector<int64_t>& wanted,
                EigenResult<Block>& result) {
        const int64_t k = options_.k;
        result.vectors = space_.combine(transpose(columns(ritz.vectors, wanted)), lanczos_.basis());
        for (const int64_t i : wanted) result.values.push_back(ritz.values[static_cast<size_t>(i)]);
        for (int64_t first = 0; first < k; first += options_.block) {
            const int64_t n = std::min(options_.block, k - first);
            Block x = space_.rows(result.vectors, first, n);
            Block residual = space_.apply(x);
            Matrix theta(n, n);
            for (int64_t i = 0; i < n; ++i) theta(i, i) = result.values[static_cast<size_t>(first + i)];
            space_.update(residual, theta, x);
            const Matrix squares = space_.gram(residual, residual);
            for (int64_t i = 0; i < n; ++i) result.residuals.push_back(std::sqrt(squares(i, i)));
        }
        result.scale = scale_;
        result.steps = lanczos_.steps();
        result.restarts = restarts_;
        result.products = lanczos_.applications() + k;
    }

    Space& space_;
    EigenOptions options_;
    Lanczos lanczos_;
    double scale_ = 0.0;
    int64_t restarts_ = 0;
    bool copies_not_checked_ = false;
};

}  // namespace flatcore::krylov
