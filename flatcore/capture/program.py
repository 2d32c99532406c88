"""The program: a model and its loss as plain data. `interpreter.py` defines its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch

from .external import External
from .prelude import Prelude

ValueKind = Literal["parameter", "constant", "activation"]
Reduction = Literal["mean", "sum", "other"]
Attribute = bool | int | float | str | tuple[int, ...] | External


@dataclass(frozen=True)
class Value:
    """A tensor. `name`: name of the parameter, source of the constant, or module path of the activation."""

    id: int
    kind: ValueKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Op:
    """One step. `inputs`: value ids, None for an absent one. `aten`: the operation it was lowered from."""

    kind: str
    inputs: tuple[int | None, ...]
    output: int
    attrs: dict[str, Attribute]
    path: str
    aten: str

    @property
    def present(self) -> Iterator[int]:
        """The inputs that are not absent."""
        return (i for i in self.inputs if i is not None)

    @property
    def external(self) -> External | None:
        """The function of an op that has no rule."""
        function = self.attrs.get("function")
        return function if isinstance(function, External) else None


@dataclass(frozen=True)
class Program:
    """Straight-line program of one batch: `ops` in order, each with one output; `loss` is the value it
    computes.

    values:      all values; `values[i].id == i`. Parameters come first, in the order of the flat vector.
    parameters:  value id -> name in the user's model, for every selected parameter, used or not.
    constants:   ids of the values that `prelude.run` computes.
    cut:         ids of the values the model hands to the loss, through which alone the loss depends on the
                 parameters; the output of a `linear_cross_entropy` stands for its logits. None where there is
                 no such set, and `cut_reason` says why.
    normaliser:  id of a 0-dim constant, the weight of the batch when a mean over several batches is taken;
                 None: the number of examples.
    reduction:   how the loss gathers the examples: their "mean", their "sum", or "other" (not recognised).
    examples:    length of axis 0 of the batch.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    parameters: dict[int, str]
    constants: tuple[int, ...]
    loss: int
    cut: tuple[int, ...] | None
    cut_reason: str
    normaliser: int | None
    reduction: Reduction
    examples: int
    prelude: Prelude = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    def active(self) -> frozenset[int]:
        """Ids of the values that depend on a parameter."""
        return depending(self.ops, self.parameters)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def depending(
    ops: Iterable[Op], sources: Iterable[int], without: frozenset[int] = frozenset()
) -> frozenset[int]:
    """Ids of the values that depend on `sources` by a way that leads through none of the values `without`."""
    found = set(sources) - without
    for op in ops:
        if op.output not in without and any(i in found for i in op.present):
            found.add(op.output)
    return frozenset(found)


def _lines(program: Program) -> Iterator[str]:
    size = sum(program.values[i].numel for i in program.parameters)
    dtype = str(program.dtype).removeprefix("torch.")
    yield (
        f"program of {len(program.ops)} ops, {dtype}: P = {size} in {len(program.parameters)} parameters, "
        f"{len(program.constants)} constants, {program.examples} examples; * marks what depends on parameters"
    )
    for value in program.values:
        if value.kind != "activation":
            mention = _mention(value.id, value.kind == "parameter")
            yield f"  {mention} {_shape(value.shape)} {value.kind} {value.name}"
    active = program.active()
    for op in program.ops:
        inputs = ", ".join("none" if i is None else _mention(i, i in active) for i in op.inputs)
        attrs = "".join(f", {name}={value}" for name, value in op.attrs.items())
        output = f"{_mention(op.output, op.output in active)} {_shape(program.values[op.output].shape)}"
        yield f"  {output} = {op.kind}({inputs}{attrs})  [{op.path}]"
    yield f"  loss {_mention(program.loss, True)} ({program.reduction})"
    if program.cut is None:
        yield f"  no cut: {program.cut_reason}"
    else:
        yield "  cut " + ", ".join(_mention(i, True) for i in program.cut)
    if program.normaliser is not None:
        yield f"  normaliser {_mention(program.normaliser, False)}"


def _mention(value: int, active: bool) -> str:
    return f"%{value}{'*' if active else ''}"


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
