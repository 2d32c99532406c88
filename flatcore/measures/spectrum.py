"""Measures that are one number of the Hessian's spectrum."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from flatcore import functionals
from flatcore import trace as traces
from flatcore.linear import check_positive
from flatcore.measures.derived import check_objective
from flatcore.measures.extremes import extremes
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
    objective: Objective, *, curvature: str = "hessian", tol: float = 1e-3, seed: int = 0
) -> Measure:
    """lambda_max(H) / lambda_min(H): how unlike the steepest and the flattest direction are.

    lambda_min is the least algebraic eigenvalue: the ratio is negative at a saddle, and for the singular Hessians of
    large nets only rounding keeps it finite. Where lambda_min is within its residual of zero the value is inf, with
    stderr nan. ``details``: "lambda_max", "lambda_min". Cost: as two of `lambda_max`, in one run. Invariant to
    rotations of the parameters and to scaling the loss. Not invariant to: scaling neurons or layers.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    A = _operator(objective, curvature)
    found = extremes(A, tol, seed, "BE")
    (low, high), (low_error, high_error) = found.values, found.residuals
    singular = abs(low) <= max(low_error, A.shape[0] * torch.finfo(A.dtype).eps * abs(high))
    value = math.inf if singular else high / low
    stderr = (
        math.nan if singular else abs(value) * math.hypot(high_error / high if high else 0.0, low_error / low)
    )
    return Measure(
        value=value,
        stderr=stderr,
        by_layer=None,
        definition="lambda_max(H) / lambda_min(H)",
        matvecs=found.matvecs,
        name="condition number",
        method="lanczos",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=found.status,
        details={"lambda_max": high, "lambda_min": low},
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
