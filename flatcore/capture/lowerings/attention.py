"""Attention and what it is made of: softmax, logsumexp."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from ..lower import Lowering, Mask, NoRuleError, lowers


@lowers("scaled_dot_product_attention.default")
def _attention(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    if a.dropout_p:
        raise lower.error("draws random numbers; call model.eval() first")
    if lower.is_active(a.attn_mask) and isinstance(lower.result(a.attn_mask), Mask):
        raise NoRuleError
    q, k, v = lower.operand(a.query), lower.operand(a.key), lower.operand(a.value)
    front = torch.broadcast_shapes(*(_front(lower, x, a.enable_gqa) for x in (q, k, v)))
    if a.enable_gqa:
        k, v = (_shared_heads(lower, x, lower.shape(q)[-3]) for x in (k, v))
        front = torch.broadcast_shapes(*(_front(lower, x, False) for x in (q, k, v)))
    length, keys, width = lower.shape(q)[-2], lower.shape(k)[-2], lower.shape(q)[-1]
    scale = width**-0.5 if a.scale is None else float(a.scale)
    q, k, v = (lower.expand(x, (*front, *lower.shape(x)[-2:])) for x in (q, k, v))
    if lower.is_active(a.attn_mask):
        o = _with_learned_bias(lower, q, k, v, lower.operand(a.attn_mask), scale)
        return lower.view(o, node.meta["val"].shape)
    heads = front if len(front) == 2 else (prod(front), 1)
    q, k, v = (lower.view(x, (*heads, *lower.shape(x)[-2:])) for x in (q, k, v))
    mask, causal = None, bool(a.is_causal)
    if a.attn_mask is not None:
        handle = lower.take(a.attn_mask)
        known = lower.prelude.value(handle)
        causal = known is not None and _says_causal(known)
    if a.attn_mask is not None and not causal:
        if len(front) != 2 and handle.meta["val"].dim() > 2:
            handle = lower.prelude.call(_flat_mask, handle, front, length, keys)
        boolean = handle.meta["val"].dtype == torch.bool
        mask = lower.constant(handle, torch.bool if boolean else lower.dtype)
    o = lower.emit("attention", q, k, v, mask, causal=causal, scale=scale)
    return lower.view(o, node.meta["val"].shape)


@lowers("softmax.int", "_softmax.default", "_safe_softmax.default")
def _softmax(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    if lower.rank(x) == 0:
        return lower.affine(x, 0.0, 1.0)
    return lower.from_last(lower.emit("softmax", lower.to_last(x, a.dim)), a.dim)


@lowers("logsumexp.default")
def _logsumexp(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    x = lower.operand(a.self)
    shape = lower.shape(x)
    dims = sorted(dim % len(shape) for dim in ([a.dim] if isinstance(a.dim, int) else a.dim)) if shape else []
    kept = [i for i in range(len(shape)) if i not in dims]
    rows = lower.view(
        lower.permute(x, [*kept, *dims]), (*(shape[i] for i in kept), prod(shape[i] for i in dims))
    )
    return lower.view(lower.emit("logsumexp", rows), node.meta["val"].shape)


def _front(lower: Lowering, x: int, without_heads: bool) -> tuple[int, ...]:
    return lower.shape(x)[: -3 if without_heads else -2]


def _shared_heads(lower: Lowering, x: int, heads: int) -> int:
    """Each head of x for as many query heads as come on it (grouped queries; Ainslie et al., 2023)."""
    *front, groups, length, width = lower.shape(x)
    apart = lower.view(x, (*front, groups, 1, length, width))
    copies = lower.expand(apart, (*front, groups, heads // groups, length, width))
    return lower.view(copies, (*front, heads, length, width))


def _with_learned_bias(lower: Lowering, q: int, k: int, v: int, bias: int, scale: float) -> int:
    """Attention whose additive mask depends on the parameters, written out."""
    rank = lower.rank(k)
    keys = lower.permute(k, [*range(rank - 2), rank - 1, rank - 2])
    z = lower.emit("add", lower.affine(lower.emit("matmul", q, keys), scale), bias, alpha=1.0)
    return lower.emit("matmul", lower.emit("softmax", z), v)


def _says_causal(mask: Tensor) -> bool:
    """Query i sees the keys j <= i and no others: half of the work, and no mask to read."""
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(mask).masked_fill(~seen, -torch.inf)
    return bool((mask == seen).all())


def _flat_mask(mask: Tensor, front: tuple[int, ...], length: int, keys: int) -> Tensor:
    return mask.expand(*front, length, keys).reshape(-1, 1, length, keys)
