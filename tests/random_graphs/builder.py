"""Random models as straight-line source code, each line evaluated as it is written.

A step of a graph is an op of the table `OPS` and a seed of its choices; the op writes lines of Python over the
names of earlier values. Values are known while the graph is built, so an op sees shapes and magnitudes, and may skip
where it does not apply. A graph that fails prints as a program that can be pasted.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ELEMENTS = 240


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


# What lines may use; and the same in a form that torch differentiates twice. Its own second derivatives of these two
# are wrong (2.13: the norms count as constants) and missing.
NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "weight_norm": torch._weight_norm,
    "hardsigmoid": F.hardsigmoid,
}
TWICE: dict[str, Any] = NAMES | {"weight_norm": _weight_norm, "hardsigmoid": lambda x: F.relu6(x + 3) / 6}


class Skip(Exception):
    """The op does not apply to the values at hand."""


@dataclass(frozen=True)
class Op:
    """Writes one kind of line. `reaches` names the ATen overloads that it is there to bring."""

    name: str
    write: Callable[[Builder], None]
    reaches: tuple[str, ...]


OPS: dict[str, Op] = {}
UNSUPPORTED: dict[str, Op] = {}


def op(
    *reaches: str, table: dict[str, Op] = OPS
) -> Callable[[Callable[[Builder], None]], Callable[[Builder], None]]:
    """Registers a function of the builder as an op, under its own name."""

    def register(write: Callable[[Builder], None]) -> Callable[[Builder], None]:
        name = write.__name__
        assert name not in OPS and name not in UNSUPPORTED, name
        table[name] = Op(name, write, reaches)
        return write

    return register


@dataclass
class State:
    """What the lines so far have made."""

    lines: list[str] = field(default_factory=list)
    reference: list[str] = field(default_factory=list)  # the same for torch to differentiate twice
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    casts: bool = False  # rounds to float32 inside
    counter: int = 0

    def copy(self) -> State:
        return State(**{name: copy.copy(value) for name, value in vars(self).items()})


class Builder:
    """Writes lines. Names: x0 tensors of the batch, p0 parameters, c0 buffers, v0 values."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.state = State()
        self.preferred = ""  # what the next op acts on, if it can
        self.focus = False  # the op being written must act on a value that depends on the parameters

    # --- steps ---

    def step(self, op: Op, seed: int, focus: bool = False) -> bool:
        """Let an op write its lines; False, and nothing is changed, where it does not apply."""
        before = self.state.copy()
        self.rng, self.focus, self.preferred = random.Random(seed), focus, ""
        try:
            op.write(self)
        except Skip:
            self.state = before
            return False
        return True

    def let(self, expression: str, count: int = 1, plain: bool = False) -> str:
        """A new value, or a tuple of `count`; its name, or the name of the first. `plain`: kept as it is, the same
        memory if it is a view."""
        names = [self._name("v") for _ in range(count)]
        values = self._evaluate(expression)
        values = list(values) if count > 1 else [values]
        assert len(values) == count, (expression, len(values))
        left = ", ".join(names)
        self.state.lines.append(f"{left} = {expression}")
        self.state.reference.append(f"{left} = {expression}" if plain else f"{left} = noise({expression})")
        for name, value in zip(names, values, strict=True):
            if value.numel() > MOST_ELEMENTS or value.numel() == 0:
                raise Skip
            if value.is_floating_point() and not value.isfinite().all():
                raise Skip
            self.state.tensors[name] = value
        self._mark_read(expression, names)
        if count == 1 and not plain and values[0].is_floating_point():
            return self._tamed(names[0])
        return names[0]

    def do(self, statement: str, target: str) -> None:
        """A statement that writes into the value `target`."""
        exec(statement, {**NAMES, **self.state.tensors})
        self.state.lines.append(statement)
        self.state.reference.append(statement)
        self._mark_read(statement, [target])
        if not self.state.tensors[target].isfinite().all():
            raise Skip

    def _evaluate(self, expression: str) -> Any:
        return eval(expression, {**NAMES, **self.state.tensors})

    def _name(self, kind: str) -> str:
        self.state.counter += 1
        return f"{kind}{self.state.counter}"

    def _mark_read(self, text: str, own: Sequence[str]) -> None:
        self.state.read.update(set(re.findall(r"\b[pxcv]\d+\b", text)) - set(own))

    def _tamed(self, name: str) -> str:
        """The value at a size near one, so that sizes neither explode nor vanish along a graph."""
        value = self.state.tensors[name].detach()
        size = value.abs().max().item()
        if size < 0.02:
            raise Skip  # what is left of a difference, most likely
        if 0.1 < size < 8:
            return name
        return self.let(f"{name} * {1.5 / size:.3g}")

    # --- tensors that a graph starts from ---

    def _normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """Numbers that float32 holds, so that models in both precisions are at the same point."""
        generator = torch.Generator().manual_seed(self.rng.getrandbits(40))
        return (scale * torch.randn(tuple(shape), generator=generator)).double()

    def parameter(self, shape: Sequence[int], scale: float = 1.0) -> str:
        """A new parameter; some are frozen, unless the step must reach a lowering."""
        name = self._name("p")
        value = self._normal(shape, scale)
        self.state.tensors[name] = value.requires_grad_(self.focus or self.rng.random() < 0.9)
        self.state.parameters.append(name)
        return name

    def constant(self, value: Tensor) -> str:
        """A tensor of the batch or a buffer."""
        batch = self.rng.random() < 0.5
        name = self._name("x" if batch else "c")
        self.state.tensors[name] = value
        (self.state.inputs if batch else self.state.constants).append(name)
        return name

    def numbers(self, shape: Sequence[int]) -> str:
        return self.constant(self._normal(shape))

    def index(self, shape: Sequence[int], size: int, negative: bool = False) -> str:
        generator = torch.Generator().manual_seed(self.rng.getrandbits(40))
        least = -size if negative and self.chance() else 0
        return self.constant(torch.randint(least, size, tuple(shape), generator=generator))

    def mask(self, shape: Sequence[int]) -> str:
        """A bool tensor that broadcasts to a shape, given or computed."""
        axes = self.broadcastable(shape)
        if self.chance():
            return f"({self.numbers(axes)} > {self.number()})"
        return self.constant(self._normal(axes) > -0.3)

    def weight(self, shape: Sequence[int], scale: float = 1.0) -> str:
        """An expression of a shape: a new parameter, an old one, one reshaped or normed, a constant, a value."""
        shape = tuple(shape)
        known = [n for n, t in self.state.tensors.items() if t.is_floating_point() and t.shape == shape]
        way = self.rng.random()
        if known and way < 0.3:
            return self.rng.choice(known)
        if way < 0.4:
            larger = [
                n for n in self.state.parameters if self.state.tensors[n].numel() >= max(prod(shape), 1)
            ]
            if larger:
                return f"{self.rng.choice(larger)}.reshape(-1)[:{prod(shape)}].reshape({shape})"
        if way < 0.5 and len(shape) >= 2:
            order = self.rng.sample(range(len(shape)), len(shape))
            source = [0] * len(shape)
            for place, axis in enumerate(order):
                source[axis] = shape[place]
            return f"{self.parameter(source, scale)}.permute({tuple(order)})"
        if way < 0.53 and shape:
            return f"{self.parameter((*shape[:-1], 2 * shape[-1]), scale)}[..., ::2]"
        if way < 0.55 and shape:
            return f"{self.parameter((*shape[:-1], 1), scale)}.expand({shape})"
        if way < 0.6 and len(shape) >= 2:
            v, g = self.parameter(shape), self.parameter((shape[0], *[1] * (len(shape) - 1)))
            return f"weight_norm({v}, {g}, 0)"
        if way < 0.65 and not self.focus:
            return self.numbers(shape)
        return self.parameter(shape, scale)

    # --- choices ---

    def chance(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def choice(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(list(options))

    def integer(self, least: int, most: int) -> int:
        if most < least:
            raise Skip
        return self.rng.randint(least, most)

    def number(self) -> float:
        return round(self.rng.choice([-1, 1]) * self.rng.uniform(0.2, 1.5), 2)

    def fraction(self) -> float:
        return round(self.rng.uniform(0.1, 0.9), 2)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state.tensors[name].shape)

    def rank(self, name: str) -> int:
        return self.state.tensors[name].dim()

    def size(self, name: str, axis: int) -> int:
        return int(self.state.tensors[name].shape[axis])

    def axis(self, name: str) -> int:
        """An axis, half of the time counted from the end."""
        rank = self.rank(name)
        if rank == 0:
            raise Skip
        return self.integer(-rank, rank - 1)

    def axes(self, name: str, most: int | None = None) -> tuple[int, ...]:
        rank = self.rank(name)
        chosen = self.rng.sample(range(rank), self.integer(1, min(rank, most or rank)))
        return tuple(axis - rank if self.chance(0.3) else axis for axis in chosen)

    def broadcastable(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`: leading axes left out, others of size one."""
        kept = list(shape[self.integer(0, len(shape)) if self.chance(0.3) and shape else 0 :])
        return tuple(1 if self.chance(0.2) else size for size in kept)

    def pick(
        self, min_rank: int = 0, max_rank: int = 5, where: Callable[[Tensor], bool] | None = None
    ) -> str:
        """A value of a rank between the two, reshaped if need be; mostly a recent one that nobody has read."""
        tensors = self.state.tensors
        preferred, self.preferred = self.preferred, ""
        if (
            preferred
            and min_rank <= self.rank(preferred) <= max_rank
            and (not where or where(tensors[preferred]))
        ):
            return preferred
        found = [
            (name, t)
            for name, t in tensors.items()
            if t.is_floating_point() and (where is None or where(t)) and t.numel() > 0
        ]
        if self.focus or self.chance(0.93):
            found = [(name, t) for name, t in found if t.requires_grad]
        fitting = [(name, t) for name, t in found if min_rank <= t.dim() <= max_rank]
        if fitting and (where is not None or self.chance(0.8)):
            found = fitting
        if not found:
            raise Skip
        weights = [(1 + i) * min(t.numel(), 24) for i, (_, t) in enumerate(found)]
        weights = [
            w * (1 if name in self.state.read else 4) * (4 if name[0] == "v" else 1)
            for w, (name, _) in zip(weights, found, strict=True)
        ]
        ((name, _),) = self.rng.choices(found, weights)
        return self._of_rank(name, min_rank, max_rank)

    def _of_rank(self, name: str, least: int, most: int) -> str:
        """The same elements with a rank in the range."""
        shape = list(self.shape(name))
        if least <= len(shape) <= most:
            return name
        while len(shape) > most:
            axis = self.integer(0, len(shape) - 2)
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
        while len(shape) < least:
            axis = self.integer(0, len(shape))
            factors = [f for f in (2, 3) if axis < len(shape) and shape[axis] % f == 0]
            if factors and self.chance(0.7):
                factor = self.choice(factors)
                shape[axis : axis + 1] = [factor, shape[axis] // factor]
            else:
                shape.insert(axis, 1)
        return self.let(f"{name}.reshape({tuple(shape)})")

    def operand(self, name: str) -> str:
        """A second operand for an op that broadcasts."""
        shape = self.shape(name)
        fitting = [
            n
            for n, t in self.state.tensors.items()
            if t.is_floating_point() and _joint_elements(shape, tuple(t.shape)) <= MOST_ELEMENTS
        ]
        if fitting and self.chance(0.6):
            return self.choice(fitting)
        return self.weight(self.broadcastable(shape))


def _joint_elements(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    try:
        return prod(torch.broadcast_shapes(a, b))
    except RuntimeError:
        return MOST_ELEMENTS + 1
