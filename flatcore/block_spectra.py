"""Eigenpairs of the diagonal blocks of all parameters, by Lanczos recurrences in lock-step."""

from __future__ import annotations

import time
from typing import Any

import torch

from flatcore import _C
from flatcore.environment import full_precision
from flatcore.errors import warn
from flatcore.linear import as_full_operator, check_count, check_positive, check_seed
from flatcore.progress import progress_bar
from flatcore.results import BlockSpectra, Eigenpairs
from flatcore.sampling import Products
from flatcore.solve import check_symmetric

__all__ = ["block_spectra"]

_WHICH = ("LM", "LA", "SA", "BE")


def block_spectra(
    A: Any,
    k: int = 1,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    block_size: int = 8,
    max_steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> BlockSpectra:
    """k eigenpairs of the diagonal block of every parameter of A, (P, P), all of them for a smaller block.

    A needs ``parameter_slices`` (name -> slice), as flatcore's operators have. A vector that is zero outside
    of a parameter sees that parameter's block alone, and ``block_size`` such vectors ride in one product.
    ``which`` and ``tol`` as in ``eigsh``, the tolerance relative to each block's own largest |eigenvalue|.
    Further copies of an eigenvalue within a block are found where its recurrence ends, as in blocks of low
    rank; copies in a block of many different eigenvalues may be missed: for one such block use ``eigsh``.
    A block that is rounding alone, such as that of the keys' bias in attention, counts as zero, and so converged: no
    larger than 8 eps |A x| for the largest row A x of all blocks, and not symmetric.

    Costs one product a step and block that has not converged, and k a block for the true residuals. Memory:
    steps + 3 block_size vectors, whatever the number of blocks. ``max_steps``: by default max(100, 10 k).
    Not converged by then: ``status`` says so, and a FlatcoreWarning. Raises ValueError or TypeError for bad
    arguments, for products that are not finite and for an A that is not symmetric.
    """
    began = time.perf_counter()
    operator = as_full_operator(A)
    slices = {n: s for n, s in (operator.parameter_slices or {}).items() if s.stop > s.start}
    if not slices:
        raise ValueError(
            f"A: expected an operator with parameter_slices (name -> slice), got {type(A).__name__} without; "
            "give e.g. fc.Hessian(objective)"
        )
    k, width = check_count("k", k, 1), check_count("block_size", block_size, 1)
    if which not in _WHICH:
        raise ValueError(f"which: expected one of {', '.join(_WHICH)}, got {which!r}")
    tol, seed = check_positive("tol", tol, 1e-3), check_seed(seed)
    steps = max(100, 10 * k) if max_steps is None else check_count("max_steps", max_steps, 1)
    largest = max(s.stop - s.start for s in slices.values())
    if steps < min(k, largest):
        raise ValueError(
            f"max_steps: expected at least k = {k}, got {steps}; allow more steps or ask for fewer pairs"
        )

    products = Products(operator)
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    with full_precision(), progress_bar("block_spectra", total=len(slices), enabled=progress) as bar:
        check_symmetric(products)
        found = _C.solvers.slice_pairs(
            products,
            like,
            operator.P,
            [(s.start, s.stop - s.start) for s in slices.values()],
            k,
            which,
            tol,
            width,
            min(steps, largest),
            seed,
            lambda used, done: bar.update(done, f"{used} products, {done} of {len(slices)} blocks done"),
        )
    seconds = time.perf_counter() - began
    pairs = {
        name: _eigenpairs(one, which, tol, seconds, seed) for name, one in zip(slices, found, strict=True)
    }
    missing = [name for name, one in pairs.items() if one.status != "converged"]
    status = "converged"
    if missing:
        shown = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        status = (
            f"{len(missing)} of {len(slices)} blocks have residuals above tol = {tol:g} after "
            f"{products.used} products: {shown}; raise max_steps or tol"
        )
        warn(f"block_spectra: {status}")
    return BlockSpectra(pairs, products.used, seconds, seed, status)


def _eigenpairs(found: dict[str, Any], which: str, tol: float, seconds: float, seed: int) -> Eigenpairs:
    values = torch.tensor(found["values"], dtype=torch.float64, device="cpu")
    residuals = torch.tensor(found["residuals"], dtype=torch.float64, device="cpu")
    order = torch.argsort(values) if which == "BE" else torch.arange(len(values), device="cpu")
    converged = residuals <= max(tol * found["scale"], found["rounding"])
    missing = int((~converged).sum())
    return Eigenpairs(
        values=values[order],
        vectors=found["vectors"][order.to(found["vectors"].device)].T,
        residuals=residuals[order],
        converged=converged[order],
        matvecs=found["products"],
        seconds=seconds,
        seed=seed,
        status=f"{missing} of {len(values)} residuals are above tol = {tol:g}" if missing else "converged",
        which=which,
        tol=tol,
        scale=found["scale"],
        block_size=1,
        restarts=0,
    )
