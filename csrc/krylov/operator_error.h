// What the methods may find wrong with an operator, each in one sentence for the user.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flatcore::krylov {

struct OperatorError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline constexpr const char* kNotFinite = "A @ V has entries that are not finite (nan or inf) or too large "
                                          "to be squared: check the operator, for a Hessian the "
                                          "loss and the parameters.";

// The test of symmetry costs nothing: the recurrence has both products of two vectors anyway. For v and A v
// it compares tr(A²) with tr(A Aᵀ), so that it notices a missing symmetry whatever the number of rows.
inline void check_symmetric(double uAv, double Auv, double allowed) {
    constexpr double kUnderflow =
        1e-150;  // squares of less have no place in the scale that `allowed` is relative to
    if (!(std::abs(uAv - Auv) > allowed + kUnderflow)) return;
    std::ostringstream text;
    text << "A is not symmetric, two products with it differ, or all of it is rounding: <u, A v> = " << uAv
         << " but <A u, v> = " << Auv
         << " for two unit vectors; give a symmetric operator, e.g. (A + A.T) / 2.";
    throw OperatorError(text.str());
}

}  // namespace flatcore::krylov
