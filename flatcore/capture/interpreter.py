"""The definition of the vocabulary: what each op means, in plain torch. Slow; the engine is held to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .program import Program

# unary: function -> f(x, a, b, c)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, a, b, c: F.relu(x),
    "leaky_relu": lambda x, a, b, c: F.leaky_relu(x, a),
    "elu": lambda x, a, b, c: torch.ops.aten.elu(x, a, b, c),
    "gelu": lambda x, a, b, c: F.gelu(x),
    "gelu_tanh": lambda x, a, b, c: F.gelu(x, approximate="tanh"),
    "silu": lambda x, a, b, c: F.silu(x),
    "tanh": lambda x, a, b, c: torch.tanh(x),
    "sigmoid": lambda x, a, b, c: torch.sigmoid(x),
    # F.softplus overflows in the branch it does not take when the threshold is infinite.
    "softplus": lambda x, a, b, c: torch.where(a * x > b, x, torch.logaddexp(a * x, torch.zeros_like(x)) / a),
    "square": lambda x, a, b, c: x * x,
    "abs": lambda x, a, b, c: x.abs(),
    "smooth_l1": lambda x, a, b, c: torch.where(x.abs() < a, 0.5 * x * x / a, x.abs() - 0.5 * a),
    "huber": lambda x, a, b, c: torch.where(x.abs() <= a, 0.5 * x * x, a * (x.abs() - 0.5 * a)),
    "exp": lambda x, a, b, c: x.exp(),
    "log": lambda x, a, b, c: x.log(),
    "sqrt": lambda x, a, b, c: x.sqrt(),
    "rsqrt": lambda x, a, b, c: x.rsqrt(),
    "reciprocal": lambda x, a, b, c: x.reciprocal(),
    "pow": lambda x, a, b, c: x**a,
    "sin": lambda x, a, b, c: x.sin(),
    "cos": lambda x, a, b, c: x.cos(),
    "clamp": lambda x, a, b, c: x.clamp(a, b),
    "hardtanh": lambda x, a, b, c: F.hardtanh(x, a, b),
    "hardsigmoid": lambda x, a, b, c: F.relu6(x + 3) / 6,  # F.hardsigmoid has no second derivative
    "hardswish": lambda x, a, b, c: F.hardswish(x),
    "mish": lambda x, a, b, c: F.mish(x),
    "erf": lambda x, a, b, c: x.erf(),
    "log1p": lambda x, a, b, c: x.log1p(),
    "expm1": lambda x, a, b, c: x.expm1(),
    "step": lambda x, a, b, c: (x > 0).to(x.dtype),
}


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, axes: int
) -> Tensor:
    dims = tuple(range(-axes, 0))
    if centred:
        x = x - x.mean(dims, keepdim=True)
    y = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """A row that sees no key is zero."""
    z = scale * q @ k.transpose(-2, -1)
    if causal:
        z = z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).triu(1), -torch.inf)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
    blind = (z == -torch.inf).all(-1, keepdim=True)
    return z.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ v


def _rows(x: Tensor, index: Tensor, frozen: int) -> Tensor:
    y = x.index_select(0, index.reshape(-1)).reshape(*index.shape, *x.shape[1:])
    if frozen < 0:
        return y
    constant = (index == frozen).reshape(*index.shape, *(1 for _ in x.shape[1:]))
    return torch.where(constant, y.detach(), y)


def _round(x: Tensor) -> Tensor:
    return x + (x.detach().float().to(x.dtype) - x.detach())


def _cross_entropy(z: Tensor, mass: Tensor, index: Tensor | None) -> Tensor:
    """`mass` of every class, or of the one class `index` of each row."""
    if index is None:
        return (mass * (z.logsumexp(-1, keepdim=True) - z)).sum(-1)
    return mass * (z.logsumexp(-1) - z.gather(-1, index.unsqueeze(-1)).squeeze(-1))


def _linear_cross_entropy(
    x: Tensor, w: Tensor, bias: Tensor | None, mass: Tensor, index: Tensor, transposed: bool, round: bool
) -> Tensor:
    z = F.linear(x, w.t() if transposed else w, bias)
    return _cross_entropy(_round(z) if round else z, mass, index)


# kind -> meaning(*inputs, **attrs); an absent input is None.
MEANING: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, bias, transposed: F.linear(x, w.t() if transposed else w, bias),
    "matmul": lambda a, b: torch.matmul(a, b),
    "conv2d": lambda x, w, bias, **attrs: F.conv2d(x, w, bias, **attrs),
    "batch_norm": lambda x, w, bias, mean, var, eps: F.batch_norm(x, mean, var, w, bias, eps=eps),
    "unary": lambda x, function, a, b, c: FUNCTIONS[function](x, a, b, c),
    "add": lambda a, b, alpha: torch.add(a, b, alpha=alpha),
    "mul": lambda a, b: a * b,
    "affine": lambda x, scale, shift: scale * x + shift,
    "sum": lambda x, dims, keepdim, scale: scale * x.sum(dims, keepdim),
    "max_pool2d": lambda x, kernel, stride, padding, dilation, ceil_mode: F.max_pool2d(
        x, kernel, stride, padding, dilation, ceil_mode
    ),
    "avg_pool2d": lambda x, kernel, stride, padding, ceil_mode, count_include_pad, divisor: F.avg_pool2d(
        x, kernel, stride, padding, ceil_mode, count_include_pad, divisor or None
    ),
    "adaptive_avg_pool2d": lambda x, output_size: F.adaptive_avg_pool2d(x, output_size),
    "view": lambda x, shape: x.reshape(shape),
    "permute": lambda x, dims: x.permute(dims),
    "expand": lambda x, shape: x.expand(shape),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "normalise": _normalise,
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "attention": _attention,
    "slice": lambda x, dim, start, step, length: x.index_select(
        dim, torch.arange(start, start + length * step, step, device=x.device)
    ),
    "cat": lambda *x, dim: torch.cat(x, dim),
    "pad": lambda x, pads, value: F.pad(x, pads, value=value),
    "rows": _rows,
    "where": lambda mask, a, b: torch.where(mask if mask.dtype == torch.bool else mask != 0, a, b),
    "round": _round,
    "external": lambda *x, function: function(*x),
}


def interpret(
    program: Program, parameters: Mapping[str, Tensor], constants: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Every value of the program by its id; `values[program.loss]` is the loss.

    parameters: tensors by name, as `program.parameters` names them.
    constants:  as `program.prelude.run` gives them.
    Differentiable by autograd and torch.func, to any order.
    """
    values = {i: parameters[name] for i, name in program.parameters.items()} | dict(constants)
    for op in program.ops:
        values[op.output] = meaning(op.kind, op.attrs, [None if i is None else values[i] for i in op.inputs])
    return values


def meaning(kind: str, attrs: Mapping[str, Any], inputs: list[Tensor | None]) -> Tensor:
    """One op applied to its inputs."""
    return MEANING[kind](*inputs, **attrs)


def cut_values(program: Program, values: Mapping[int, Tensor]) -> list[Tensor]:
    """What the model hands to the loss: the values of the cut, and the logits where a fused op holds them."""
    fused = {op.output: op for op in program.ops if op.kind == "linear_cross_entropy"}

    def value(i: int) -> Tensor:
        if i not in fused:
            return values[i]
        layer = [None if j is None else values[j] for j in fused[i].inputs[:3]]
        return meaning("linear", {"transposed": fused[i].attrs["transposed"]}, layer)

    return [value(i) for i in program.cut or ()]
