"""GELU in its tanh form, written out by a model (GPT-2's in Hugging Face, say), as one op.

Written out it is eight ops on the widest activations of a transformer, each a pass over all directions in each sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import isclose, pi, sqrt

from .program import Attribute, Op

_GELU: dict[str, Attribute] = {"function": "gelu_tanh", "a": 0.0, "b": 0.0, "c": 0.0}


def whole_gelus(ops: Sequence[Op], kept: Collection[int]) -> list[Op]:
    """The ops with each 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) as one `unary`.

    kept: values that must stay although no op reads them.
    """
    found: dict[int, Op] = {}
    gone: set[int] = set()
    chains = _Chains({op.output: op for op in ops}, Counter(i for op in ops for i in op.present), kept)
    for op in ops:
        match = chains.gelu(op)
        if match is not None:
            x, inner = match
            found[op.output] = replace(op, kind="unary", inputs=(x,), attrs=dict(_GELU))
            gone |= inner
    return [found.get(op.output, op) for op in ops if op.output not in gone]


@dataclass(frozen=True)
class _Chains:
    producers: dict[int, Op]
    readers: Counter[int]
    kept: Collection[int]

    def gelu(self, op: Op) -> tuple[int, set[int]] | None:
        """The x of a written-out GELU that ends with this op, and the values between; None for any other op."""
        if op.kind != "mul":
            return None
        for half, factor in (op.inputs, op.inputs[::-1]):
            x = self._affine(half, 0.5, 0.0)
            tanh = self._affine(factor, 1.0, 1.0)
            scaled = self._input(tanh, "unary", function="tanh")
            total = self._affine(scaled, sqrt(2 / pi), 0.0)
            terms = self._inputs(total, "add", alpha=1.0)
            cubic = next((i for i in terms if i != x), None)
            cube = self._affine(cubic, 0.044715, 0.0)
            if x is not None and x in terms and self._input(cube, "unary", function="pow", a=3.0) == x:
                inner = (half, factor, tanh, scaled, total, cubic, cube)
                return x, {i for i in inner if i is not None}
        return None

    def _inputs(self, value: int | None, kind: str, **attrs: Attribute) -> tuple[int | None, ...]:
        """Of the op that computes a value for one reader; empty where it is none of this kind."""
        op = self.producers.get(-1 if value is None else value)
        if op is None or op.kind != kind or self.readers[op.output] != 1 or op.output in self.kept:
            return ()
        return op.inputs if all(_same(op.attrs[name], wanted) for name, wanted in attrs.items()) else ()

    def _input(self, value: int | None, kind: str, **attrs: Attribute) -> int | None:
        return next(iter(self._inputs(value, kind, **attrs)), None)

    def _affine(self, value: int | None, scale: float, shift: float) -> int | None:
        return self._input(value, "affine", scale=scale, shift=shift)


def _same(got: Attribute, wanted: Attribute) -> bool:
    """Numbers up to how they were computed."""
    if isinstance(got, float) and isinstance(wanted, float):
        return isclose(got, wanted, rel_tol=1e-15)
    return got == wanted
