"""Operations without a rule: which results are no values of a program, and the functions that compute with them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .external import External
from .graph import op_name

# What the model may compute in. The program has one of them: the selected parameters'.
REAL_DTYPES = (torch.float32, torch.float64)
_SINGLE = (torch.float32, torch.complex64)


@dataclass(frozen=True)
class Deferred:
    """A result that is no value: indices, a mask, complex numbers, several outputs, or a shape that the data
    decide. Whoever reads it computes it."""


@dataclass(frozen=True)
class Leaf:
    """Where a function begins: a value of the program, and what makes the node's tensor of it."""

    value: int
    restore: Callable[[Tensor], Tensor] | None


def has_fixed_shape(node: fx.Node) -> bool:
    """Does it give tensors, all of a shape that does not depend on the data?"""
    values = pytree.tree_leaves(node.meta.get("val"))
    tensors = [value for value in values if isinstance(value, Tensor)]
    return len(tensors) == len(values) and all(type(size) is int for t in tensors for size in t.shape)


def is_value(node: fx.Node) -> bool:
    """Can what a node gives be an activation of a program?"""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and has_fixed_shape(node) and value.dtype in REAL_DTYPES


def composed(
    node: fx.Node, leaf: Callable[[fx.Node], Leaf | None], dtype: torch.dtype
) -> tuple[External, list[int]]:
    """What computes `node`, in `dtype`, from values of a program; and the ids of these.

    leaf: where the function begins; None for a node that is part of it.
    """
    graph = fx.Graph()
    handles: dict[fx.Node, fx.Node] = {}
    inputs: dict[Leaf, fx.Node] = {}
    parts: list[fx.Node] = []
    pending = [node]
    while pending:  # a stack, not recursion: such chains can be deeper than Python's call stack
        current = pending[-1]
        start = leaf(current) if current is not node else None
        missing = [] if start else [n for n in current.all_input_nodes if n not in handles]
        if current in handles or not missing:
            pending.pop()
        if current not in handles and not missing:
            if start:
                handles[current] = _input(graph, inputs, start)
            else:
                handles[current] = _copy(graph, current, handles)
                parts.append(current)
        pending.extend(missing)
    result = handles[node]
    if node.meta["val"].dtype != dtype:
        result = graph.call_function(torch.Tensor.to, (result, dtype))
    graph.output(result)
    graph.lint()
    names = dict.fromkeys(op_name(part) for part in parts if part.target is not operator.getitem)
    rounds = any(getattr(part.meta.get("val"), "dtype", None) in _SINGLE for part in parts)
    shape = tuple(node.meta["val"].shape)
    function = External(_short(list(names)), fx.GraphModule(nn.Module(), graph), shape, dtype, rounds)
    return function, [start.value for start in inputs]


def _input(graph: fx.Graph, inputs: dict[Leaf, fx.Node], leaf: Leaf) -> fx.Node:
    if leaf not in inputs:
        # All placeholders must stand in front of all calls; the root stands behind the last node.
        first_call = next((n for n in graph.nodes if n.op != "placeholder"), graph._root)
        with graph.inserting_before(first_call):
            inputs[leaf] = graph.placeholder(f"x{len(inputs)}")
    handle = inputs[leaf]
    return handle if leaf.restore is None else graph.call_function(leaf.restore, (handle,))


def _copy(graph: fx.Graph, node: fx.Node, handles: Mapping[fx.Node, fx.Node]) -> fx.Node:
    assert node.op == "call_function", node
    copy = graph.node_copy(node, lambda n: handles[n])
    copy.meta.clear()
    copy.target = _TWICE_DIFFERENTIABLE.get(op_name(node), copy.target)
    return copy


def _short(names: list[str]) -> str:
    return " + ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    plain = torch.ops.aten._scaled_dot_product_attention_math.default
    result: Tensor = plain(query, key, value, attn_mask, dropout_p, is_causal, **named)[0]
    return result


# Of some operations torch has several forms, of which it may choose one that cannot be differentiated twice.
_TWICE_DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    "aten.scaled_dot_product_attention.default": _attention
}
