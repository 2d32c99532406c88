// What a search for eigenpairs is asked for, what it remembers, and what it gives.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "wanted.h"

namespace flatcore::krylov {

struct EigenOptions {
    int64_t k = 1;
    Which which = Which::LM;
    double tol = 1e-3;  // residuals, relative to the largest |theta| seen
    int64_t block = 1;
    int64_t max_products = 0;  // in all, the true residuals' included
    double asymmetry = 0.0;    // how far <u, A v> and <A u, v> may be apart, relative to the same
    bool verify = true;        // by products of their own; else the recurrence is believed
};

enum class EigenStatus { running, converged, out_of_products, copies_not_checked, stagnated };

// What a search remembers besides the factorisation.
struct Search {
    bool warm = false;   // started from given rows
    double scale = 0.0;  // largest |theta| seen
    int64_t restarts = 0;
    double worst = std::numeric_limits<double>::infinity();  // residual when last verified
    int64_t verified = 0;                                    // pairs converged then
    bool copies_not_checked = false;
    bool tight = false;    // a restart kept hardly more than the wanted pairs
    bool looked = false;   // for what the wanted pairs may miss
    int64_t settled = -1;  // since which step all wanted pairs are
};

template <class Block>
struct EigenResult {
    std::vector<double> values;     // (k,), the most wanted first; fewer where the basis has not as many rows
    Block vectors;                  // (k, P)
    std::vector<double> residuals;  // (k,), from products of their own where verified
    EigenStatus status = EigenStatus::running;
};

}  // namespace flatcore::krylov
