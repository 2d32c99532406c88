"""Linear systems with a damped symmetric operator, by block conjugate gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.errors import warn
from flatcore.linear import LinearView, as_full_operator, check_count, check_positive
from flatcore.progress import progress_bar
from flatcore.results import Solution
from flatcore.sampling import Products

__all__ = ["check_symmetric", "solve"]

_ROUNDS = 20  # of solving for the true residual


def solve(
    A: Any,
    b: torch.Tensor,
    *,
    damping: float = 0.0,
    tol: float = 1e-6,
    max_matvecs: int | None = None,
    preconditioner: torch.Tensor | None = None,
    progress: bool = False,
) -> Solution:
    """x with (A + damping I) x = b, for the symmetric operator A, (P, P), with A + damping I positive definite.

    ``b``: (P,) or (P, K); the K systems share their search directions, so that K of them take fewer products
    each than one. ``tol``: |b - (A + damping I) x| <= tol |b| for every column, measured by products of its
    own; where the recurrence is done but this does not hold, it starts anew from the true residual, as long
    as that helps. ``max_matvecs``: products of A with one vector, by default max(1000, 500 K).
    ``preconditioner``: (P,), positive, near the diagonal of A + damping I, e.g. from ``diagonal``.

    Costs about sqrt(condition) iterations of K products. Memory: 6 K vectors. Not converged: ``status`` says
    so, and a FlatcoreWarning. Raises ValueError or TypeError for bad arguments, for products that are not
    finite, for an A that is not symmetric, and for an A + damping I that shows a negative curvature.
    Source: block conjugate gradients in Dubrulle's form, Electron. Trans. Numer. Anal. 12 (2001) 216-233.
    """
    began = time.perf_counter()
    operator = as_full_operator(A)
    rows = _right_hand_sides(b, operator)
    damping = _checked_damping(damping)
    tol = check_positive("tol", tol, 1e-6)
    scale = _checked_preconditioner(preconditioner, operator)
    K = len(rows)
    limit = max(1000, 500 * K) if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    if limit < 2 * K + 2:
        raise ValueError(
            f"max_matvecs: expected at least {2 * K + 2} for K = {K} and the true residuals, got {limit}; "
            "allow more products or fewer columns"
        )

    products = Products(operator)
    sizes = _lengths(rows)
    x, residual = torch.zeros_like(rows), rows.clone()
    errors = (sizes > 0).to(torch.float64)  # relative to |b|
    iterations, curvature, reason = 0, math.inf, ""
    with full_precision(), progress_bar("solve", total=limit, enabled=progress) as bar:
        if bool((sizes > 0).any()):
            check_symmetric(products, damping)
        for _ in range(_ROUNDS):
            open_rows = (errors > tol).nonzero().flatten()
            left = limit - products.used - len(open_rows)
            if not len(open_rows) or left < len(open_rows):
                break
            at = open_rows.to(rows.device)
            correction, found = _correct(products, residual[at], errors[open_rows], damping, tol, scale, left)
            iterations += found["iterations"]
            curvature = min(curvature, found["curvature"]) if found["iterations"] else curvature
            trial = x[at] + correction
            left_over = rows[at] - products(trial) - damping * trial
            now = _lengths(left_over) / sizes[open_rows]
            better = now < errors[open_rows]
            x[at[better.to(at.device)]] = trial[better.to(at.device)]
            residual[at[better.to(at.device)]] = left_over[better.to(at.device)]
            before = float(errors.max())
            errors[open_rows[better]] = now[better]
            bar.update(products.used, f"{products.used} products, residual {float(errors.max()):.2g}")
            reason = found["status"]
            if reason == "singular" or float(errors.max()) > before / 2:
                break

    status = _status(errors, tol, reason, products.used, operator.dtype, damping)
    if status != "converged":
        warn(f"solve: {status}")
    single = b.ndim == 1
    return Solution(
        value=x[0] if single else x.T,
        residuals=float(errors[0]) if single else errors,
        converged=bool(errors[0] <= tol) if single else errors <= tol,
        matvecs=products.used,
        iterations=iterations,
        seconds=time.perf_counter() - began,
        damping=damping,
        tol=tol,
        curvature=curvature,
        status=status,
    )


def _correct(
    products: Products,
    residual: torch.Tensor,
    errors: torch.Tensor,
    damping: float,
    tol: float,
    scale: torch.Tensor | None,
    budget: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A step towards rows of residuals, to half of what tol asks of the farthest one."""
    product: Callable[[torch.Tensor], torch.Tensor] = products
    if scale is not None:
        sides, shift, damping = scale, damping, 0.0
        residual = residual * sides

        def product(rows: torch.Tensor) -> torch.Tensor:
            return sides * (products(sides * rows) + shift * sides * rows)

    lengths = residual.norm(dim=1, keepdim=True)
    target = min(0.5, max(0.5 * float((tol / errors).min()), 1e-15))
    start = (residual / lengths).contiguous()
    found = _C.solvers.conjugate_gradients(product, start, damping, target, budget)
    step = found["X"] * lengths
    return (step if scale is None else step * scale), found


def check_symmetric(products: Products, damping: float = 0.0) -> None:
    """Two products with random signs u and v: <u, A v> = <A u, v>, to half of the digits of |A v + damping v|."""
    probes = products.probes(0, 0, 2)
    images = products(probes).double()
    one, other = float(probes[0].double() @ images[1]), float(probes[1].double() @ images[0])
    size = float((images + damping * probes.double()).norm(dim=1).max())
    if abs(one - other) > torch.finfo(products.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"A: expected a symmetric operator, got <u, A v> = {one:.6g} but <A u, v> = {other:.6g} for two "
            "vectors of random signs; give e.g. (A + A.T) / 2"
        )


def _right_hand_sides(b: Any, operator: LinearView) -> torch.Tensor:
    if not isinstance(b, torch.Tensor):
        raise TypeError(
            f"b: expected a torch.Tensor, got {type(b).__name__}; convert it with torch.as_tensor"
        )
    if b.ndim not in (1, 2) or b.shape[0] != operator.P or b.shape[-1] == 0:
        raise ValueError(
            f"b: expected shape ({operator.P},) or ({operator.P}, K) with K >= 1, got {tuple(b.shape)}"
        )
    if not torch.is_floating_point(b):
        raise TypeError(f"b: expected a floating-point tensor, got {b.dtype}; convert it, e.g. b.float()")
    if not torch.isfinite(b).all():
        raise ValueError("b: expected finite entries, got nan or inf")
    rows = b.detach()[None] if b.ndim == 1 else b.detach().T
    return rows.to(dtype=operator.dtype, device=operator.device).contiguous()


def _checked_damping(damping: Any) -> float:
    try:
        number = float(damping)
    except (TypeError, ValueError):
        raise TypeError(f"damping: expected a number >= 0, got {damping!r}; give e.g. 0.001") from None
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"damping: expected a finite number >= 0, got {number}; give e.g. 0.001")
    return number


def _checked_preconditioner(diagonal: torch.Tensor | None, operator: LinearView) -> torch.Tensor | None:
    """Its inverse square root: the system is scaled by it from both sides."""
    if diagonal is None:
        return None
    if not isinstance(diagonal, torch.Tensor) or diagonal.shape != (operator.P,):
        got = tuple(diagonal.shape) if isinstance(diagonal, torch.Tensor) else type(diagonal).__name__
        raise ValueError(f"preconditioner: expected a tensor of shape ({operator.P},), got {got}")
    values = diagonal.detach().to(dtype=operator.dtype, device=operator.device)
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError(
            "preconditioner: expected positive finite entries, got one that is not; clamp it, e.g. to the damping"
        )
    return values.rsqrt()


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths.cpu()


def _status(
    errors: torch.Tensor, tol: float, reason: str, used: int, dtype: torch.dtype, damping: float
) -> str:
    missing = int((errors > tol).sum())
    if not missing:
        return "converged"
    worst = f"{missing} of {len(errors)} residuals are above tol = {tol:g}, the largest is {float(errors.max()):.3g}"
    name = str(dtype).removeprefix("torch.")
    if reason == "singular":
        return (
            f"{worst}: A + damping I with damping = {damping:g} is singular to the rounding of {name}; "
            "raise damping or use float64"
        )
    if reason == "converged":
        return (
            f"{worst}: the rounding of {name} products allows no less; raise tol or damping, or use float64"
        )
    return f"{worst} after {used} products; raise max_matvecs, tol or damping"
