"""Where a search starts: given vectors, earlier eigenpairs, or the answer of a cheaper operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatcore import _C
from flatcore.errors import first_line, warn
from flatcore.linear import LinearView, as_operator
from flatcore.results import Eigenpairs

__all__ = ["draft_rows", "start_rows"]


def start_rows(v0: torch.Tensor | Eigenpairs | None, operator: LinearView) -> torch.Tensor:
    """v0 as rows (j, P), j = 0 for none; never v0's own memory."""
    if v0 is None:
        return torch.empty(0, operator.P, dtype=operator.dtype, device=operator.device)
    if isinstance(v0, Eigenpairs):
        if v0.vectors is None:
            raise ValueError(
                "v0: expected Eigenpairs with vectors, got vectors = None; compute them with return_eigenvectors=True"
            )
        v0 = v0.vectors
    try:
        rows = (v0 if isinstance(v0, torch.Tensor) else torch.as_tensor(v0, device="cpu")).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"v0: expected a torch.Tensor, got {type(v0).__name__}") from error
    shape = tuple(rows.shape)
    rows = rows[None] if rows.ndim == 1 else rows.T
    if rows.ndim != 2 or rows.shape[1] != operator.P or not 1 <= rows.shape[0] < operator.P:
        raise ValueError(
            f"v0: expected shape ({operator.P},) or ({operator.P}, j) with 1 <= j < P = {operator.P}, got {shape}; "
            "give vectors of this operator's size"
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


def draft_rows(
    draft: Any, operator: LinearView, search: Callable[[LinearView], dict[str, Any]]
) -> tuple[torch.Tensor, int]:
    """What a search of the draft found, as start rows for the operator, and its products.

    A draft that fails is left out, with a FlatcoreWarning. Raises TypeError for one that is no operator, ValueError for
    one of another shape.
    """
    view = as_operator(draft, "draft")
    if operator.P != view.P:
        raise ValueError(
            f"draft: expected an operator of shape ({operator.P}, {operator.P}) like A, got ({view.P}, {view.P}); "
            "give one of the same parameters"
        )
    nothing = torch.empty(0, operator.P, dtype=operator.dtype, device=operator.device)
    try:
        found = search(_telling(view))
    except (_C.krylov.OperatorError, _ProductError) as error:
        warn(f"eigsh: the draft is of no use: {error}")
        return nothing, 0
    return found["vectors"].to(dtype=operator.dtype, device=operator.device).contiguous(), found["products"]


class _ProductError(Exception):
    """What a product of the draft raised."""


def _telling(view: LinearView) -> LinearView:
    """The same operator, whose errors can be told from those of the search."""

    def product(rows: torch.Tensor) -> torch.Tensor:
        try:
            return view.apply(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _ProductError(f"its product raised {type(error).__name__}: {first_line(error)}") from error

    return LinearView(view.P, view.dtype, view.device, product, view.parameter_slices, view.name)
