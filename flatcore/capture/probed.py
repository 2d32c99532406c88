"""A program with a probe behind every use of a parameter, for directions of each example's own.

Parameters become constants. Behind each use of one, y, an op `probe_...` stands for what a direction in this parameter
changes at y (csrc/engine/example_probes.h):

| kind | inputs | attributes besides `parameter, offset, examples, repeated` | use |
|---|---|---|---|
| `probe_linear` | y, x, weight | `transposed` | x Wᵀ |
| `probe_conv2d` | y, x, weight | `stride, padding, dilation, groups` | convolution of x |
| `probe_rows` | y, index | `frozen` | rows of an embedding, by an index of each example's own |
| `probe_broadcast` | y, elements, m? | `scale, size, distinct` | scale * p[elements] * m, the same p for all |

`parameter` is a number among the probed ones, `offset` its place in the flat vector, `repeated`: it has several uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .examples import Separation, separate
from .interpreter import meaning
from .program import Attribute, Op, Program, Value

# Ops without a second derivative in what they read along one way.
_LINEAR = ("view", "permute", "slice", "expand", "rows", "affine", "sum", "round", "pad", "linear", "add")

# What only moves the entries of a parameter, on its way to a use.
_MOVES = ("view", "permute", "slice", "expand", "rows")


@dataclass(frozen=True)
class ProbedProgram:
    """values, ops, loss, cut: as of a Program, with probes.

    probed: names of the parameters with probes. left: those that have none, constants all the same.
    elements: constants to compute: value id -> parameter id, ops that move its entries.
    crossings: ops that pick rows of examples; `crosses` tells whether one leaves its example.
    outputs_by_example: do the examples lie along axis 0 of the cut and of a cross-entropy's logits, as they do where
    parameters are used? Not in a model that transposes its data and its output back.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    loss: int
    cut: tuple[int, ...]
    examples: int
    probed: tuple[str, ...]
    left: tuple[str, ...]
    elements: dict[int, tuple[int, tuple[Op, ...]]]
    crossings: tuple[Op, ...]
    outputs_by_example: bool

    def behind_cut(self) -> tuple[Op, ...]:
        """The ops between the cut and the loss."""
        found, reached = [], set(self.cut)
        for op in self.ops:
            if op.output not in reached and any(i in reached for i in op.present):
                reached.add(op.output)
                found.append(op)
        return tuple(found)

    @property
    def cross_entropy(self) -> Op | None:
        """The op whose second derivative is all of the loss' in the model's output, up to linear ops."""
        behind = self.behind_cut()
        curved = [op for op in behind if op.kind not in _LINEAR]
        if len(curved) == 1 and curved[0].kind == "cross_entropy":
            return curved[0]
        return None

    def element_constants(self, constants: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The entries of a parameter that stand at each place of what is made of it."""
        found = {}
        for value, (parameter, moves) in self.elements.items():
            shape = self.values[parameter].shape
            moved = torch.arange(self.values[parameter].numel, device="cpu").reshape(shape)
            for op in moves:
                moved = meaning(op.kind, op.attrs, [moved, *(_constant(i, constants) for i in op.inputs[1:])])
            found[value] = moved.reshape(self.values[value].shape).contiguous()
        return found

    def crosses(self, constants: Mapping[int, Tensor]) -> Op | None:
        """An op that takes rows of one example for those of another; None where all stay with their own."""
        for op in self.crossings:
            x, index = op.inputs[0], op.inputs[1]
            assert x is not None and index is not None
            rows = self.values[x].shape[0] // self.examples
            owner = constants[index].reshape(self.examples, -1).div(rows, rounding_mode="floor")
            if not torch.equal(
                owner, torch.arange(self.examples, device=owner.device).unsqueeze(1).expand_as(owner)
            ):
                return op
        return None


def _constant(i: int | None, constants: Mapping[int, Tensor]) -> Tensor | None:
    """On the CPU, as all that says where elements are."""
    return None if i is None else constants[i].cpu()


@dataclass(frozen=True)
class _Use:
    """Where a parameter enters: behind `op`, through a probe of `kind` with these inputs behind y."""

    parameter: int
    op: Op
    kind: str
    inputs: tuple[int | None, ...]
    attrs: dict[str, Attribute]
    moves: tuple[Op, ...]


def probe(program: Program, offsets: Mapping[str, int]) -> ProbedProgram:
    """The program with a probe behind every use of each parameter that can have them.

    offsets: where each parameter begins in the flat vector. Raises NotSeparable where the loss is no sum over examples.
    """
    values = list(program.values)
    ops, cut = _unfused(program.ops, program.cut or (), values)
    labels = separate(ops, values, program).labels
    ops = _with_plain_norms(ops, values, labels)
    separation = separate(ops, values, program)
    uses, unfit = _uses(ops, values, program, separation)
    probed = tuple(i for i in program.parameters if i not in unfit)
    number = {parameter: k for k, parameter in enumerate(probed)}
    by_op: dict[int, list[_Use]] = defaultdict(list)
    for use in (use for i in probed for use in uses.get(i, ())):
        by_op[use.op.output].append(use)
    elements: dict[int, tuple[int, tuple[Op, ...]]] = {}
    out: list[Op] = []
    for op in ops:
        found = by_op.get(op.output, ())
        y = op.output
        if found:
            y = _new(values, values[op.output].shape, values[op.output].dtype, op.path)
        out.append(replace(op, output=y))
        for left, use in zip(range(len(found) - 1, -1, -1), found, strict=True):
            name = program.parameters[use.parameter]
            attrs: dict[str, Attribute] = {
                **use.attrs,
                "parameter": number[use.parameter],
                "offset": offsets[name],
                "examples": program.examples,
                "repeated": len(uses[use.parameter]) > 1,
            }
            inputs = use.inputs
            if use.kind == "probe_broadcast":
                size = values[use.parameter].numel
                shape = _moved_shape(use, values)
                index = _new(values, shape, torch.int64, name, "constant")
                elements[index] = use.parameter, use.moves
                inputs = (index, *inputs)
                attrs |= {"size": size, "distinct": _distinct(use.moves)}
            result = (
                op.output
                if not left
                else _new(values, values[op.output].shape, values[op.output].dtype, op.path)
            )
            out.append(Op(use.kind, (y, *inputs), result, attrs, op.path, op.aten))
            y = result
    values = [replace(v, kind="constant") if v.id in program.parameters else v for v in values]
    return ProbedProgram(
        tuple(values),
        tuple(out),
        program.loss,
        cut,
        program.examples,
        tuple(program.parameters[i] for i in probed),
        tuple(program.parameters[i] for i in program.parameters if i in unfit),
        elements,
        separation.crossings,
        _outputs_by_example(ops, cut, separation),
    )


def _outputs_by_example(ops: Sequence[Op], cut: tuple[int, ...], separation: Separation) -> bool:
    logits = [op.inputs[0] for op in ops if op.kind == "cross_entropy" and op.inputs[0] is not None]
    labels = separation.labels
    return all(labels.get(i) == 0 for i in (*cut, *(i for i in logits if i in labels)))


def _new(values: list[Value], shape: Sequence[int], dtype: Any, name: str, kind: Any = "activation") -> int:
    values.append(Value(len(values), kind, tuple(shape), dtype, name))
    return len(values) - 1


def _unfused(
    ops: Sequence[Op], cut: tuple[int, ...], values: list[Value]
) -> tuple[list[Op], tuple[int, ...]]:
    """With logits as values of their own: a probe stands behind them."""
    out: list[Op] = []
    for op in ops:
        if op.kind != "linear_cross_entropy":
            out.append(op)
            continue
        x, weight, bias, mass, index = op.inputs
        assert x is not None and weight is not None
        classes = values[weight].shape[1 if op.attrs["transposed"] else 0]
        dtype = values[op.output].dtype
        logits = z = _new(values, (*values[x].shape[:-1], classes), dtype, op.path)
        out.append(
            Op("linear", (x, weight, bias), z, {"transposed": op.attrs["transposed"]}, op.path, op.aten)
        )
        if op.attrs["round"]:
            z = _new(values, values[z].shape, dtype, op.path)
            out.append(Op("round", (logits,), z, {}, op.path, op.aten))
        out.append(Op("cross_entropy", (z, mass, index), op.output, {}, op.path, op.aten))
        cut = tuple(logits if i == op.output else i for i in cut)
    return out, cut


def _with_plain_norms(ops: Sequence[Op], values: list[Value], labels: Mapping[int, Any]) -> list[Op]:
    """With gains and shifts of norms as products and sums of their own."""
    out: list[Op] = []
    for op in ops:
        weight, bias = op.inputs[1:3] if op.kind in ("batch_norm", "normalise") else (None, None)
        if not any(i is not None and i in labels for i in (weight, bias)):
            out.append(op)
            continue
        shape, dtype = values[op.output].shape, values[op.output].dtype
        steps = [(kind, i) for kind, i in (("mul", weight), ("add", bias)) if i is not None]
        y = _new(values, shape, dtype, op.path)
        out.append(replace(op, inputs=(op.inputs[0], None, None, *op.inputs[3:]), output=y))
        for left, (kind, i) in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
            if op.kind == "batch_norm":  # over axis 1
                wide = (values[i].numel, *(1 for _ in shape[2:]))
                moved = _new(values, wide, dtype, op.path)
                out.append(Op("view", (i,), moved, {"shape": wide}, op.path, op.aten))
                i = moved
            result = _new(values, shape, dtype, op.path) if left else op.output
            attrs: dict[str, Attribute] = {"alpha": 1.0} if kind == "add" else {}
            out.append(Op(kind, (y, i), result, attrs, op.path, op.aten))
            y = result
    return out


def _uses(
    ops: Sequence[Op], values: Sequence[Value], program: Program, separation: Separation
) -> tuple[dict[int, list[_Use]], set[int]]:
    """The uses of each parameter, and the parameters that have some other one."""
    moved: dict[int, tuple[int, tuple[Op, ...]]] = {i: (i, ()) for i in program.parameters}
    uses: dict[int, list[_Use]] = {i: [] for i in program.parameters}
    unfit: set[int] = set()
    labels = separation.labels
    for op in ops:
        for position, i in enumerate(op.inputs):
            if i is None or i not in moved:
                continue
            parameter, moves = moved[i]
            apart = labels.get(op.output) == 0
            frozen = op.kind == "rows" and op.attrs["frozen"] != -1
            if position == 0 and op.kind in _MOVES and not apart and not frozen:
                moved[op.output] = parameter, (*moves, op)
                continue
            use = _use(op, position, parameter, moves, values) if apart else None
            if use is None:
                unfit.add(parameter)
            else:
                uses[parameter].append(use)
    for parameter, found in uses.items():
        if values[parameter].numel == 0 or (
            len(found) > 1 and any(use.kind == "probe_conv2d" for use in found)
        ):
            unfit.add(parameter)
    return uses, unfit


def _use(
    op: Op,
    position: int,
    parameter: int,
    moves: tuple[Op, ...],
    values: Sequence[Value],
) -> _Use | None:
    """None for one that no probe stands for."""
    x = op.inputs[0]

    def use(kind: str, inputs: tuple[int | None, ...], **attrs: Attribute) -> _Use:
        return _Use(parameter, op, kind, inputs, attrs, moves)

    plain = not moves
    turned = len(moves) == 1 and moves[0].kind == "permute" and moves[0].attrs["dims"] == (1, 0)
    matrix = len(values[parameter].shape) == 2
    if op.kind == "linear" and position == 1 and (plain or turned):
        return use("probe_linear", (x, parameter), transposed=bool(op.attrs["transposed"]) != turned)
    if op.kind == "matmul" and position == 1 and (plain or turned) and matrix:
        return use("probe_linear", (x, parameter), transposed=not turned)
    if op.kind == "conv2d" and position == 1 and plain:
        names = ("stride", "padding", "dilation", "groups")
        return use("probe_conv2d", (x, parameter), **{name: op.attrs[name] for name in names})
    if op.kind == "rows" and position == 0 and plain:
        return use("probe_rows", (op.inputs[1],), frozen=op.attrs["frozen"])
    if op.kind in ("linear", "conv2d") and position == 2 and plain:
        return use("probe_broadcast", (), scale=1.0)
    source = op.inputs[position]
    assert source is not None
    shape, y = values[source].shape, values[op.output].shape
    if len(shape) == len(y) and shape[0] != 1:  # not the same for all examples
        return None
    if op.kind == "expand":
        return use("probe_broadcast", (), scale=1.0)
    if op.kind == "add":
        return use("probe_broadcast", (), scale=float(op.attrs["alpha"]) if position else 1.0)  # type: ignore[arg-type]
    if op.kind == "mul" and op.inputs[0] != op.inputs[1]:
        return use("probe_broadcast", (op.inputs[1 - position],), scale=1.0)
    return None


def _moved_shape(use: _Use, values: Sequence[Value]) -> tuple[int, ...]:
    """Of the entries as they meet y."""
    if use.op.kind == "conv2d":  # a bias, over axis 1
        return (values[use.parameter].numel, 1, 1)
    return values[use.moves[-1].output if use.moves else use.parameter].shape


def _distinct(moves: Sequence[Op]) -> bool:
    return not any(op.kind in ("expand", "rows") for op in moves)
