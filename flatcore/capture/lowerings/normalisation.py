"""Batch normalisation in eval mode; weight normalisation."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, lowers


@lowers("_native_batch_norm_legit_no_training.default")
def _batch_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, None, None]:
    mean, var = lower.constant(lower.take(a.running_mean)), lower.constant(lower.take(a.running_var))
    weight, bias = lower.optional(a.weight), lower.optional(a.bias)
    return (
        lower.emit("batch_norm", lower.operand(a.input), weight, bias, mean, var, eps=float(a.eps)),
        None,
        None,
    )


@lowers("_native_batch_norm_legit_functional.default", "_native_batch_norm_legit.no_stats")
def _batch_statistics(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, None, None]:
    raise lower.error(
        "normalises by the statistics of the batch; call model.eval() and track running statistics"
    )


@lowers("_weight_norm.default", "_weight_norm_interface.default")
def _weight_norm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int | tuple[int, None]:
    v, g = lower.operand(a.v), lower.operand(a.g)
    axes = [axis for axis in range(lower.rank(v)) if axis != a.dim % lower.rank(v) or a.dim == -1]
    inverse = lower.unary("rsqrt", lower.sum(lower.unary("square", v), axes, keepdim=lower.rank(g) > 0))
    weight = lower.emit("mul", v, lower.emit("mul", g, inverse))
    return weight if "interface" not in str(node.target) else (weight, None)
