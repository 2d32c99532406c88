"""Measures that are one number of the Hessian's spectrum."""

from __future__ import annotations

import math
import time
from typing import Any

from flatcore import functionals
from flatcore import trace as traces
from flatcore.errors import warn
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.derived import check_objective
from flatcore.measures.extremes import MAX_MATVECS, Least, extremes, least
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.operators import GGN, Hessian
from flatcore.results import Estimate

__all__ = [
    "condition_number",
    "effective_dimension",
    "lambda_max",
    "log_volume",
    "participation_ratio",
    "trace",
]


def _operator(objective: Any, curvature: str) -> Hessian | GGN:
    objective = check_objective(objective)
    if curvature not in ("hessian", "ggn"):
        raise ValueError(f"curvature: expected 'hessian' or 'ggn', got {curvature!r}")
    return Hessian(objective) if curvature == "hessian" else GGN(objective)


def trace(objective: Objective, *, curvature: str = "hessian", **options: Any) -> Measure:
    """Tr H = sum_i lambda_i: twice the mean rise of the loss under noise of variance 1, to second order.

    Hutchinson's and later estimators, or exactly: ``options`` and cost are those of `flatcore.trace`. Of the mean
    loss; n times this for a sum over n examples. Invariant to rotations of the parameters. Not invariant to: scaling
    neurons or layers, the temperature of the logits. Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    return _measure("trace", "Tr H", traces.trace(_operator(objective, curvature), **options))


def lambda_max(
    objective: Objective, *, curvature: str = "hessian", tol: float = 1e-3, seed: int = 0
) -> Measure:
    """lambda_max(H), the largest algebraic eigenvalue: the steepest curvature of the mean loss in any direction.

    Keskar et al., ICLR 2017, and much of the field; power iteration, often used, gives the largest absolute one
    instead. By block Lanczos to a residual of tol * |lambda|, at which stderr, a bound, stands; cost: some 10 to 50
    products. Invariant to rotations of the parameters. Not invariant to: scaling neurons or layers (any value can be
    reached: Dinh et al., ICML 2017), the temperature of the logits. Raises TypeError or ValueError, one sentence, for
    bad arguments.
    """
    began = time.perf_counter()
    found = extremes(_operator(objective, curvature), tol, seed, "LA")
    return Measure(
        value=found.values[0],
        stderr=found.residuals[0],
        by_layer=None,
        definition="lambda_max(H)",
        matvecs=found.matvecs,
        name="lambda_max",
        method="lanczos",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=found.status,
    )


def condition_number(
    objective: Objective,
    *,
    curvature: str = "hessian",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> Measure:
    """lambda_max(H) / lambda_min(H): how unlike the steepest and the flattest direction are.

    lambda_min is the least algebraic eigenvalue: the ratio is negative at a saddle, and for the singular Hessians of
    large nets only rounding keeps it finite. Each end is searched for until its residual is a third of tol times its
    own absolute value; of up to 1000 parameters the whole spectrum is taken where the least eigenvalue is so small that
    this takes more than the first search. stderr is a bound on the error of the ratio, as far as the searches met the
    ends: inf where the interval around lambda_min holds zero. The value is inf, with stderr nan, where lambda_min is
    zero to the rounding of the products. Both, and a stderr above tol of the value, are told in ``status`` and a
    FlatcoreWarning. ``details``: "lambda_max", "lambda_min", "lambda_min_error": lambda_min lies no more than that
    below. ``max_matvecs``: products of the search for it, by default 2000; small least eigenvalues take many. Invariant
    to rotations of the parameters and to scaling the loss. Not invariant to: scaling neurons or layers.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    A = _operator(objective, curvature)
    tol, seed = check_positive("tol", tol, 1e-3), check_seed(seed)
    most = MAX_MATVECS if max_matvecs is None else check_count("max_matvecs", max_matvecs, 8)
    low = least(A, lambda value: tol / 3 * abs(value), seed, most)
    high, high_error, matvecs = _greatest(A, low, tol / 3, seed)
    error = low.error + low.rounding
    value = math.inf if low.zero or not low.value else high / low.value
    stderr = math.nan if math.isinf(value) else _bound(high, high_error, low.value, error)
    status = _told(low, value, stderr, tol)
    if status != "converged":
        warn(f"condition_number: {status}")
    return Measure(
        value=value,
        stderr=stderr,
        by_layer=None,
        definition="lambda_max(H) / lambda_min(H)",
        matvecs=low.matvecs + matvecs,
        name="condition number",
        method="lanczos" if low.greatest is None else "exact",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details={"lambda_max": high, "lambda_min": low.value, "lambda_min_error": error},
    )


def _greatest(A: Hessian | GGN, low: Least, tol: float, seed: int) -> tuple[float, float, int]:
    """The greatest eigenvalue, a bound of its error, and the products it took beside those for the least."""
    if low.greatest is not None:
        return low.greatest, low.rounding, 0
    found = extremes(A, tol, seed, "LA")
    return found.values[0], found.residuals[0] + low.rounding, found.matvecs


def _bound(high: float, high_error: float, low: float, low_error: float) -> float:
    """Of the distance from high / low to any quotient of numbers within their errors."""
    if low_error >= abs(low):
        return math.inf
    return (high_error + abs(high / low) * low_error) / (abs(low) - low_error)


def _told(low: Least, value: float, stderr: float, tol: float) -> str:
    if math.isinf(value):
        return (
            f"the least eigenvalue is zero to the rounding of the products: {low.value:.3g}, which is off by up to "
            f"{low.rounding:.3g}"
        )
    if stderr <= tol * abs(value):
        return "converged"
    interval = f"{low.lower - low.rounding:.3g} and {low.value + low.rounding:.3g}"
    return (
        f"the least eigenvalue is known to lie between {interval} after {low.matvecs} products, which is not enough "
        f"for tol = {tol:g} of the quotient; raise max_matvecs or tol, or use float64"
    )


def effective_dimension(objective: Objective, z: float, *, curvature: str = "ggn", **options: Any) -> Measure:
    """N_eff = sum_i lambda_i / (lambda_i + z): how many parameters the data determine better than a prior does.

    MacKay, Neural Computation 4 (1992); Maddox, Benton and Wilson, arXiv 2003.02139. lambda_i belong to the mean
    loss: z is the prior's precision over the number of examples, or the weight decay of SGD. (Published code takes
    the mean loss and z = examples * weight decay, which belongs to the sum.) The Gauss-Newton matrix by default: a
    negative eigenvalue would count negatively, and infinitely at -z. ``options`` and cost are those of
    `flatcore.effective_dimension`. Invariant to rotations of the parameters; to scaling loss and z together. Not
    invariant to: scaling neurons or layers.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    z = check_positive("z", z, 1e-3)
    found = functionals.effective_dimension(_operator(objective, curvature), z, **options)
    return _measure("effective dimension", f"sum_i lambda_i / (lambda_i + {z:g})", found)


def log_volume(
    objective: Objective, epsilon: float, damping: float, *, curvature: str = "ggn", **options: Any
) -> Measure:
    """log vol{d: dᵀ (H + damping I) d / 2 <= epsilon}: how much room there is below a loss of L + epsilon.

    = (P/2) log(2 epsilon) + log V_P - log det(H + damping I) / 2, V_P the unit ball's volume: Laplace's approximation
    of the volume of a minimum, with damping, positive as H is singular in large nets. ``options`` and cost are those of
    `flatcore.logdet`. Differences between nets of the same P and damping mean something, single values little. In
    natural logarithms. Invariant to rotations of the parameters, and with damping 0 to volume-preserving rescalings.
    Not invariant to: scaling neurons or layers, the temperature of the logits.
    Raises TypeError or ValueError, one sentence, for bad arguments and where H + damping I is not positive definite.
    """
    epsilon = check_positive("epsilon", epsilon, 0.01)
    A = _operator(objective, curvature)
    found = functionals.logdet(A, damping, **options)
    P = A.shape[0]
    room = P / 2 * math.log(2 * epsilon) + P / 2 * math.log(math.pi) - math.lgamma(P / 2 + 1)
    return _measure(
        "log volume",
        f"log vol{{dᵀ (H + {damping:g} I) d / 2 <= {epsilon:g}}}",
        found,
        room - float(found.value) / 2,
        float(found.stderr) / 2,
    )


def participation_ratio(objective: Objective, *, curvature: str = "hessian", **options: Any) -> Measure:
    """(Tr H)² / Tr H²: how many eigenvalues carry the trace, between 1 and the rank for a positive semidefinite H.

    ``options`` and cost are those of `flatcore.participation_ratio`. Invariant to rotations of the parameters and to
    scaling the loss. Not invariant to: scaling neurons or layers. Raises TypeError or ValueError, one sentence, for bad
    arguments.
    """
    found = functionals.participation_ratio(_operator(objective, curvature), **options)
    return _measure("participation ratio", "(Tr H)² / Tr H²", found)


def _measure(
    name: str, definition: str, found: Estimate, value: float | None = None, stderr: float | None = None
) -> Measure:
    return Measure(
        value=float(found.value) if value is None else value,
        stderr=float(found.stderr) if stderr is None else stderr,
        by_layer=None,
        definition=definition,
        matvecs=found.matvecs,
        name=name,
        method=found.method,
        seed=found.seed,
        seconds=found.seconds,
        status=found.status,
    )
