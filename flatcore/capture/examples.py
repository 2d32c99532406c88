"""Which values of a program hold the examples of a batch apart along one axis: is the loss a sum over examples?

Read off the ops alone, one after another: each is asked whether group n of its output depends on no other group of what
it reads, where N equal groups of consecutive positions along the examples' axis stand for the N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from flatcore.errors import NotSeparable

from .program import Op, Program, Value

# Of a value that depends on parameters: the axis along which its examples lie; or it is made of parameters alone, the
# same for all examples; or it is a sum over examples.
Label = int | Literal["shared", "total"]


@dataclass(frozen=True)
class Separation:
    """labels: by value id; constants have none. crossings: ops that pick rows along axis 0 by an index whose values
    must be looked at: row i of the output belongs to the example of row index[i] of x."""

    labels: dict[int, Label]
    crossings: tuple[Op, ...]


def separate(ops: Sequence[Op], values: Sequence[Value], program: Program) -> Separation:
    """Labels of all values that depend on a parameter. Raises NotSeparable, naming the op.

    Where a parameter meets data whose first axis is as long as a multiple of the examples, or is copied along such
    an axis, it is taken for the examples' axis. Where that turns out to be wrong, as for positions that all examples
    share, it is not, and the labels are found anew.
    """
    shared: set[int] = set()
    while not isinstance(found := _separation(ops, values, program, shared), Separation):
        shared |= found
    return found


def _separation(
    ops: Sequence[Op], values: Sequence[Value], program: Program, shared: set[int]
) -> Separation | set[int]:
    """The labels; or, where they were found wrong, the values taken for the examples' own that are shared by all."""
    labels: dict[int, Label] = dict.fromkeys(program.parameters, "shared")
    beginnings: dict[int, set[int]] = {}  # of a value: where on the way to it examples came in
    crossings: list[Op] = []
    for op in ops:
        found = [labels.get(i) if i is not None else None for i in op.inputs]
        if all(label is None for label in found):
            continue
        view = _View(op, values, found, program.examples)
        began = set[int]().union(*(beginnings.get(i, set()) for i in op.present))
        label: Label | None
        if "total" in found:
            label = "total" if view.adds_up() else None
        elif any(isinstance(l, int) for l in found):
            label = view.after_examples()
            if label == 0 and op.kind == "rows" and found[0] == 0:
                crossings.append(op)
        elif op.output not in shared and view.begins_examples():
            label, began = 0, {op.output}
        else:
            label = "shared"
        if label is None:
            broadcast = [i for i in view.broadcast() if i in beginnings]
            if mistaken := set[int]().union(*(beginnings[i] for i in broadcast)) - shared:
                return mistaken
            raise NotSeparable(f"'{op.aten or op.kind}' in module '{op.path}' mixes the examples of a batch")
        labels[op.output] = label
        if isinstance(label, int):
            beginnings[op.output] = began
    if labels.get(program.loss) != "total":
        raise NotSeparable("the loss is no sum or mean over the examples of the batch")
    return Separation(labels, tuple(crossings))


class _View:
    """One op, with the labels of what it reads."""

    def __init__(
        self, op: Op, values: Sequence[Value], labels: Sequence[Label | None], examples: int
    ) -> None:
        self.op, self.attrs, self.labels, self.examples = op, op.attrs, labels, examples
        self.inputs = [() if i is None else values[i].shape for i in op.inputs]
        self.output = values[op.output].shape

    def adds_up(self) -> bool:
        """Is the op linear in a sum over examples, with nothing but numbers beside it?"""
        if any(isinstance(label, int) for label in self.labels):
            return False
        if self.op.kind == "mul":
            return None in self.labels
        return self.op.kind in ("affine", "view", "sum", "round", "permute", "expand", "slice", "add")

    def begins_examples(self) -> bool:
        """Does a parameter meet data here whose axis 0 stands for examples, or is it copied for each of them?"""
        kind, inputs, output = self.op.kind, self.inputs, self.output
        if not output or output[0] % self.examples:
            return False
        if kind in ("linear", "conv2d", "matmul"):
            return self.labels[0] is None and len(inputs[0]) >= 2 and inputs[0][0] == output[0]
        if kind == "rows":
            return True
        if kind == "expand":
            return self._same_for_all(inputs[0])
        if kind in ("add", "mul"):
            return all(
                self._aligned(s) if label is None else self._same_for_all(s)
                for s, label in zip(inputs, self.labels, strict=True)
            )
        return False

    def after_examples(self) -> Label | None:
        """The label of the output; None where examples mix."""
        keeps = _AXIS_AFTER.get(self.op.kind)
        return keeps(self) if keeps is not None else None

    def broadcast(self) -> list[int]:
        """Inputs of an op that works element by element which are the same along its output's axis 0."""
        if self.op.kind not in ("add", "mul", "where") or not self.output:
            return []
        pairs = zip(self.op.inputs, self.inputs, strict=True)
        return [i for i, s in pairs if i is not None and self._same_for_all(s)]

    def _aligned(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.output) and bool(shape) and shape[0] == self.output[0]

    def _same_for_all(self, shape: tuple[int, ...]) -> bool:
        return len(shape) < len(self.output) or shape[0] == 1

    # The axis of the examples in the output, by kinds of op; None where they mix.

    def elementwise(self) -> int | None:
        """Broadcasting lines axes up from the last one."""
        axes = {
            label + len(self.output) - len(s)
            for s, label in zip(self.inputs, self.labels, strict=True)
            if isinstance(label, int)
        }
        axis = axes.pop()
        whole = all(
            s[label] == self.output[axis]
            for s, label in zip(self.inputs, self.labels, strict=True)
            if isinstance(label, int)
        )
        return axis if not axes and whole else None

    def first(self, columns: int = 0) -> int | None:
        """Only the first input holds examples, and not along its last `columns` axes."""
        axis = self.labels[0]
        alone = not any(isinstance(label, int) for label in self.labels[1:])
        if isinstance(axis, int) and alone and axis < len(self.inputs[0]) - columns:
            return axis
        return None

    def images(self) -> int | None:
        return 0 if self.first() == 0 else None

    def matmul(self) -> int | None:
        if self.first() == 0 and len(self.inputs[0]) == 2 == len(self.output):
            return 0
        axis = self.elementwise()
        return axis if axis is not None and axis < len(self.output) - 2 else None

    def attention(self) -> int | None:
        axis = self.elementwise()
        return axis if axis is not None and axis < 2 else None

    def sum(self) -> Label | None:
        axis, rank = self.labels[0], len(self.inputs[0])
        dims: Any = self.attrs["dims"]
        gone = {d % rank for d in dims}
        assert isinstance(axis, int)
        if axis in gone:
            return "total"
        return axis if self.attrs["keepdim"] else axis - len([d for d in gone if d < axis])

    def view(self) -> int | None:
        axis = self.labels[0]
        assert isinstance(axis, int)
        before = prod(self.inputs[0][:axis])
        for place, size in enumerate(self.output):
            if prod(self.output[:place]) == before and size % self.examples == 0 and size:
                return place
        return None

    def permute(self) -> int | None:
        dims: Any = self.attrs["dims"]
        return list(dims).index(self.labels[0])

    def along(self) -> int | None:
        """Works along the axis `dim`."""
        dim: Any = self.attrs["dim"]
        axis = self.elementwise() if self.op.kind == "cat" else self.first()
        whole = self.op.kind == "slice" and self.output == self.inputs[0] and self.attrs["step"] == 1
        return axis if dim % len(self.output) != axis or whole else None

    def pad(self) -> int | None:
        axis = self.labels[0]
        assert isinstance(axis, int)
        pads: Any = self.attrs["pads"]
        place = 2 * (len(self.inputs[0]) - 1 - axis)
        return axis if not any(pads[place : place + 2]) else None

    def rows(self) -> int | None:
        axis = self.labels[0]
        assert isinstance(axis, int)
        if axis:
            return axis + len(self.output) - len(self.inputs[0])
        return 0 if self.output and self.output[0] % self.examples == 0 else None


_AXIS_AFTER: dict[str, Callable[[_View], Label | None]] = {
    "linear": lambda view: view.first(1),
    "matmul": _View.matmul,
    "conv2d": _View.images,
    "batch_norm": _View.images,
    "unary": _View.first,
    "affine": _View.first,
    "round": _View.first,
    "add": _View.elementwise,
    "mul": _View.elementwise,
    "where": _View.elementwise,
    "max_pool2d": _View.images,
    "avg_pool2d": _View.images,
    "adaptive_avg_pool2d": _View.images,
    "view": _View.view,
    "permute": _View.permute,
    "expand": _View.elementwise,
    "cross_entropy": lambda view: view.first(1),
    "normalise": lambda view: view.first(view.attrs["axes"]),  # type: ignore[arg-type]
    "softmax": lambda view: view.first(1),
    "logsumexp": lambda view: view.first(1),
    "attention": _View.attention,
    "slice": _View.along,
    "cat": _View.along,
    "pad": _View.pad,
    "rows": _View.rows,
    "sum": _View.sum,
}
