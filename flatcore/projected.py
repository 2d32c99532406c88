"""Trace estimates that take a low-rank part of the operator exactly and sample the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatcore import _C
from flatcore.linear import LinearView
from flatcore.results import Eigenpairs
from flatcore.sampling import BLOCK, LEAST_PROBES, Run, hutchinson

__all__ = ["hutch_plus_plus", "known_basis", "leave_one_out", "leave_one_out_of", "remainder"]


def known_basis(pairs: Any, operator: LinearView, budget: int) -> _C.estimators.RangeBasis:
    """The span of the vectors of ``deflate``, their products taken anew: the pairs need not be accurate."""
    vectors = pairs.vectors if isinstance(pairs, Eigenpairs) else pairs
    if vectors is None:
        raise ValueError(
            "deflate: expected Eigenpairs with their vectors, got vectors = None; "
            "call eigsh with return_eigenvectors=True"
        )
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"deflate: expected Eigenpairs or a tensor (P, k), got {type(pairs).__name__}")
    rows = vectors.detach().T if vectors.ndim == 2 else vectors.detach()
    if rows.ndim != 2 or rows.shape[1] != operator.P or not 1 <= len(rows) <= operator.P // 2:
        raise ValueError(
            f"deflate: expected vectors of shape ({operator.P}, k) with 1 <= k <= {operator.P // 2}, "
            f"got {tuple(vectors.shape)}"
        )
    if len(rows) >= budget:
        raise ValueError(
            f"max_matvecs: expected more than the {len(rows)} products of the vectors in deflate, got {budget}; "
            "allow more products or give fewer vectors"
        )
    if not torch.isfinite(rows).all():
        raise ValueError("deflate: expected finite vectors, got nan or inf")
    basis = _basis_of(operator, 0)
    rows = rows.to(dtype=operator.dtype, device=operator.device)
    for first in range(0, len(rows), BLOCK):
        basis.extend(rows[first : first + BLOCK].contiguous())
    return basis


def hutch_plus_plus(run: Run) -> bool:
    """Hutch++: the trace on a sketch of the range exactly, the rest by probes independent of it.

    The sketch grows by blocks as long as the probes that the rest still needs outnumber its rows: at the end
    about a third of the products each go into the sketch, its products, and the probes, as in algorithm 1 of
    Meyer, Musco, Musco and Woodruff (2021). The first probes are used again with each larger sketch, which
    takes no products. Returns whether to change to exact.
    """
    probes = run.products.probes(run.seed, 0, min(LEAST_PROBES, run.left))
    images = _by_blocks(run.operator.apply, probes)
    run.tally.add(images * probes)
    basis = _basis_of(run.operator, run.seed)
    while not run.reached() and run.left >= 2 * BLOCK and run.samples_needed() > max(basis.rows, len(probes)):
        if 2 * (basis.rows + BLOCK) + len(probes) > run.operator.P:
            break
        basis.sketch(BLOCK)
        run.tally = run.new_tally(basis.known_diagonal())
        run.tally.add(_by_blocks(basis.remainder, probes, images) * probes)
    if basis.rows:
        run.operator = remainder(run.operator, basis)
    return hutchinson(run, may_change=True)


def leave_one_out(run: Run) -> bool:
    """XTrace, or XDiag for a diagonal. Returns whether to change to exact: 2 products a probe, less than P."""
    if run.left < 4:  # two probes
        if run.left >= run.operator.P:
            return True
        raise ValueError(
            f"max_matvecs: expected at least 4 for leave-one-out estimates, got {run.left}; allow more, or "
            'take method="hutchinson"'
        )
    estimator = leave_one_out_of(run)
    due = LEAST_PROBES
    while run.left >= 2:
        count = min(BLOCK, run.left // 2)
        if 2 * (estimator.probes + count) > run.operator.P:
            if run.left >= run.operator.P:
                return True
            break
        estimator.extend(run.operator.apply(run.products.probes(run.seed, estimator.probes, count)))
        if estimator.probes >= due:
            run.tally.take(estimator, final=False)
            if run.reached():
                break
            due = estimator.probes + max(BLOCK, estimator.probes // 4)
    if estimator.probes > 1:
        run.tally.take(estimator, final=True)
    return False


def leave_one_out_of(run: Run) -> _C.estimators.LeaveOneOut:
    operator = run.operator
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    slices = [(s.start, s.stop - s.start) for s in (operator.parameter_slices or {}).values()]
    return _C.estimators.LeaveOneOut(operator.apply, like, operator.P, run.seed, slices)


def remainder(
    operator: LinearView, basis: _C.estimators.RangeBasis | _C.estimators.LeaveOneOut
) -> LinearView:
    """(I - Pi) A (I - Pi), Pi the projector on the basis."""

    def product(rows: torch.Tensor) -> torch.Tensor:
        return basis.remainder(rows, operator.apply(rows))

    return LinearView(operator.P, operator.dtype, operator.device, product, operator.parameter_slices)


def _basis_of(operator: LinearView, seed: int) -> _C.estimators.RangeBasis:
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    return _C.estimators.RangeBasis(operator.apply, like, operator.P, seed)


def _by_blocks(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(*part) for part in zip(*(r.split(BLOCK) for r in rows), strict=True)])
