"""A few eigenpairs of a symmetric operator by thick-restart block Lanczos."""

from __future__ import annotations

import math
import os
import time
import warnings
from typing import Any

import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.errors import FlatcoreWarning
from flatcore.linear import LinearView, as_operator, check_count, check_positive, check_seed
from flatcore.progress import progress_bar
from flatcore.results import Eigenpairs

__all__ = ["eigsh"]

_WHICH = ("LM", "LA", "SA", "BE")
# Of the machine's memory, for the Krylov basis; not of what is free now, so that a run can be repeated
# exactly.
_MEMORY_SHARE = 0.25


def eigsh(
    A: Any,
    k: int = 6,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    block_size: int | None = None,
    max_matvecs: int | None = None,
    v0: torch.Tensor | None = None,
    seed: int = 0,
    return_eigenvectors: bool = True,
    progress: bool = False,
) -> Eigenpairs:
    """k eigenpairs of the symmetric operator A, (P, P), with 1 <= k < P.

    ``which``: "LM" largest in absolute value, in decreasing order of it; "LA" largest, decreasing; "SA"
    smallest, increasing; "BE" from both ends, increasing, the odd one from the upper end. ``tol``: a pair has
    converged when |A v - value v| <= tol times the largest |eigenvalue| found. Eigenvalues far smaller than
    that need a smaller tol; float32 products end near 1e-6. ``block_size``: vectors per product, by default
    min(k + 2, 8). Copies of a multiple eigenvalue beyond the block size are looked for with further random
    vectors, which costs additional products when all copies a block can see are wanted. ``v0``: (P,) or (P,
    j), where to start, e.g. the vectors of an earlier run; the rest of the block is random from ``seed``.
    ``max_matvecs``: products of A with one vector, in all, by default max(1000, 50 k).

    Costs about block_size products a step, and k for the true residuals. Memory: max(64, 4 k + 6 block_size)
    vectors. Not converged in max_matvecs: ``status`` says so, a FlatcoreWarning too, and the residuals tell
    how far it got. Raises ValueError or TypeError for bad arguments, for products that are not finite and for
    an A that is not symmetric. Source: thick restart after Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000)
    602-616, for blocks.
    """
    began = time.perf_counter()
    operator = as_operator(A)
    k = check_count("k", k, 1)
    if k >= operator.P:
        raise ValueError(
            f"k: expected fewer than P = {operator.P} eigenpairs, got {k}; "
            "for the whole spectrum use torch.linalg.eigh on the dense matrix"
        )
    if which not in _WHICH:
        raise ValueError(f"which: expected one of {', '.join(_WHICH)}, got {which!r}")
    tol = check_positive("tol", tol, 1e-3)
    seed = check_seed(seed)
    block = min(k + 2, 8) if block_size is None else check_count("block_size", block_size, 1)
    block = min(block, operator.P)
    least = math.ceil(k / block) * block + k
    max_matvecs = (
        max(1000, 50 * k, least) if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    )
    if max_matvecs < least:
        raise ValueError(
            f"max_matvecs: expected at least {least} for k = {k} in blocks of {block} and their residuals, "
            f"got {max_matvecs}; allow more products or take a smaller block_size"
        )
    start = _start_rows(v0, operator, block)

    with full_precision(), progress_bar("eigsh", total=max_matvecs, enabled=progress) as bar:
        found = _C.krylov.solve(
            operator.apply,
            start,
            k,
            which,
            tol,
            block,
            _basis_rows(operator, k, block),
            max_matvecs,
            seed,
            lambda products, converged: bar.update(
                products, f"{products} products, {converged} of {k} converged"
            ),
        )
    values = torch.tensor(found["values"], dtype=torch.float64)
    residuals = torch.tensor(found["residuals"], dtype=torch.float64)
    order = torch.argsort(values) if which == "BE" else torch.arange(k)
    converged = residuals <= tol * found["scale"]
    status = _status(found, int(converged.sum()), k, tol, operator.dtype)
    if status != "converged":
        warnings.warn(f"eigsh: {status}", FlatcoreWarning, stacklevel=2)
    return Eigenpairs(
        values=values[order],
        vectors=found["vectors"][order.to(operator.device)].T if return_eigenvectors else None,
        residuals=residuals[order],
        converged=converged[order],
        matvecs=found["products"],
        seconds=time.perf_counter() - began,
        seed=seed,
        status=status,
        which=which,
        tol=tol,
        scale=found["scale"],
        block_size=block,
        restarts=found["restarts"],
    )


def _start_rows(v0: torch.Tensor | None, operator: LinearView, block: int) -> torch.Tensor:
    """v0 as rows (j, P), j = 0 for none; never v0's own memory."""
    if v0 is None:
        return torch.empty(0, operator.P, dtype=operator.dtype, device=operator.device)
    try:
        rows = torch.as_tensor(v0).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"v0: expected a torch.Tensor, got {type(v0).__name__}") from error
    rows = rows[None] if rows.ndim == 1 else rows.T
    if rows.ndim != 2 or rows.shape[1] != operator.P or not 1 <= rows.shape[0] <= block:
        raise ValueError(
            f"v0: expected shape ({operator.P},) or ({operator.P}, j) with 1 <= j <= block_size = {block}, "
            f"got {tuple(torch.as_tensor(v0).shape)}"
        )
    if not torch.is_floating_point(rows):
        raise TypeError(
            f"v0: expected a floating-point tensor, got {rows.dtype}; convert it, e.g. v0.float()"
        )
    if not torch.isfinite(rows).all():
        raise ValueError(
            "v0: expected finite entries, got nan or inf; leave it out to start from a random vector"
        )
    rows = rows.to(dtype=operator.dtype, device=operator.device)
    # Lengths do not matter to the subspace, but lengths of 1e-30 would have squares of 0.
    return (rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)).contiguous()


def _basis_rows(operator: LinearView, k: int, block: int) -> int:
    """Rows of the Krylov basis before it restarts: enough to converge fast, within a share of the memory."""
    comfortable = max(64, 4 * k + 6 * block)
    least = k + 4 * block
    if operator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(operator.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affordable = int(_MEMORY_SHARE * memory) // (operator.P * operator.dtype.itemsize)
    return min(operator.P, max(least, min(comfortable, affordable)))


def _status(found: dict[str, Any], converged: int, k: int, tol: float, dtype: torch.dtype) -> str:
    if found["status"] == "out_of_products" and converged < k:
        return (
            f"{converged} of {k} pairs have a residual below tol = {tol:g} times {found['scale']:.3g} after "
            f"{found['products']} products; raise max_matvecs or tol"
        )
    if converged < k:
        return (
            f"{k - converged} of {k} residuals stay above tol = {tol:g} times {found['scale']:.3g}, "
            f"the rounding of {str(dtype).removeprefix('torch.')} products; raise tol or use float64"
        )
    if found["status"] != "converged":
        return (
            "the pairs found have converged, but whether one of the values has further copies "
            "was not settled; raise max_matvecs or block_size"
        )
    return "converged"
