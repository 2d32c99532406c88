"""Lowering: a functional ATen graph, split by what depends on the parameters, becomes prelude and program.

A lowering is a function (lower, node, a) -> value id, or a tuple of them for an op with several outputs; `a`
holds the arguments of the ATen call by the names of its schema. The families stand in `lowerings/`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError
from .deferred import REAL_DTYPES, Deferred, Leaf, composed, has_fixed_shape, is_value
from .graph import arguments, aten_name, fill_value, op_name
from .prelude import PreludeBuilder, Source
from .program import Attribute, Op, Value, ValueKind
from .verify import infer

# A value id, a LogSoftmax, a Mask, a Deferred, or a tuple with None for outputs that have no rule here.
Result = Any
Lowered = Callable[["Lowering", fx.Node, SimpleNamespace], Result]
LOWERINGS: dict[str, Lowered] = {}


def lowers(*names: str) -> Callable[[Lowered], Lowered]:
    """Registers a lowering for ATen overloads, e.g. "add.Tensor"."""

    def register(function: Lowered) -> Lowered:
        for name in names:
            assert name not in LOWERINGS, name
            LOWERINGS[name] = function
        return function

    return register


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read `node`, or a copy of it."""
    for user in node.users:
        if user.op == "call_function" and aten_name(user) in ("clone.default", "alias.default"):
            yield from _readers(user)
        elif user.op != "output":
            yield user


@dataclasses.dataclass(frozen=True)
class LogSoftmax:
    """Log-softmax of value `logits` over axis `dim`: with nll_loss a cross-entropy, computed for others."""

    logits: int
    dim: int

    def is_of_cross_entropy(self, node: fx.Node) -> bool:
        """Is `node`, which holds it, read by nll_loss over the same axis and by nothing else?"""
        classes = 0 if node.meta["val"].dim() == 1 else 1
        return self.dim == classes and all(aten_name(user).startswith("nll_loss") for user in _readers(node))


@dataclasses.dataclass(frozen=True)
class Mask:
    """A bool tensor that depends on the parameters: value `value` holds ones and zeros for it."""

    value: int


class NoRuleError(Exception):
    """A lowering that does not know this form of its operation: it runs through autograd."""


class Lowering:
    """Builds values, ops and prelude while walking the graph once."""

    def __init__(
        self,
        parameters: Mapping[fx.Node, str],
        sources: Mapping[fx.Node, Source],
        active: set[fx.Node],
        selected: Mapping[str, torch.Tensor],
        path_of: Callable[[fx.Node], str],
    ) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.prelude = PreludeBuilder(sources, fill_value)
        self.constants: dict[int, fx.Node] = {}  # value id -> handle
        self.normalisers: dict[int, fx.Node] = {}  # id of a mean cross-entropy -> handle of its divisor
        self.marks: set[int] = set()  # ids of the values that stand for the model's outputs
        self.dtype = next(iter(selected.values())).dtype
        self._active = active
        self._path_of = path_of
        self._results: dict[fx.Node, Result] = {}
        self._constant_ids: dict[fx.Node, int] = {}
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}  # (handle, dtype) -> the same in dtype
        self._log_softmax: dict[LogSoftmax, int] = {}
        self.device = next(iter(selected.values())).device
        self._producers: dict[int, Op] = {}
        self._node: fx.Node | None = None
        ids = {name: self._new("parameter", tuple(t.shape), name) for name, t in selected.items()}
        for node, name in parameters.items():
            self._results[node] = ids[name]

    # --- walking ---

    def lower(self, node: fx.Node, mark: bool = False) -> None:
        """Lower one active node. A `mark` is where the model hands a value to the loss."""
        if node in self._results:
            return
        self._node = node
        if mark:
            self._results[node] = self._mark(self._results[node.args[0]], node)  # type: ignore[index]
        else:
            result = self._ruled(node)
            self._results[node] = self._without_rule(node) if result is None else result

    def _ruled(self, node: fx.Node) -> Result:
        """What the lowering of this operation gives; None where there is none for it, or for what it reads."""
        if node.target is operator.getitem:
            source, position = node.args
            several = self._results[source]  # type: ignore[index]
            return several[position] if isinstance(several, tuple) else None  # type: ignore[index]
        rule = LOWERINGS.get(aten_name(node))
        if rule is None or not all(map(self._has_value, node.all_input_nodes)) or not has_fixed_shape(node):
            return None
        try:
            result = rule(self, node, arguments(node))
        except NoRuleError:
            return None
        return result if self._is_right(result, node) else None

    def _has_value(self, node: fx.Node) -> bool:
        if node in self._active:
            return not isinstance(self._results[node], Deferred)
        return has_fixed_shape(node)

    def _without_rule(self, node: fx.Node) -> Result:
        """An `external` op of this operation and what it reads of deferred results."""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise self.error("it calls functions of its own, for which there is no second-order rule")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in REAL_DTYPES:
            raise self.error(f"gives {value.dtype}; keep the model in one precision on one device")
        if not isinstance(value, torch.Tensor) or not is_value(node):
            return Deferred()
        function, inputs = composed(node, self._leaf, self.dtype)
        return self.emit("external", *inputs, function=function)

    def _leaf(self, node: fx.Node) -> Leaf | None:
        """The value that stands for a node in a function of external ops; None where there is none."""
        if node not in self._active:
            if not has_fixed_shape(node):
                return None
            handle = self.take(node)
            return Leaf(self.constant(handle, handle.meta["val"].dtype), None)
        result = self._results.get(node)
        if isinstance(result, Mask):
            return Leaf(result.value, torch.Tensor.bool)
        if not isinstance(result, int | LogSoftmax):
            return None
        dtype = node.meta["val"].dtype
        return Leaf(self.operand(node), None if dtype == self.dtype else _CASTS[dtype])

    def result(self, node: fx.Node) -> Result:
        """What an active node was lowered to; None for one that does not depend on the parameters."""
        return self._results.get(node)

    def error(self, reason: str) -> CaptureError:
        """A CaptureError that names the operation being lowered and the module it stands in."""
        assert self._node is not None
        return CaptureError(reason, op=op_name(self._node), path=self._path_of(self._node))

    def _mark(self, result: Result, node: fx.Node) -> Result:
        if isinstance(result, Deferred):
            return result
        if isinstance(result, LogSoftmax):
            if result.is_of_cross_entropy(node):  # it counts to the loss: the cut holds the logits
                return LogSoftmax(self._mark(result.logits, node), result.dim)
            result = self._computed(result)
        output = self.emit("view", result, shape=self.values[result].shape)
        self.marks.add(output)
        return output

    def _is_right(self, result: Result, node: fx.Node) -> bool:
        """Has the exported graph recorded a number where a value was made of it? A count, say, is none."""
        if isinstance(result, Mask):
            return bool(node.meta["val"].dtype == torch.bool)
        if not isinstance(result, int):
            return True
        if not is_value(node):
            return False
        expected = tuple(node.meta["val"].shape)
        assert self.shape(result) == expected, (node, self.shape(result), expected)
        return True

    # --- what lowerings use ---

    def is_active(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument in self._active

    def operand(self, argument: Any) -> int:
        """The value id of a tensor argument; one of the prelude becomes a constant of the program's dtype."""
        if not isinstance(argument, fx.Node):
            raise NoRuleError
        if argument not in self._active:
            return self.constant(self.take(argument))
        result = self._results[argument]
        if isinstance(result, LogSoftmax):
            return self._computed(result)
        if isinstance(result, Mask):
            return result.value
        if not isinstance(result, int):
            raise NoRuleError
        return result

    def optional(self, argument: Any) -> int | None:
        return None if argument is None else self.operand(argument)

    def take(self, node: fx.Node) -> fx.Node:
        """The prelude's handle of a node that does not depend on the parameters."""
        if node in self._active:
            raise NoRuleError
        return self.prelude.take(node)

    def take_real(self, node: fx.Node) -> fx.Node:
        """The same in the program's dtype, for arithmetic that would lose digits in another."""
        return self._cast(self.take(node), self.dtype)

    def constant(self, handle: fx.Node, dtype: torch.dtype | None = None) -> int:
        """The value id of a prelude handle, cast to the program's dtype or to the one named."""
        handle = self._cast(handle, dtype or self.dtype)
        if handle not in self._constant_ids:
            shape = tuple(handle.meta["val"].shape)
            i = self._new("constant", shape, self.prelude.origin(handle), dtype)
            self._constant_ids[handle] = i
            self.constants[i] = handle
        return self._constant_ids[handle]

    def number(self, value: float) -> int:
        """The value id of a constant with no axes."""
        return self.constant(self.prelude.call(torch.full, (), value, dtype=self.dtype, device=self.device))

    def index(self, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> int:
        """The value id of an index that function(*args, device=...) computes in the prelude."""
        handle = self.prelude.call(function, *args, device=self.device, **kwargs)
        return self.constant(handle, torch.int64)

    def emit(self, kind: str, *inputs: int | None, **attrs: Attribute) -> int:
        """Append an op; the id of its output."""
        assert self._node is not None
        try:
            shape, _ = infer(kind, attrs, [None if i is None else self.values[i] for i in inputs])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NoRuleError from error
        path = self._path_of(self._node)
        output = self._new("activation", shape, path)
        op = Op(kind, inputs, output, attrs, path, op_name(self._node))
        self.ops.append(op)
        self._producers[output] = op
        return output

    def unary(self, function: str, x: int, a: float = 0.0, b: float = 0.0, c: float = 0.0) -> int:
        return self.emit("unary", x, function=function, a=float(a), b=float(b), c=float(c))

    def affine(self, x: int, scale: float = 1.0, shift: float = 0.0) -> int:
        if scale == 1 and shift == 0:
            return x
        return self.emit("affine", x, scale=float(scale), shift=float(shift))

    def view(self, x: int, shape: Iterable[int]) -> int:
        wanted = tuple(int(size) for size in shape)
        return x if wanted == self.shape(x) else self.emit("view", x, shape=wanted)

    def permute(self, x: int, dims: Iterable[int]) -> int:
        wanted = tuple(int(dim) % max(self.rank(x), 1) for dim in dims)
        return x if wanted == tuple(range(self.rank(x))) else self.emit("permute", x, dims=wanted)

    def to_last(self, x: int, dim: int) -> int:
        """The same with axis `dim` moved to the end."""
        return self.permute(x, [*(i for i in range(self.rank(x)) if i != dim % self.rank(x)), dim])

    def from_last(self, x: int, dim: int) -> int:
        """Undoes `to_last`."""
        rank = self.rank(x)
        order = list(range(rank - 1))
        order.insert(dim % rank, rank - 1)
        return self.permute(x, order)

    def expand(self, x: int, shape: Iterable[int]) -> int:
        wanted = tuple(int(size) for size in shape)
        return x if wanted == self.shape(x) else self.emit("expand", x, shape=wanted)

    def slice(self, x: int, dim: int, start: int, length: int, step: int = 1) -> int:
        """Elements start, start + step, ... of an axis, `length` of them."""
        dim %= self.rank(x)
        if start == 0 and step == 1 and length == self.shape(x)[dim]:
            return x
        return self.emit("slice", x, dim=dim, start=int(start), step=int(step), length=int(length))

    def cat(self, parts: Iterable[int], dim: int) -> int:
        listed = list(parts)
        return listed[0] if len(listed) == 1 else self.emit("cat", *listed, dim=dim % self.rank(listed[0]))

    def rows(self, x: int, dim: int, index: int) -> int:
        """x[..., index, ...] with the axes of `index` where axis `dim` was."""
        rank, dim = self.rank(x), dim % self.rank(x)
        front = self.permute(x, [dim, *(i for i in range(rank) if i != dim)])
        picked = self.emit("rows", front, index, frozen=-1)
        count = self.rank(index)
        return self.permute(
            picked, [*range(count, count + dim), *range(count), *range(count + dim, self.rank(picked))]
        )

    def sum(self, x: int, dims: Iterable[int], keepdim: bool = False, scale: float = 1.0) -> int:
        axes = tuple(sorted(int(dim) % max(self.rank(x), 1) for dim in dims))
        if self.rank(x) == 0:
            return self.affine(x, scale)
        return self.emit("sum", x, dims=axes, keepdim=keepdim, scale=float(scale))

    def shape(self, x: int) -> tuple[int, ...]:
        return self.values[x].shape

    def rank(self, x: int) -> int:
        return len(self.values[x].shape)

    def producer(self, x: int) -> Op | None:
        """The op that computes a value; None for parameters and constants."""
        return self._producers.get(x)

    def _cast(self, handle: fx.Node, dtype: torch.dtype) -> fx.Node:
        if handle.meta["val"].dtype == dtype:
            return handle
        if handle.meta["val"].is_complex():
            raise NoRuleError
        if (handle, dtype) not in self._casts:
            self._casts[handle, dtype] = self.prelude.call(torch.Tensor.to, handle, dtype)
        return self._casts[handle, dtype]

    def _computed(self, log_softmax: LogSoftmax) -> int:
        if log_softmax not in self._log_softmax:
            z, last = log_softmax.logits, self.rank(log_softmax.logits) - 1
            rows = self.to_last(z, log_softmax.dim) if last >= 0 else self.view(z, (1,))
            y = self.emit("add", rows, self.emit("logsumexp", rows), alpha=-1.0)
            self._log_softmax[log_softmax] = (
                self.from_last(y, log_softmax.dim) if last >= 0 else self.view(y, ())
            )
        return self._log_softmax[log_softmax]

    def _new(
        self, kind: ValueKind, shape: tuple[int, ...], name: str, dtype: torch.dtype | None = None
    ) -> int:
        self.values.append(Value(len(self.values), kind, shape, dtype or self.dtype, name))
        return len(self.values) - 1


_CASTS = {torch.float32: torch.Tensor.float, torch.float64: torch.Tensor.double}


def pair(sizes: Any) -> tuple[int, int]:
    """2 ints from one int, a list of one, or a list of two."""
    listed = [int(s) for s in sizes] if isinstance(sizes, Iterable) else [int(sizes)]
    return (listed[0], listed[-1])
