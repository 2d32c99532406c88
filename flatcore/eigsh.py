"""A few eigenpairs of a symmetric operator by thick-restart block Lanczos."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from flatcore import _C
from flatcore.block_choice import DEFAULT_BLOCK, measured_block
from flatcore.environment import full_precision
from flatcore.errors import warn
from flatcore.krylov_basis import Basis, allocate_basis, checked_storage
from flatcore.krylov_checkpoint import Checkpoint
from flatcore.linear import LinearView, as_operator, check_count, check_positive, check_seed
from flatcore.progress import Bar, progress_bar
from flatcore.results import Eigenpairs
from flatcore.warm_start import draft_rows, start_rows

__all__ = ["eigsh"]

_WHICH = ("LM", "LA", "SA", "BE")


def eigsh(
    A: Any,
    k: int = 6,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    block_size: int | str | None = None,
    max_matvecs: int | None = None,
    v0: torch.Tensor | Eigenpairs | None = None,
    draft: Any = None,
    memory: int | None = None,
    storage: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    return_eigenvectors: bool = True,
    progress: bool = False,
) -> Eigenpairs:
    """k eigenpairs of the symmetric operator A, (P, P), with 1 <= k < P.

    ``which``: "LM" largest in absolute value, in decreasing order of it; "LA" largest, decreasing; "SA"
    smallest, increasing; "BE" from both ends, increasing, the odd one from the upper end. ``tol``: a pair has
    converged when |A v - value v| <= tol times the largest |eigenvalue| found. Eigenvalues far smaller than
    that need a smaller tol; float32 products end near 1e-6. ``block_size``: vectors per product, by default
    2; "measured": the quickest by a few timed products, which another run may choose differently, with
    other last digits (the result's ``block_size`` repeats it). Copies of a multiple eigenvalue beyond the block size
    are looked for with further random vectors, which costs additional products when all copies a block can see are
    wanted.
    ``max_matvecs``: products of A with one vector, in all, by default max(1000, 50 k).

    ``v0``: where to start: (P,), (P, j) or earlier ``Eigenpairs``. One product for each, then the search goes on
    from the residuals of those that have not converged, with two random vectors beside them to look for what the
    start misses. From its own answer that is 2 k products and, where the wanted values stand apart, 6 to 24 for the
    look. ``draft``: an operator of A's shape, cheaper and less exact (fewer data, lower precision). It is searched
    first, for the same tol by its own measure, and its pairs are where A starts. It decides how many products of A
    are needed, not what comes out.

    ``memory``: bytes on A's device for the basis and for what a step works on, a quarter of the machine's by
    default; a product's own memory comes on top. ``storage`` of the basis: "full" (A's dtype); "float16" or "bf16"
    (the wanted pairs in full precision all the same; where the rounding hides a residual, the search starts again
    from its pairs); "host" (pinned memory, for A on another device); "file" (in TMPDIR, gone with the process). By
    default the first of full, host, float16 and file that has room. ``checkpoint``: a file that is written about
    every minute. Where it exists, the search goes on from it, at the cost of one product, to the same bits; on
    convergence it is removed. Arguments must be the same but for ``max_matvecs``, and so must A.

    Costs about block_size products a step, and k for the true residuals. Memory: max(64, 4 k + 6 block_size)
    vectors for the basis, 2 k + 4 block_size besides; a file takes the basis and the 2 k. Not converged in
    max_matvecs: ``status`` says so, a FlatcoreWarning too, and the residuals tell how far it got. Ctrl-C: the pairs
    found so far with the recurrence's estimates for residuals, fewer than k where fewer exist, ``status``
    "interrupted ..." and a FlatcoreWarning; with none at all, KeyboardInterrupt. Raises ValueError or TypeError for
    bad arguments, for products that are not finite and for an A that is not symmetric. Source: thick restart after
    Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602-616, for blocks.
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
    block, timed = _block(block_size, operator, k, seed)
    memory = None if memory is None else check_count("memory", memory, 1)
    storage = checked_storage(storage, operator, tol)
    start = start_rows(v0, operator)
    given = len(start) if draft is None else k
    most, least = _most_products(max_matvecs, k, block, given)
    search = _Search(k, which, tol, block, max(most - timed, least), seed)
    saved = None
    if checkpoint is not None:
        identity = search.identity(operator, start, draft is not None)
        saved = Checkpoint(checkpoint, identity)

    with full_precision(), progress_bar("eigsh", total=most, enabled=progress) as bar:
        drafted = 0
        if draft is not None and not (saved and saved.path.exists()):
            start, drafted = draft_rows(
                draft, operator, lambda view: search.draft(view, start, memory, storage, bar)
            )
        basis = allocate_basis(operator, k, block, given, tol, memory, storage)
        if saved:
            saved.identity.update(storage=basis.storage, basis_rows=basis.rows)
        found = search.run(operator, basis, start, saved, drafted, bar)
    status = _status(found, k, tol, operator.dtype)
    if status != "converged":
        warn(f"eigsh: {status}")
    values = torch.tensor(found["values"], dtype=torch.float64, device="cpu")
    residuals = torch.tensor(found["residuals"], dtype=torch.float64, device="cpu")
    vectors = found["vectors"]
    order = torch.arange(len(values), device="cpu")
    if which == "BE":
        order = torch.argsort(values)
        vectors = vectors[order.to(operator.device)]
    return Eigenpairs(
        values=values[order],
        vectors=vectors.T if return_eigenvectors else None,
        residuals=residuals[order],
        converged=(residuals <= tol * found["scale"])[order],
        matvecs=found["products"] + timed,
        seconds=time.perf_counter() - began,
        seed=seed,
        status=status,
        which=which,
        tol=tol,
        scale=found["scale"],
        block_size=block,
        restarts=found["restarts"],
        storage=basis.storage,
        basis_rows=basis.rows,
        draft_matvecs=found["draft_products"],
    )


@dataclass(frozen=True)
class _Search:
    k: int
    which: str
    tol: float
    block: int
    most: int
    seed: int

    def solver(self, operator: LinearView, basis: Basis, asymmetry: float, verify: bool) -> Any:
        return _C.krylov.EigenSolver(
            product=operator.apply,
            head=basis.head,
            tail=basis.tail,
            scale=basis.scale,
            k=self.k,
            which=self.which,
            tol=self.tol,
            block=self.block,
            max_products=self.most,
            asymmetry=asymmetry,
            verify=verify,
            seed=self.seed,
            file=basis.file,
        )

    def identity(self, operator: LinearView, start: torch.Tensor, drafted: bool) -> dict[str, Any]:
        return {
            "P": operator.P,
            "dtype": str(operator.dtype),
            "k": self.k,
            "which": self.which,
            "tol": self.tol,
            "block_size": self.block,
            "seed": self.seed,
            "v0": [len(start), float(start.double().sum()), float(start.double().square().sum())],
            "draft": drafted,
        }

    def run(
        self,
        operator: LinearView,
        basis: Basis,
        start: torch.Tensor,
        saved: Checkpoint | None,
        drafted: int,
        bar: Bar,
    ) -> dict[str, Any]:
        # Rounding of products leaves differences far below this. Rows in 16 bits lose orthogonality as well, most where
        # P is small: then only a gross lack of symmetry can be told.
        rounding = torch.finfo(operator.dtype).eps ** 0.5
        asymmetry = 0.25 if basis.storage in ("float16", "bf16") else rounding
        solver = self.solver(operator, basis, asymmetry, verify=True)
        interrupted = False
        try:
            taken_up = saved.read(basis) if saved else None
            if taken_up:
                state, drafted = taken_up
                solver.restore(state)
                off, left_out = solver.defect()
                if not off <= asymmetry + 2 * left_out and saved:
                    saved.refuse(off)
            else:
                solver.start(start)
            while solver.step():
                seen = solver.look()
                self.show(seen, bar)
                if saved and saved.due():
                    saved.write(solver.state(), basis, seen["rows"], drafted)
        except KeyboardInterrupt:
            interrupted = True
            if not solver.look()["residuals"]:
                raise
            if saved:
                saved.write(solver.state(), basis, solver.look()["rows"], drafted)
        found: dict[str, Any] = solver.result()
        found["draft_products"] = drafted
        if interrupted:
            found["status"] = "interrupted"
        elif saved and found["status"] != "out_of_products":
            saved.remove()
        elif saved:
            saved.write(solver.state(), basis, solver.look()["rows"], drafted)
        return found

    def draft(
        self, operator: LinearView, start: torch.Tensor, memory: int | None, storage: str | None, bar: Bar
    ) -> dict[str, Any]:
        """The draft's pairs as its recurrence has them: they need not be exact, nor the draft quite symmetric."""
        basis = allocate_basis(operator, self.k, self.block, len(start), self.tol, memory, storage)
        solver = self.solver(operator, basis, asymmetry=0.1, verify=False)
        solver.start(start.to(dtype=operator.dtype, device=operator.device))
        while solver.step():
            self.show(solver.look(), bar, "draft: ")
        found: dict[str, Any] = solver.result()
        return found

    def show(self, seen: dict[str, Any], bar: Bar, prefix: str = "") -> None:
        residuals = [residual / (seen["scale"] or 1.0) for residual in seen["residuals"]]
        converged = sum(residual <= self.tol for residual in residuals)
        worst = f", residuals up to {max(residuals):.1e}, wanted {self.tol:.0e}" if residuals else ""
        bar.update(
            seen["products"], f"{prefix}{seen['products']} products, {converged} of {self.k} converged{worst}"
        )


def _block(block_size: int | str | None, operator: LinearView, k: int, seed: int) -> tuple[int, int]:
    """Vectors per product, and the products that choosing it took."""
    if isinstance(block_size, str):
        if block_size != "measured":
            raise ValueError(f"block_size: expected a number, None or 'measured', got {block_size!r}")
        return measured_block(operator, k, seed)
    block = DEFAULT_BLOCK if block_size is None else check_count("block_size", block_size, 1)
    return min(block, operator.P), 0


def _most_products(max_matvecs: int | None, k: int, block: int, given: int) -> tuple[int, int]:
    """The products a search may use, and those it needs at least."""
    least = given + max(block, k + 2) + k if given else math.ceil(k / block) * block + k
    most = max(1000, 50 * k, least) if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    if most < least:
        start = f" from {given} start vectors" if given else ""
        raise ValueError(
            f"max_matvecs: expected at least {least} for k = {k}{start} in blocks of {block} and their residuals, "
            f"got {most}; allow more products or take a smaller block_size"
        )
    return most, least


def _status(found: dict[str, Any], k: int, tol: float, dtype: torch.dtype) -> str:
    scale, products = found["scale"], found["products"]
    converged = sum(residual <= tol * scale for residual in found["residuals"])
    if found["status"] == "interrupted":
        exist = f"; only {len(found['values'])} exist so far" if len(found["values"]) < k else ""
        return (
            f"interrupted after {products} products with {converged} of {k} pairs converged by the recurrence's "
            f"estimate of their residuals{exist}; call again with v0 = this result to go on"
        )
    if found["status"] == "out_of_products" and converged < k:
        return (
            f"{converged} of {k} pairs have a residual below tol = {tol:g} times {scale:.3g} after "
            f"{products} products; raise max_matvecs or tol"
        )
    if converged < k:
        return (
            f"{k - converged} of {k} residuals stay above tol = {tol:g} times {scale:.3g}, "
            f"the rounding of {str(dtype).removeprefix('torch.')} products; raise tol or use float64"
        )
    if found["status"] != "converged":
        return (
            "the pairs found have converged, but whether one of the values has further copies "
            "was not settled; raise max_matvecs or block_size"
        )
    return "converged"
