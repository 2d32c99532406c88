"""Soft rank: how many directions the curvature determines against a penalty."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatcore import functionals
from flatcore.errors import FlatcoreWarning, warn
from flatcore.measures.extremes import Least, least
from flatcore.measures.kfac import kfac_eigenvalues
from flatcore.measures.result import Measure
from flatcore.measures.weight_decay import checked_damping
from flatcore.objective import Objective
from flatcore.operators import GGN, Hessian, Operator
from flatcore.trace import diagonal as diagonal_of

__all__ = ["MATRICES", "Matrix", "Pole", "check_pole", "curvature_operator", "soft_rank"]

Matrix = Literal["ggn", "hessian"]
MATRICES = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian"}


def soft_rank(
    objective: Objective,
    damping: float | None = None,
    *,
    optimizer: Optimizer | None = None,
    matrix: Matrix = "ggn",
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> Measure:
    """rank_lambda(A) = Tr(A (A + lambda I)^-1) = sum_i lambda_i / (lambda_i + lambda), A the objective's curvature.

    Source: Shoham, Mor-Yosef and Avron, "Flatness After All?", arXiv 2506.17809 (2025). lambda belongs to the penalty
    (lambda/2) |theta|² beside the objective's loss: weight_decay of torch's SGD on the mean loss, exactly.

    damping: lambda. optimizer: takes it from there instead, where weight decay is such a penalty: SGD, Adam and
        others that add it to the gradient. AdamW, groups that differ, and sum losses are refused with the reason.
    matrix: "ggn", for cross-entropies the Fisher matrix, as the source has it; or "hessian", whose least eigenvalue is
        searched for first, by up to 2000 products beside max_matvecs: refused where one lies at or below -lambda,
        beyond the pole, warned of where one is negative, told in ``status`` where the search does not end.
    method: "auto", "exact", "lanczos" (stochastic Lanczos quadrature), "gram" (exact, from the outputs' rows) as in
        `flatcore.soft_rank`; "kfac" from the eigenvalues of Kronecker factors (Martens and Grosse, ICML 2015), an
        approximation of unknown sign, Gauss-Newton only; "diagonal" from the diagonal, never too small for A >= 0:
        x / (x + lambda) is concave, so that rank_lambda(A) <= rank_lambda(blocks of A) <= rank_lambda(diagonal of A).

    ``value`` without unit, between 0 and rank(A) <= min(P, examples * outputs) for A >= 0; ``stderr`` of the
    estimate, 0 where exact, for "kfac" and "diagonal" of the approximation itself. ``details``: ``damping``,
    ``matrix``; of a Hessian ``lowest``, an upper bound of its least eigenvalue, which lies no more than
    ``lowest_error`` below (unless the search's random start was blind to it). ``by_layer`` for "kfac". With the sum
    over n examples as the loss, lambda n gives the same. Invariant to orthogonal maps of the parameters; not, for
    lambda > 0, to rescaling neurons. Cost: that of `flatcore.soft_rank`; outputs backward passes for "kfac".
    """
    began = time.perf_counter()
    A = curvature_operator(objective, matrix)
    damping = checked_damping(objective, damping, optimizer)
    known = (*functionals._PROBES, "kfac", "diagonal")
    if method not in known:
        raise ValueError(f"method: expected one of {', '.join(known)}, got {method!r}")
    details: dict[str, Any] = {"damping": damping, "matrix": matrix}
    matvecs, passes = 0, 0
    by_layer = pole = None
    if matrix == "hessian":
        pole = check_pole(A, damping, "soft_rank", seed)
        matvecs = pole.lowest.matvecs
        details |= pole.details
    status = "converged"
    if method == "kfac":
        if matrix != "ggn":
            raise ValueError(f"method: 'kfac' approximates the Gauss-Newton matrix, got matrix={matrix!r}")
        parts = {path: float((x / (x + damping)).sum()) for path, x in kfac_eigenvalues(objective).items()}
        value, stderr, how, passes = sum(parts.values()), 0.0, "kfac", 1
        by_layer = {
            p: Measure(v, 0.0, None, "of this layer's block", 0, "soft rank") for p, v in parts.items()
        }
    elif method == "diagonal":
        found = diagonal_of(A, rtol=rtol, max_matvecs=max_matvecs, seed=seed)
        value, stderr = _of_diagonal(found.value, found.stderr, damping)
        matvecs += found.matvecs
        how, status = f"diagonal, {found.method}", found.status
    else:
        estimate = _quiet_soft_rank(A, damping, method=method, rtol=rtol, max_matvecs=max_matvecs, seed=seed)
        value, stderr, how, status = estimate.value, estimate.stderr, estimate.method, estimate.status
        matvecs += estimate.matvecs
    if pole and status == "converged" and (status := pole.status) != "converged":
        warn(f"soft_rank: {status}")
    return Measure(
        value=value,
        stderr=stderr,
        by_layer=by_layer,
        definition=f"Tr(A (A + {damping:g} I)^-1), A the {MATRICES[matrix]}",
        matvecs=matvecs,
        name="soft rank",
        passes=passes,
        method=how,
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details=details,
    )


def curvature_operator(objective: Objective, matrix: str) -> Operator:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected a flatcore.Objective, got {type(objective).__name__}")
    if matrix not in ("ggn", "hessian"):
        raise ValueError(f"matrix: expected 'ggn' or 'hessian', got {matrix!r}")
    return GGN(objective) if matrix == "ggn" else Hessian(objective)


@dataclass(frozen=True)
class Pole:
    """What is known of the Hessian's least eigenvalue, beside a pole at -damping that may lie above it."""

    lowest: Least
    damping: float

    @property
    def status(self) -> str:
        low = self.lowest
        if low.lower - low.rounding > -self.damping:
            return "converged"
        return (
            f"whether the Hessian's least eigenvalue, between {low.lower:.3g} and {low.value:.3g}, lies above -damping "
            f"= {-self.damping:.3g} is not known after {low.matvecs} products; raise damping, or take matrix='ggn'"
        )

    @property
    def details(self) -> dict[str, float]:
        return {"lowest": self.lowest.value, "lowest_error": self.lowest.error}


def check_pole(A: Operator, damping: float, what: str, seed: int) -> Pole:
    """The least eigenvalue, to a tenth of its distance from -damping: refused where it is seen to lie at or below,
    warned of where it is seen to be negative."""
    # The value is an upper bound of the least eigenvalue: at or below -damping it settles the matter.
    found = least(A, lambda value: (value + damping) / 10 if value > -damping else math.inf, seed)
    if found.value + found.rounding <= -damping:
        raise ValueError(
            f"damping: expected more than {-found.value:.3g}, as the Hessian has an eigenvalue of {found.value:.3g} or "
            f"below, got {damping:g}: x / (x + damping) has a pole between; raise damping, or take matrix='ggn'"
        )
    if found.value < -found.rounding:
        warn(
            f"{what}: the Hessian has a negative eigenvalue, {found.value:.3g}, so this is no minimum and its terms "
            "are negative; for a measure that is meant for A >= 0 take matrix='ggn'"
        )
    return Pole(found, damping)


def _of_diagonal(values: Any, errors: Any, damping: float) -> tuple[float, float]:
    """The sum, less the bias of second order that noise in the entries gives a concave function, and its error."""
    x, e = torch.as_tensor(values).double().clamp_min(0), torch.as_tensor(errors).double().nan_to_num()
    slope, bend = damping / (x + damping) ** 2, -2 * damping / (x + damping) ** 3
    total: Tensor = (x / (x + damping) - bend * e**2 / 2).sum()
    return float(total), math.sqrt(float((slope * e).square().sum()))


def _quiet_soft_rank(A: Operator, damping: float, **settings: Any) -> Any:
    """`flatcore.soft_rank`, whose own word on negative eigenvalues `check_pole` has said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*negative eigenvalues.*", category=FlatcoreWarning)
        return functionals.soft_rank(A, damping, **settings)
