"""Affine layers and matrix products."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, NoRuleError, lowers


@lowers("linear.default")
def _linear(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    weight = lower.operand(a.weight)
    if lower.rank(weight) != 2:
        raise NoRuleError
    return lower.emit("linear", lower.operand(a.input), weight, lower.optional(a.bias), transposed=False)


@lowers("addmm.default")
def _addmm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    bias, left, right = lower.operand(a.self), lower.operand(a.mat1), lower.operand(a.mat2)
    if (
        a.beta == 1
        and a.alpha == 1
        and lower.rank(bias) == 1
        and lower.shape(bias)[0] == lower.shape(right)[1]
    ):
        return _times_matrix(lower, left, right, bias)
    product = lower.affine(_times_matrix(lower, left, right), float(a.alpha))
    return lower.emit("add", product, bias, alpha=float(a.beta))


@lowers("mm.default", "bmm.default")
def _mm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _product(lower, lower.operand(a.self), lower.operand(a.mat2))


@lowers("addmv.default")
def _addmv(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    product = lower.affine(_product(lower, lower.operand(a.mat), lower.operand(a.vec)), float(a.alpha))
    return lower.emit("add", product, lower.operand(a.self), alpha=float(a.beta))


@lowers("baddbmm.default")
def _baddbmm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    product = lower.affine(_product(lower, lower.operand(a.batch1), lower.operand(a.batch2)), float(a.alpha))
    return lower.emit("add", product, lower.operand(a.self), alpha=float(a.beta))


@lowers("matmul.default")
def _matmul(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _product(lower, lower.operand(a.self), lower.operand(a.other))


@lowers("mv.default")
def _mv(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _product(lower, lower.operand(a.self), lower.operand(a.vec))


@lowers("dot.default")
def _dot(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _product(lower, lower.operand(a.self), lower.operand(a.tensor))


@lowers("vdot.default")
def _vdot(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _product(lower, lower.operand(a.self), lower.operand(a.other))


def _product(lower: Lowering, a: int, b: int) -> int:
    """torch.matmul: a vector on the left is a row, on the right a column, for the time of the product."""
    row, column = lower.rank(a) == 1, lower.rank(b) == 1
    if row:
        a = lower.view(a, (1, *lower.shape(a)))
    if column:
        b = lower.view(b, (*lower.shape(b), 1))
    product = _times_matrix(lower, a, b) if lower.rank(b) == 2 else lower.emit("matmul", a, b)
    shape = list(lower.shape(product))
    if column:
        del shape[-1]
    if row:
        del shape[-1 if column else -2]
    return lower.view(product, shape)


def _times_matrix(lower: Lowering, x: int, matrix: int, bias: int | None = None) -> int:
    """x @ matrix + bias; the transpose of a weight is read in place, as `linear` does."""
    producer = lower.producer(matrix)
    if producer is not None and producer.kind == "permute" and producer.attrs["dims"] == (1, 0):
        return lower.emit("linear", x, producer.inputs[0], bias, transposed=False)
    return lower.emit("linear", x, matrix, bias, transposed=True)
