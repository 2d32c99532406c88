"""Scalar functions, element by element."""

from __future__ import annotations

from math import inf, log
from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, NoRuleError, lowers

# ATen name -> function of the vocabulary, for those without constants.
_PLAIN = (
    "relu",
    "tanh",
    "sigmoid",
    "silu",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "abs",
    "square",
    "hardsigmoid",
    "hardswish",
    "mish",
    "erf",
    "log1p",
    "expm1",
)

# Constants of the self-normalising ELU (Klambauer et al., 2017), as torch defines them.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@lowers(*(f"{name}.default" for name in _PLAIN))
def _plain(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary(str(node.target).split(".")[1], lower.operand(a.self))


@lowers("gelu.default")
def _gelu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("gelu_tanh" if a.approximate == "tanh" else "gelu", lower.operand(a.self))


@lowers("leaky_relu.default")
def _leaky_relu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("leaky_relu", lower.operand(a.self), a.negative_slope)


@lowers("elu.default")
def _elu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("elu", lower.operand(a.self), a.alpha, a.scale, a.input_scale)


@lowers("selu.default")
def _selu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("elu", lower.operand(a.self), _SELU_ALPHA, _SELU_SCALE, 1.0)


@lowers("celu.default")
def _celu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("elu", lower.operand(a.self), a.alpha, 1.0, 1.0 / a.alpha)


@lowers("softplus.default")
def _softplus(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("softplus", lower.operand(a.self), a.beta, a.threshold)


@lowers("log_sigmoid.default")
def _log_sigmoid(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    softplus = lower.unary("softplus", lower.affine(lower.operand(a.self), -1.0), 1.0, inf)
    return lower.affine(softplus, -1.0)


@lowers("pow.Tensor_Scalar")
def _power(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x, exponent = lower.operand(a.self), float(a.exponent)
    named = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(exponent)
    if exponent == 1:
        return x
    return lower.unary(named, x) if named else lower.unary("pow", x, exponent)


@lowers("pow.Scalar")
def _exponential(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    base = float(a.self)
    if base <= 0:
        raise NoRuleError
    return lower.unary("exp", lower.affine(lower.operand(a.exponent), log(base)))


@lowers("clamp.default", "clip.default", "clamp_min.default", "clamp_max.default")
def _clamp(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    least, most = getattr(a, "min", None), getattr(a, "max", None)
    return lower.unary(
        "clamp", lower.operand(a.self), -inf if least is None else least, inf if most is None else most
    )


@lowers("hardtanh.default")
def _hardtanh(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("hardtanh", lower.operand(a.self), a.min_val, a.max_val)


@lowers("relu6.default")
def _relu6(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("hardtanh", lower.operand(a.self), 0.0, 6.0)


@lowers("prelu.default", "_prelu_kernel.default")
def _prelu(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """relu(x) - slope relu(-x), one slope for all or one per channel (axis 1)."""
    x, slope = lower.operand(a.self), lower.operand(a.weight)
    rank = lower.rank(x)
    if "kernel" not in str(node.target) and rank > 1:
        slope = lower.view(slope, (lower.shape(slope)[-1] if lower.rank(slope) else 1, *[1] * (rank - 2)))
    below = lower.emit("mul", lower.unary("relu", lower.affine(x, -1.0)), slope)
    return lower.emit("add", lower.unary("relu", x), below, alpha=-1.0)


@lowers("log2.default", "log10.default")
def _logarithm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    base = 2 if "log2" in str(node.target) else 10
    return lower.affine(lower.unary("log", lower.operand(a.self)), 1 / log(base))


@lowers("exp2.default")
def _exp2(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return lower.unary("exp", lower.affine(lower.operand(a.self), log(2)))


@lowers("logaddexp.default")
def _log_add_exp(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    """b + softplus(a - b)"""
    x, y = lower.operand(a.self), lower.operand(a.other)
    return lower.emit(
        "add", y, lower.unary("softplus", lower.emit("add", x, y, alpha=-1.0), 1.0, inf), alpha=1.0
    )
