"""Flat vectors and their public forms.

Parameters stand one after another in the order of `named_parameters()`; P is their total size. Inside, K
directions are the rows of a (K, P) matrix, each row contiguous. At the public edge they are a vector (P,),
a matrix (P, K) with directions as columns, or a dict from parameter name to a tensor of shape (*shape,) or
(*shape, K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore._C import engine
from flatcore.parameters import did_you_mean

Directions = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where each parameter stands in the flat vector."""

    shapes: dict[str, torch.Size]
    slices: dict[str, slice]
    size: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> Layout:
        slices, start = {}, 0
        for name, parameter in parameters.items():
            slices[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        first = next(iter(parameters.values()))
        return Layout({n: p.shape for n, p in parameters.items()}, slices, start, first.dtype, first.device)

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Views of one flat vector (P,), by name."""
        return {name: row[part].view(self.shapes[name]) for name, part in self.slices.items()}


Restore = Callable[[Tensor], "Tensor | dict[str, Tensor]"]


def to_rows(V: Directions, layout: Layout, spare: int) -> tuple[Tensor, Restore]:
    """The directions as rows (K, P), and the function that gives a result of that shape the form V had.

    spare: bytes that may be kept for the next copy.

    A (P, K) matrix with strides (1, P) is used in place, as is a contiguous vector; any other is copied once.
    """
    if isinstance(V, Mapping):
        return _rows_of_mapping(V, layout, spare)
    if not isinstance(V, Tensor):
        raise TypeError(
            f"V: expected a torch.Tensor of shape ({layout.size},) or ({layout.size}, K), or a dict from "
            f"parameter name to tensor, got {type(V).__name__}; convert it with torch.as_tensor"
        )
    if V.dim() not in (1, 2) or V.shape[0] != layout.size:
        raise ValueError(
            f"V: expected shape ({layout.size},) or ({layout.size}, K) for {layout.size} selected "
            f"parameter entries, got {tuple(V.shape)}{_transposed_hint(V, layout)}"
        )
    _check_kind(V, "V", layout)
    if V.dim() == 1:
        return _unit_stride(V.detach().unsqueeze(0), spare), lambda Y: Y[0]
    return _unit_stride(V.detach().T, spare), lambda Y: Y.T


def is_single(V: Directions, layout: Layout) -> bool:
    """Is it one vector, rather than a block of them? `to_rows` has checked it."""
    if isinstance(V, Tensor):
        return V.dim() == 1
    return all(V[name].dim() == len(shape) for name, shape in layout.shapes.items())


def _rows_of_mapping(V: Mapping[str, Tensor], layout: Layout, spare: int) -> tuple[Tensor, Restore]:
    unknown = [name for name in V if name not in layout.slices]
    if unknown:
        raise ValueError(
            f"V: expected the names of the selected parameters, got unknown {unknown[0]!r}"
            f"{did_you_mean(str(unknown[0]), layout.slices)}"
        )
    missing = [name for name in layout.slices if name not in V]
    if missing:
        raise ValueError(f"V: expected a tensor for every selected parameter, got none for {missing[0]!r}")
    blocks: int | None = None
    for position, (name, shape) in enumerate(layout.shapes.items()):
        part = V[name]
        if not isinstance(part, Tensor):
            raise TypeError(f"V[{name!r}]: expected a torch.Tensor, got {type(part).__name__}")
        _check_kind(part, f"V[{name!r}]", layout)
        columns = part.shape[-1] if part.dim() == len(shape) + 1 else None
        if (
            part.shape[: len(shape)] != shape
            or part.dim() > len(shape) + 1
            or (position and columns != blocks)
        ):
            wanted = "K" if position == 0 or blocks is None else str(blocks)
            suffix = f" or {_shape(shape, wanted)}" if position == 0 else ""
            expected = (
                _shape(shape, wanted) if position and blocks is not None else str(tuple(shape)) + suffix
            )
            raise ValueError(f"V[{name!r}]: expected shape {expected}, got {tuple(part.shape)}")
        blocks = columns
    like = next(iter(V.values()))
    rows = engine.fresh_rows(1 if blocks is None else blocks, layout.size, like, spare)
    for name, place in layout.slices.items():
        value = V[name].detach()
        columns_first = (value.unsqueeze(-1) if blocks is None else value).movedim(-1, 0)
        rows[:, place] = columns_first.reshape(len(rows), place.stop - place.start)

    def restore(Y: Tensor) -> dict[str, Tensor]:
        if blocks is None:
            return layout.split(Y[0])
        return {
            n: Y[:, s]
            .unflatten(1, layout.shapes[n] or (1,))
            .movedim(0, -1)
            .reshape(*layout.shapes[n], blocks)
            for n, s in layout.slices.items()
        }

    return rows, restore


def _shape(shape: torch.Size, columns: str) -> str:
    return "(" + ", ".join([*map(str, shape), columns]) + ")"


def _transposed_hint(V: Tensor, layout: Layout) -> str:
    if V.dim() == 2 and V.shape[1] == layout.size:
        return "; directions are columns: pass V.T"
    return ""


def _check_kind(value: Tensor, argument: str, layout: Layout) -> None:
    if value.layout != torch.strided:
        raise TypeError(
            f"{argument}: expected a dense tensor, got one of layout {value.layout}; convert it with .to_dense()"
        )
    if value.dtype != layout.dtype:
        raise TypeError(
            f"{argument}: expected {layout.dtype} like the parameters, got {value.dtype}; convert it with "
            f".to({layout.dtype})"
        )
    if value.device != layout.device:
        raise ValueError(
            f"{argument}: expected a tensor on {layout.device} like the parameters, got one on "
            f"{value.device}; move it with .to({str(layout.device)!r})"
        )


def _unit_stride(rows: Tensor, spare: int) -> Tensor:
    in_pieces = rows.stride(1) == 1 and (rows.shape[0] <= 1 or rows.stride(0) >= rows.shape[1])
    in_place = (
        rows.shape[1] <= 1 or in_pieces
    ) and not rows.is_neg()  # a view whose numbers are the negative
    return rows if in_place else engine.contiguous_rows(rows, spare)
