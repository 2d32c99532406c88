"""From the graph that torch.export gives to one in which no operation writes and each has a lowering, where it can."""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import partial

import torch
from torch import fx
from torch.export import ExportedProgram

from .graph import COMPOSITE, arguments, aten_name, is_composite, needed_nodes, outputs
from .lower import LOWERINGS

Ops = set[torch._ops.OpOverload]


def functional_form(exported: ExportedProgram, active: Collection[fx.Node]) -> ExportedProgram:
    """Functional ATen with whole ops kept, but for composite ones that no lowering knows (einsum, say).

    active: the nodes that depend on a parameter. Each of torch's decompositions runs the model again on fake tensors,
    which takes most of the time of a capture: the graph stays as it is where nothing in it writes and all is known.
    """
    lowered = needed_nodes(outputs(exported)).intersection(active)
    if all(map(_only_reads, exported.graph.nodes)) and all(map(_known, lowered)):
        return exported
    seen = _unknown_composites(exported.graph)  # some, such as a size that the data decide, stay as they are
    try:
        functional = _decomposed(exported, seen)
    except Exception:  # torch's own kernel does not trace
        seen, functional = set(), _decomposed(exported, set())
    while unknown := _unknown_composites(functional.graph) - seen:
        seen |= unknown
        try:
            functional = _decomposed(functional, unknown)
        except Exception:  # lowering then says what it does not know
            break
    return functional


def _decomposed(exported: ExportedProgram, ops: Ops) -> ExportedProgram:
    decomposed: ExportedProgram = exported.run_decompositions(
        {op: partial(op._op_dk, COMPOSITE) for op in ops}
    )
    return decomposed


def _only_reads(node: fx.Node) -> bool:
    """Is it an operation of ATen that gives new tensors or views, and nothing else?"""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if not isinstance(
        node.target, torch._ops.OpOverload
    ):  # torch._C._set_grad_enabled, a graph of its own, ...
        return node.target is operator.getitem
    if node.target is torch.ops.aten.detach_.default:  # of a tensor made by torch.tensor in the model
        return node.args[0].target is torch.ops.aten.lift_fresh_copy.default  # type: ignore[union-attr]
    return node.target.namespace in ("aten", "flatcore") and not node.target._schema.is_mutable


def _known(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or _has_lowering(node)


def _has_lowering(node: fx.Node) -> bool:
    return aten_name(node) in LOWERINGS and not _updates_statistics(node)


def _updates_statistics(node: fx.Node) -> bool:
    """Its schema does not say that a batch norm in train mode writes; what it is made of does."""
    return aten_name(node) == "batch_norm.default" and bool(arguments(node).training)


def _unknown_composites(graph: fx.Graph) -> Ops:
    return {
        node.target
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and not _has_lowering(node)
        and is_composite(node.target)
    }
