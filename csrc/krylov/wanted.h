// Which of some values are wanted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

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

// The values at the first n of the order.
inline std::vector<double> picked(const std::vector<double>& values, const std::vector<int64_t>& order,
                                  int64_t n) {
    std::vector<double> result;
    for (int64_t i = 0; i < n; ++i)
        result.push_back(values[static_cast<size_t>(order[static_cast<size_t>(i)])]);
    return result;
}

// Of the k most wanted values, the largest group of which each is within `near` of the next.
inline int64_t most_copies(const std::vector<double>& values, const std::vector<int64_t>& order, int64_t k,
                           double near) {
    std::vector<double> wanted = picked(values, order, k);
    std::sort(wanted.begin(), wanted.end());
    int64_t most = 0, run = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        run = i > 0 && wanted[i] - wanted[i - 1] <= near ? run + 1 : 1;
        most = std::max(most, run);
    }
    return most;
}

// From a value to the nearest of the wanted ones, as far as the preference goes.
inline double distance(double value, const std::vector<double>& wanted, Which which) {
    auto measure = [which](double x) { return which == Which::LM ? std::abs(x) : x; };
    double least = std::numeric_limits<double>::infinity();
    for (const double x : wanted) least = std::min(least, std::abs(measure(x) - measure(value)));
    return least;
}

}  // namespace flatcore::krylov
