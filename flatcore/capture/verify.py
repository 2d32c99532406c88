"""Checks a program op by op before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .external import External
from .interpreter import FUNCTIONS, MEANING, meaning
from .program import Op, Program, Value

_PAIR = "2 ints"
_INTS = "ints"
_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "function": External}


@dataclass(frozen=True)
class Signature:
    """What an op takes: input names ("?": may be absent), its attributes and their types."""

    inputs: tuple[str, ...]
    attrs: Mapping[str, str]
    several: bool = False  # the one input may come any number of times


_WINDOW = {"kernel": _PAIR, "stride": _PAIR, "padding": _PAIR}
SIGNATURES: dict[str, Signature] = {
    "linear": Signature(("x", "weight", "bias?"), {"transposed": "bool"}),
    "matmul": Signature(("a", "b"), {}),
    "conv2d": Signature(
        ("x", "weight", "bias?"), {"stride": _PAIR, "padding": _PAIR, "dilation": _PAIR, "groups": "int"}
    ),
    "batch_norm": Signature(("x", "weight?", "bias?", "mean", "var"), {"eps": "float"}),
    "unary": Signature(("x",), {"function": "str", "a": "float", "b": "float", "c": "float"}),
    "add": Signature(("a", "b"), {"alpha": "float"}),
    "mul": Signature(("a", "b"), {}),
    "affine": Signature(("x",), {"scale": "float", "shift": "float"}),
    "sum": Signature(("x",), {"dims": _INTS, "keepdim": "bool", "scale": "float"}),
    "max_pool2d": Signature(("x",), {**_WINDOW, "dilation": _PAIR, "ceil_mode": "bool"}),
    "avg_pool2d": Signature(
        ("x",), {**_WINDOW, "ceil_mode": "bool", "count_include_pad": "bool", "divisor": "int"}
    ),
    "adaptive_avg_pool2d": Signature(("x",), {"output_size": _PAIR}),
    "view": Signature(("x",), {"shape": _INTS}),
    "permute": Signature(("x",), {"dims": _INTS}),
    "expand": Signature(("x",), {"shape": _INTS}),
    "cross_entropy": Signature(("z", "mass", "index?"), {}),
    "linear_cross_entropy": Signature(
        ("x", "weight", "bias?", "mass", "index"), {"transposed": "bool", "round": "bool"}
    ),
    "normalise": Signature(("x", "weight?", "bias?"), {"eps": "float", "centred": "bool", "axes": "int"}),
    "softmax": Signature(("x",), {}),
    "logsumexp": Signature(("x",), {}),
    "attention": Signature(("q", "k", "v", "mask?"), {"causal": "bool", "scale": "float"}),
    "slice": Signature(("x",), {"dim": "int", "start": "int", "step": "int", "length": "int"}),
    "cat": Signature(("x",), {"dim": "int"}, several=True),
    "pad": Signature(("x",), {"pads": _INTS, "value": "float"}),
    "rows": Signature(("x", "index"), {"frozen": "int"}),
    "where": Signature(("mask", "a", "b"), {}),
    "round": Signature(("x",), {}),
    "external": Signature(("x",), {"function": "function"}, several=True),
}
assert SIGNATURES.keys() == MEANING.keys()

# Inputs whose derivative the vocabulary does not have.
CONSTANT_INPUTS = {
    "batch_norm": ("mean", "var"),
    "cross_entropy": ("mass", "index?"),
    "linear_cross_entropy": ("mass", "index"),
    "attention": ("mask?",),
    "rows": ("index",),
}
# Inputs that need not be numbers of the program's dtype, and what they may be instead.
_OTHER_DTYPES = {
    ("attention", "mask?"): torch.bool,
    ("rows", "index"): torch.int64,
    ("cross_entropy", "index?"): torch.int64,
    ("linear_cross_entropy", "index"): torch.int64,
    ("where", "mask"): torch.bool,
}
_OWN_DTYPE_ALLOWED = {("attention", "mask?"), ("where", "mask")}


class VerificationError(ValueError):
    """A program that breaks the rules of the vocabulary: a defect of the lowering that made it."""


def verify(program: Program) -> None:
    """Raise VerificationError, naming op index, kind and module path, where an op breaks a rule."""
    _check_leaves(program)
    defined = set(program.parameters) | set(program.constants)
    active = program.active()
    for index, op in enumerate(program.ops):
        problem = _problem(op, program.values, defined, active)
        if problem:
            raise VerificationError(f"op {index} ({op.kind}, in module '{op.path}'): {problem}")
        defined.add(op.output)
    for name, ids in (("loss", (program.loss,)), ("cut", program.cut or ())):
        for i in ids:
            if i not in defined or program.values[i].kind != "activation":
                raise VerificationError(f"{name}: expected the id of a computed activation, got {i}")
    if program.values[program.loss].numel != 1:
        raise VerificationError(f"loss: expected one number, got shape {program.values[program.loss].shape}")
    if program.normaliser is not None and program.normaliser not in program.constants:
        raise VerificationError(f"normaliser: expected the id of a constant, got {program.normaliser}")


def infer(
    kind: str, attrs: Mapping[str, Any], inputs: Sequence[Value | None]
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of an op's output: its meaning, applied to tensors without data."""
    if kind == "external":  # which the exported graph knows, and not every operation without data
        return attrs["function"].shape, attrs["function"].dtype
    metas: list[Tensor | None] = [
        None if v is None else torch.empty(v.shape, dtype=v.dtype, device="meta") for v in inputs
    ]
    with torch.no_grad():
        output = meaning(kind, attrs, metas)
    return tuple(output.shape), output.dtype


def _check_leaves(program: Program) -> None:
    for position, value in enumerate(program.values):
        if value.id != position:
            raise VerificationError(f"value {position}: expected its position as id, got {value.id}")
        known = {"parameter": program.parameters, "constant": program.constants}.get(value.kind)
        if known is not None and value.id not in known:
            raise VerificationError(f"value {value.id}: a {value.kind} that the program does not list")
    if tuple(program.prelude.outputs) != tuple(program.constants):
        raise VerificationError("prelude: its outputs are not the constants of the program")


def _problem(op: Op, values: Sequence[Value], defined: set[int], active: frozenset[int]) -> str:
    signature = SIGNATURES.get(op.kind)
    if signature is None:
        return f"unknown kind; known are {', '.join(SIGNATURES)}"
    names = signature.inputs * (len(op.inputs) if signature.several else 1)
    if len(op.inputs) != len(names) or not names:
        return f"expected inputs {', '.join(signature.inputs)}, got {len(op.inputs)} of them"
    for name, i in zip(names, op.inputs, strict=True):
        if i is None and not name.endswith("?"):
            return f"input {name} is absent"
        if i is not None and i not in defined:
            return f"input {name} is value {i}, which is not computed before this op"
        if i in active and name in CONSTANT_INPUTS.get(op.kind, ()):
            return f"input {name.rstrip('?')} must not depend on a parameter"
    if not 0 <= op.output < len(values) or op.output in defined:
        return f"output {op.output} does not exist or is computed twice"
    inputs = [None if i is None else values[i] for i in op.inputs]
    problem = _attribute_problem(op, signature) or _extra_problem(op, inputs)
    if problem:
        return problem
    recorded = values[op.output].shape, values[op.output].dtype
    for name, v in zip(names, inputs, strict=True):
        allowed = {_OTHER_DTYPES.get((op.kind, name), recorded[1])}
        if (op.kind, name) in _OWN_DTYPE_ALLOWED:
            allowed.add(recorded[1])
        if op.kind == "external" and v is not None and v.kind == "constant":
            continue
        if v is not None and v.dtype not in allowed:
            return f"expected input {name.rstrip('?')} of {' or '.join(map(str, allowed))}, got {v.dtype}"
    try:
        inferred = infer(op.kind, op.attrs, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [v.shape if v else None for v in inputs]
        return f"does not apply to shapes {shapes}: {str(error).splitlines()[0]}"
    if inferred != recorded:
        return f"yields {inferred[0]} {inferred[1]}, recorded is {recorded[0]} {recorded[1]}"
    return ""


def _attribute_problem(op: Op, signature: Signature) -> str:
    if op.attrs.keys() != signature.attrs.keys():
        return f"expected attributes {sorted(signature.attrs)}, got {sorted(op.attrs)}"
    for name, expected in signature.attrs.items():
        value = op.attrs[name]
        if expected in _TYPES:
            good = type(value) is _TYPES[expected]  # exact: a bool is an int too
        else:
            good = type(value) is tuple and all(type(i) is int for i in value)
            good = good and (expected != _PAIR or len(value) == 2)  # type: ignore[arg-type]
        if not good:
            return f"attribute {name}: expected {expected}, got {value!r}"
    return ""


def _extra_problem(op: Op, inputs: Sequence[Value | None]) -> str:
    """Rules stricter than what plain torch would accept."""
    ranks = [len(v.shape) if v is not None else -1 for v in inputs]
    if op.kind == "unary" and op.attrs["function"] not in FUNCTIONS:
        return f"unknown function '{op.attrs['function']}'; known are {', '.join(FUNCTIONS)}"
    if op.kind.startswith("linear") and (ranks[0] < 1 or ranks[1] != 2 or ranks[2] not in (-1, 1)):
        return "expected x of at least one axis, a matrix as weight and a vector as bias"
    if op.kind == "matmul" and min(ranks) < 2:
        return "expected at least two axes on both sides"
    if op.kind in ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d") and ranks[0] != 4:
        return f"expected x of 4 axes, got {ranks[0]}"
    if op.kind == "batch_norm" and ranks[0] < 2:
        return f"expected x of at least 2 axes, got {ranks[0]}"
    if op.kind == "attention" and set(ranks[:3]) != {4}:
        return "expected q, k and v of 4 axes"
    if op.kind == "normalise" and not 1 <= op.attrs["axes"] <= ranks[0]:  # type: ignore[operator]
        return f"axes must be between 1 and {ranks[0]}"
    if op.kind == "slice" and (op.attrs["start"] < 0 or op.attrs["step"] < 1):  # type: ignore[operator]
        return "start must not be negative, step must be positive"
    if op.kind == "sum" and not op.attrs["dims"]:
        return "dims must name at least one axis"
    if op.kind.endswith("cross_entropy"):
        logits, (mass, index) = inputs[0], inputs[-2:]
        assert logits is not None and mass is not None
        rows = logits.shape[:-1]
        if not logits.shape or mass.shape != (rows if index else logits.shape):
            return "mass must have the shape of the logits, or with an index that of their rows"
        if index is not None and index.shape != rows:
            return "index must have the shape of the rows"
    return ""
