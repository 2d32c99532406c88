// A few eigenpairs of a symmetric operator by thick-restart block Lanczos: when to restart, when to stop.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "block_lanczos.h"
#include "completeness.h"

namespace flatcore::krylov {

template <class Space>
class EigenSolver {
 public:
    using Block = typename Space::Block;
    using Lanczos = BlockLanczos<Space>;

    EigenSolver(Space& space, typename Space::Basis basis, const EigenOptions& options)
        : space_(space), options_(options),
          lanczos_(space, std::move(basis), options.block, options.asymmetry) {}

    // From rows (s, P), s >= 0, of any lengths, overwritten: Rayleigh-Ritz on all of them, then block Lanczos
    // from what their residuals have in common, with random rows beside it.
    void start(Block rows) {
        Block X = orthonormal_rows(space_, std::move(rows));
        if (space_.count(X) == 0) return lanczos_.fill(options_.block);
        search_.warm = true;
        begin(residuals_of(std::move(X)));
    }

    // One block step, preceded by a restart where the basis is full; false when the search is over.
    bool step() {
        const Factorisation& s = lanczos_.state();
        if (result_.status != EigenStatus::running) return false;
        if (!lanczos_.complete()) {
            if (lanczos_.rows_after_step() > capacity()) restart(std::max(s.q, options_.block));
            lanczos_.step();
            look();
        }
        if (!settled()) search_.settled = -1;
        if (lanczos_.complete() || (settled() && !may_miss() && copies_complete()))
            verify(true);
        else if (s.m >= options_.k && s.applications + s.q + options_.k > options_.max_products)
            verify(false);
        return result_.status == EigenStatus::running;
    }

    // The wanted pairs' residuals as the recurrence estimates them.
    std::vector<double> residuals() const {
        std::vector<double> found;
        for (int64_t i = 0; i < options_.k && i < static_cast<int64_t>(order_.size()); ++i)
            found.push_back(ritz_.residual(order_[static_cast<size_t>(i)]));
        return found;
    }

    // The end, or what the basis holds so far.
    EigenResult<Block> result() {
        if (result_.status != EigenStatus::running) return result_;
        EigenResult<Block> found;
        if (order_.empty()) return found;
        found.vectors = wanted_rows();
        found.residuals = residuals();
        for (size_t i = 0; i < found.residuals.size(); ++i)
            found.values.push_back(ritz_.values[static_cast<size_t>(order_[i])]);
        return found;
    }

    Lanczos& lanczos() { return lanczos_; }
    const Search& search() const { return search_; }
    // The basis is in place already.
    void restore(Factorisation state, const Search& search) {
        lanczos_.restore(std::move(state));
        search_ = search;
        look();
    }

 private:
    int64_t capacity() { return lanczos_.storage().capacity(); }
    void look() {
        if (lanczos_.state().m == 0) return;
        ritz_ = lanczos_.ritz();
        for (const double theta : ritz_.values) search_.scale = std::max(search_.scale, std::abs(theta));
        order_ = by_preference(ritz_.values, options_.which);
    }

    bool converged(double residual) const { return residual <= options_.tol * search_.scale; }
    bool settled() const { return all_settled(ritz_, order_, options_.k, options_.tol * search_.scale); }

    // Keeps half of the unwanted Ritz vectors as well, lest the search rediscovers the edge of the wanted
    // part each time; leaves room for three blocks. What has converged ten times over is locked: to the
    // others what is left out then is rounding, next to the tolerance.
    void restart(int64_t block) {
        const int64_t m = lanczos_.state().m, k = options_.k;
        const int64_t most = std::min(m, std::max(k, std::min(k + (m - k) / 2, capacity() - 3 * block)));
        if (std::any_of(order_.begin() + most, order_.end(),
                        [this](int64_t i) { return ritz_.is_locked(i); })) {
            lanczos_.unlock();  // better values have come up since
            look();
        }
        const Kept rows = rows_to_keep(ritz_, order_, most, options_.k, 0.1 * options_.tol * search_.scale);
        search_.tight = search_.tight || most < std::min(m, k + 2 * options_.block);
        lanczos_.restart(ritz_, rows.chosen, rows.locked);
        ++search_.restarts;
        look();
    }

    // As many copies of a wanted value as random rows have been explored leave it open whether there are more
    // (see completeness.h): then fresh rows join the block.
    bool copies_complete() {
        const Factorisation& s = lanczos_.state();
        // Values that agree to the tolerance asked for count as copies.
        const double near = std::max(options_.tol, 16.0 * space_.epsilon()) * search_.scale;
        const int64_t copies = most_copies(ritz_.values, order_, options_.k, near);
        const Exploration rows = exploration(s, search_);
        if (copies < rows.explored) return true;
        if (copies < rows.all) return false;
        int64_t block = s.q + std::max(search_.tight ? 2 : options_.block, copies + 1 - rows.all);
        if (capacity() < space_.dimension()) {
            block = std::min(block, (capacity() - options_.k) / 3);
            if (block <= s.q && copies + 1 < s.q) {
                narrow(copies + 1);
                return false;
            }
            search_.copies_not_checked = block <= s.q;
            if (search_.copies_not_checked) return true;
            if (s.m + 2 * block > capacity()) restart(block);
        }
        lanczos_.fill(block);
        look_anew();
        return false;
    }

    // No room for fresh rows beside the next block, whose directions the converged pairs no longer need.
    void narrow(int64_t width) {
        const double all = std::numeric_limits<double>::infinity();
        const Kept rows = rows_to_keep(ritz_, order_, options_.k, options_.k, all);
        lanczos_.restart(ritz_, rows.chosen, rows.locked);
        lanczos_.drop_next();
        lanczos_.set_width(width);
        lanczos_.fill(width);
        look_anew();
        look();
    }

    void look_anew() {
        search_.looked = false;
        search_.settled = -1;
    }

    // Whether to look on for a better value although all wanted pairs have converged.
    bool may_miss() {
        if (search_.looked || (!search_.warm && search_.restarts == 0)) return false;
        const int64_t steps = lanczos_.state().steps;
        if (search_.settled < 0) search_.settled = steps;
        if (steps - search_.settled >= longest_look(search_)) return false;
        return unknown_is_near(ritz_, order_, options_.k, options_.which, options_.tol * search_.scale);
    }

    Block wanted_rows() {
        const int64_t n = std::min<int64_t>(options_.k, static_cast<int64_t>(order_.size()));
        const Matrix S = columns(ritz_.vectors, {order_.begin(), order_.begin() + n});
        Block X = space_.allocate_pair(0, n);
        lanczos_.storage().combine_into(X, transpose(S), lanczos_.state().m);
        return lanczos_.storage().rounding() > 0.0 ? orthonormal_rows(space_, std::move(X)) : X;
    }

    RitzRows<Block> residuals_of(Block X) {
        auto order = [this](const std::vector<double>& values) {
            return by_preference(values, options_.which);
        };
        auto pairs = rayleigh_ritz(space_, std::move(X), options_.block, options_.asymmetry,
                                   lanczos_.state().scale, order);
        lanczos_.count(space_.count(pairs.rows));
        return pairs;
    }

    // True residuals of the wanted pairs; where they are not what was asked for, the search starts again from
    // these pairs, as long as that gets it anywhere.
    void verify(bool may_go_on) {
        if (!options_.verify) {
            result_ = result();
            result_.status = may_go_on ? EigenStatus::converged : EigenStatus::out_of_products;
            return;
        }
        RitzRows<Block> pairs = residuals_of(wanted_rows());
        const double worst = *std::max_element(pairs.norms.begin(), pairs.norms.end());
        const auto good = std::count_if(pairs.norms.begin(), pairs.norms.end(),
                                        [this](double norm) { return converged(norm); });
        const bool exact = lanczos_.complete() && lanczos_.storage().rounding() == 0.0;
        const bool improved = worst < 0.5 * search_.worst || good > search_.verified;
        const bool affordable =
            lanczos_.state().applications + 2 * options_.k + options_.block <= options_.max_products;
        // Of a shorter residual no direction is left, only rounding.
        const bool rounding = exact || worst <= 8.0 * space_.epsilon() * search_.scale;
        if (good < options_.k && may_go_on && !rounding && improved && affordable) {
            search_.looked = true;
            search_.worst = worst;
            search_.verified = good;
            return begin(std::move(pairs));
        }
        EigenStatus status = EigenStatus::converged;
        if (!may_go_on)
            status = EigenStatus::out_of_products;  // where all have converged, some copies may be missing
        else if (good < options_.k)
            status = rounding || !improved ? EigenStatus::stagnated : EigenStatus::out_of_products;
        else if (search_.copies_not_checked && !exact)
            status = EigenStatus::copies_not_checked;
        result_ = {std::move(pairs.values), std::move(pairs.rows), std::move(pairs.norms), status};
    }

    // From given Ritz rows, of which the wanted ones that have not converged go on as far as there is room.
    void begin(RitzRows<Block> pairs) {
        for (const double theta : pairs.values) search_.scale = std::max(search_.scale, std::abs(theta));
        const bool everything = capacity() >= space_.dimension();
        const auto given = space_.count(pairs.rows);
        const int64_t block = std::max<int64_t>(options_.block, 2);
        const int64_t kept =
            everything ? given : std::min(given, std::max(options_.k, capacity() - 4 * block));
        const int64_t widest = everything ? space_.dimension() - kept : (capacity() - kept) / 3;
        const bool fresh = search_.warm && lanczos_.state().m == 0;
        const int64_t random = fresh ? 2 : 0;
        pairs.values.resize(static_cast<size_t>(kept));
        pairs.norms.resize(static_cast<size_t>(kept));
        pairs.rows = space_.rows(pairs.rows, 0, kept);
        // What is left out of a residual that is hardly small enough, a rotation among the pairs may make too
        // large.
        const double share = fresh ? 1.0 : 0.7;
        std::vector<int64_t> going_on;
        for (int64_t i = 0; i < std::min(kept, options_.k); ++i)
            if (!converged(pairs.norms[static_cast<size_t>(i)] / share) &&
                static_cast<int64_t>(going_on.size()) < std::max<int64_t>(1, widest - random))
                going_on.push_back(i);
        const auto active = static_cast<int64_t>(going_on.size());
        lanczos_.begin(pairs, going_on);
        const int64_t width = active == 0 ? 2 : std::min(widest, fresh ? options_.block : active);
        lanczos_.set_width(width);
        lanczos_.fill(fresh && active > 0 ? std::min(widest, std::max(width, active + random)) : width);
        look();
    }

    Space& space_;
    EigenOptions options_;
    Lanczos lanczos_;
    Search search_;
    Ritz ritz_;
    std::vector<int64_t> order_;
    EigenResult<Block> result_;
};

}  // namespace flatcore::krylov
