"""Views, axis permutations, copies and what else leaves the numbers as they are."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import fx

from ..deferred import REAL_DTYPES
from ..lower import Lowering, Mask, NoRuleError, Result, lowers


@lowers(
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "unflatten.int",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "unsqueeze.default",
    "view_as.default",
    "reshape_as.default",
)
def _view(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.view(lower.operand(a.self), node.meta["val"].shape)


@lowers("permute.default")
def _permute(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.permute(lower.operand(a.self), a.dims)


@lowers("transpose.int", "swapaxes.default", "swapdims.default")
def _transpose(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    dims = list(range(lower.rank(x)))
    if dims:
        first, second = list(vars(a).values())[1:]
        dims[first], dims[second] = dims[second], dims[first]
    return lower.permute(x, dims)


@lowers("t.default", "numpy_T.default", "mT.default", "matrix_H.default")
def _t(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    rank = lower.rank(x)
    whole = str(node.target) in ("aten.t.default", "aten.numpy_T.default")
    return lower.permute(x, reversed(range(rank)) if whole else [*range(rank - 2), rank - 1, rank - 2])


@lowers("expand.default", "expand_as.default", "broadcast_to.default")
def _expand(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.expand(lower.operand(a.self), node.meta["val"].shape)


@lowers("broadcast_tensors.default")
def _broadcast(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[Result, ...]:
    shapes = [value.shape for value in node.meta["val"]]
    return tuple(lower.expand(lower.operand(x), shape) for x, shape in zip(a.tensors, shapes, strict=True))


@lowers(
    "clone.default",
    "contiguous.default",
    "alias.default",
    "lift_fresh_copy.default",
    "_to_copy.default",
    "to.dtype",
    "to.device",
    "to.other",
    "to.dtype_layout",
    "type_as.default",
)
def _copy(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Result:
    """A cast to float32 inside a float64 model leaves a rounding; all else is computed in the program's dtype."""
    source, result = a.self.meta["val"], node.meta["val"]
    if not lower.is_active(a.self):  # of what depends on the parameters, the type alone is read
        if result.dtype not in REAL_DTYPES:
            raise NoRuleError
        return lower.constant(lower.prelude.call(torch.Tensor.to, lower.take(a.self), result.dtype))
    if isinstance(lower.result(a.self), Mask) and result.dtype in REAL_DTYPES:
        return lower.operand(a.self)
    if not (source.is_floating_point() and result.is_floating_point()):
        raise NoRuleError
    if result.device != source.device or not {source.dtype, result.dtype} <= set(REAL_DTYPES):
        raise lower.error(
            f"converts {source.dtype} on {source.device} to {result.dtype} on {result.device}; "
            "keep the model in one precision on one device"
        )
    if source.dtype == torch.float64 and result.dtype == torch.float32 and lower.dtype == torch.float64:
        return lower.emit("round", lower.operand(a.self))
    return lower.result(a.self)


@lowers("copy.default", "fill.Tensor")
def _overwrite(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    written = a.src if hasattr(a, "src") else a.value
    return lower.expand(lower.operand(written), node.meta["val"].shape)


@lowers("dropout.default", "feature_dropout.default", "alpha_dropout.default", "native_dropout.default")
def _dropout(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> Result:
    if a.train and a.p > 0:
        raise lower.error("draws random numbers; call model.eval() first")
    result = lower.result(a.input)
    return (result, None) if "native" in str(node.target) else result
