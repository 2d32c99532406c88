// When the wanted pairs of a search are believed to be all there is to find, and what to keep until then.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "factorisation.h"
#include "search.h"

namespace flatcore::krylov {

// Further steps would not help: each of the k wanted pairs has a residual of at most `allowed`, or is as good
// as what was left out lets it be.
inline bool all_settled(const Ritz& ritz, const std::vector<int64_t>& order, int64_t k, double allowed) {
    if (static_cast<int64_t>(order.size()) < k) return false;
    return std::all_of(order.begin(), order.begin() + k, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        return ritz.residual(i) <= allowed || ritz.bounds[at] <= ritz.slack[at];
    });
}

// For a restart: the first `most` of the order that are not locked yet, ahead those of the k wanted ones that
// are to be, with a residual of at most `allowed`.
struct Kept {
    std::vector<int64_t> chosen;
    int64_t locked = 0;
};

inline Kept rows_to_keep(const Ritz& ritz, const std::vector<int64_t>& order, int64_t most, int64_t k,
                         double allowed) {
    Kept rows;
    std::vector<int64_t> others;
    for (int64_t i = 0; i < most; ++i) {
        const int64_t at = order[static_cast<size_t>(i)];
        if (!ritz.is_locked(at)) (i < k && ritz.residual(at) <= allowed ? rows.chosen : others).push_back(at);
    }
    rows.locked = static_cast<int64_t>(rows.chosen.size());
    rows.chosen.insert(rows.chosen.end(), others.begin(), others.end());
    return rows;
}

// The Krylov space of p rows meets an eigenspace in at most p dimensions, so p copies of a wanted value leave
// it open whether there are more. They are believed when they are fewer than the random rows that have been
// explored.
struct Exploration {
    int64_t all = 0;
    int64_t explored = 0;
};

// Random rows are explored at once where the search began with them, since all that has converged came from
// them; others that joined at step s after s / 2 further steps (3 at least), when a missing copy stands out
// as a Ritz value that is not converged. Restarts that keep little forget what the first rows had to say.
inline Exploration exploration(const Factorisation& s, const Search& search) {
    Exploration rows;
    for (const Injection& injection : s.injections) {
        if (search.tight && injection.step == 0) continue;
        int64_t age = std::max<int64_t>(3, injection.step / 2);
        if (search.warm || search.tight)
            age = 3;
        else if (injection.step == 0)
            age = 0;
        rows.all += injection.rows;
        if (s.steps - injection.step >= age) rows.explored += injection.rows;
    }
    return rows;
}

// A better value may be missing although all wanted ones have converged: a warm start can bring them without
// the others, restarts drop the others before they show. The best value that has not converged must be known
// to within half of its distance from the wanted ones.
inline bool unknown_is_near(const Ritz& ritz, const std::vector<int64_t>& order, int64_t k, Which which,
                            double allowed) {
    const auto unknown =
        std::find_if(order.begin() + k, order.end(), [&](int64_t i) { return ritz.residual(i) > allowed; });
    if (unknown == order.end()) return false;
    return 2.0 * ritz.residual(*unknown) >
           distance(ritz.values[static_cast<size_t>(*unknown)], picked(ritz.values, order, k), which);
}

// Inside of a dense part of the spectrum that may take as long as the search itself. So the look has an end,
// in steps: an early one where a full basis has been searched before.
inline int64_t longest_look(const Search& search) { return search.warm || search.tight ? 40 : 6; }

}  // namespace flatcore::krylov
