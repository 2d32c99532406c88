"""Cross-entropies fused with the linear layer that computes their logits, so that no logits are stored.

What moves whole rows of logits on the way to the loss (a shift by one token, say) moves rows of the layer's input
instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from .program import Op, Value

# Below, logits are no larger than other activations, and nothing is won: the time is the same (0.85 to 1.1 times,
# measured from 10 to 16,384 classes).
LEAST_CLASSES = 1024

_MOVES = ("view", "permute", "slice", "rows", "round")


@dataclass(frozen=True)
class Head:
    """A linear layer, the ops that move rows of its logits, and the cross-entropy of what they give."""

    linear: Op
    moves: tuple[Op, ...]
    loss: Op

    @property
    def logits(self) -> tuple[int, ...]:
        return (self.linear.output, *(op.output for op in self.moves))


def fuse(
    ops: list[Op], values: list[Value], cut: tuple[int, ...] | None, examples: int
) -> tuple[list[Op], tuple[int, ...] | None]:
    """The ops and the cut with each fitting head as one `linear_cross_entropy`; appends to `values`.

    A cut at the logits becomes one at the losses of the rows: what stands for the logits within the op.
    """
    for head in _heads(ops, values):
        if not _keeps_cut(head, values, cut, examples):
            continue
        fused = _fused(head, values)
        gone = set(head.logits)
        at = ops.index(head.loss)
        ops = [op for op in (*ops[:at], *fused, *ops[at + 1 :]) if op.output not in gone]
        if cut is not None and gone & set(cut):
            cut = (head.loss.output,)
    return ops, cut


def _heads(ops: Sequence[Op], values: Sequence[Value]) -> list[Head]:
    """The heads whose logits have many classes and nothing else reads."""
    producers = {op.output: op for op in ops}
    readers = Counter(i for op in ops for i in op.present)
    found = []
    for loss in ops:
        if loss.kind != "cross_entropy" or loss.inputs[2] is None:
            continue
        z = loss.inputs[0]
        assert z is not None
        if len(values[z].shape) < 2 or values[z].shape[-1] < LEAST_CLASSES:
            continue
        moves: list[Op] = []
        op = producers.get(z)
        while op is not None and op.kind in _MOVES and readers[op.output] == 1:
            moves.insert(0, op)
            op = producers.get(next(op.present))
        if op is None or op.kind != "linear" or readers[op.output] != 1:
            continue
        head = Head(op, tuple(moves), loss)
        if _class_axes(head, values):
            found.append(head)
    return found


def _class_axes(head: Head, values: Sequence[Value]) -> list[int]:
    """The axis of the classes in each of the logits; empty where some op does not leave the classes whole."""
    axes = [len(values[head.linear.output].shape) - 1]
    for op, source in zip(head.moves, head.logits, strict=False):
        axis = _moved_axis(op, values[source].shape, values[op.output].shape, axes[-1])
        if axis is None:
            return []
        axes.append(axis)
    return axes if axes[-1] == len(values[head.logits[-1]].shape) - 1 else []


def _moved_axis(op: Op, before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where axis `axis` of the input is in the output; None where it is not there as it was."""
    if op.kind == "view":
        same = (
            i
            for i, size in enumerate(after)
            if size == before[axis] and prod(after[:i]) == prod(before[:axis])
        )
        return next(same, None)
    if op.kind == "permute":
        return op.attrs["dims"].index(axis)  # type: ignore[union-attr, arg-type]
    if op.kind == "slice":
        return axis if op.attrs["dim"] != axis else None
    if op.kind == "rows":  # along axis 0, which makes room for the axes of the index
        return axis + len(after) - len(before) if axis > 0 and op.attrs["frozen"] == -1 else None
    return axis


def _keeps_cut(head: Head, values: Sequence[Value], cut: tuple[int, ...] | None, examples: int) -> bool:
    """Does the fused op still say where the model ends, and its rows which example they are of?"""
    if cut is None or not set(cut) & {*head.logits, head.loss.output}:
        return True
    if len(cut) > 1 or head.loss.output in cut:
        return False
    behind = head.moves[head.logits.index(cut[0]) :]
    return all(
        op.kind in ("view", "round")
        or (values[next(op.present)].shape[0] % examples == 0 and _leaves_axis_0(op))
        for op in behind
    )


def _leaves_axis_0(op: Op) -> bool:
    if op.kind == "permute":
        return op.attrs["dims"][0] == 0  # type: ignore[index]
    return op.kind == "slice" and op.attrs["dim"] != 0


def _fused(head: Head, values: list[Value]) -> list[Op]:
    """The moves of rows of x, and the fused op."""
    x, weight, bias = head.linear.inputs
    assert x is not None
    width, dtype = values[x].shape[-1], values[x].dtype
    moved: list[Op] = []
    for op, axis in zip(head.moves, _class_axes(head, values)[1:], strict=True):
        if op.kind == "round":  # of the logits: a matter of the fused op
            continue
        shape = values[op.output].shape
        shape = (*shape[:axis], width, *shape[axis + 1 :])
        attrs = {**op.attrs, "shape": shape} if op.kind == "view" else op.attrs
        values.append(Value(len(values), "activation", shape, dtype, op.path))
        moved.append(replace(op, inputs=(x, *op.inputs[1:]), output=values[-1].id, attrs=attrs))
        x = values[-1].id
    _, mass, index = head.loss.inputs
    rounds = any(op.kind == "round" for op in head.moves)
    attrs = {"transposed": head.linear.attrs["transposed"], "round": rounds}
    fused = replace(
        head.loss, kind="linear_cross_entropy", inputs=(x, weight, bias, mass, index), attrs=attrs
    )
    return [*moved, replace(fused, path=head.linear.path)]
