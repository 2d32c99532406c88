"""What a traced graph shows of writes: views of which the schema says nothing, and writes into what nothing else reads.

Activations with ``inplace=True`` behind a normalisation, and sums ``out += shortcut``, are most of what writes.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from .deferred import has_fixed_shape
from .graph import arguments, is_composite, outputs

_aten = torch.ops.aten
_NEW_THOUGH_COMPOSITE = {
    _aten.linear.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.batch_norm.default,
    _aten.layer_norm.default,
    _aten.group_norm.default,
    _aten.matmul.default,
}
_DROPOUT = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}


def without_hidden_views(exported: ExportedProgram) -> None:
    """Changes the graph where an operation gives the very tensor that it gets, or a view, and its schema does not say
    so: what writes into one writes into the other, of which torch's decompositions (2.13) know nothing."""
    given = set(outputs(exported))
    for node in list(exported.graph.nodes):
        shown = None if node in given else _shows(node)
        if shown is None:
            continue
        if shown.meta["val"].shape != node.meta["val"].shape:
            with exported.graph.inserting_before(node):
                base, shape = shown, tuple(node.meta["val"].shape)
                shown = exported.graph.call_function(_aten.expand.default, (base, shape))
                shown.meta = dict(node.meta)
        node.replace_all_uses_with(shown)
        exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _shows(node: fx.Node) -> fx.Node | None:
    """The tensor that the node's result is, or is a view of."""
    if node.target in _DROPOUT:
        a = arguments(node)
        return a.input if not a.train or a.p == 0 else None
    if node.target is _aten.type_as.default:
        x, other = node.args
        return x if x.meta["val"].dtype == other.meta["val"].dtype else None  # type: ignore[union-attr,return-value]
    if node.target is operator.getitem:
        several, position = node.args
        # A shape that the data decide cannot be compared.
        if several.target is _aten.broadcast_tensors.default and has_fixed_shape(node):  # type: ignore[union-attr]
            x = several.args[0][position]  # type: ignore[union-attr,index]
            return x if has_fixed_shape(x) else None  # type: ignore[arg-type,return-value]
    return None


def without_first_writes(exported: ExportedProgram) -> None:
    """Changes the graph: such a write becomes the operation that gives a new tensor. Where the tensor written into is
    new, no other is part of its memory, and what reads it later reads the operation's result in the graph."""
    given = set(outputs(exported))
    for node in exported.graph.nodes:
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node) or written in given or not _gives_new(written):
            continue
        functional = _functional(node)
        if functional is not None and set(written.users) == {node}:
            node.target = functional
    exported.graph_module.recompile()


def _gives_new(node: fx.Node) -> bool:
    """Is its result a tensor of its own memory? Composite operations need not say where it is not."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or len(op._schema.returns) != 1:
        return False
    if op._schema.returns[0].alias_info is not None:
        return False
    return op in _NEW_THOUGH_COMPOSITE or not is_composite(op)


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for a node of `aten.add_.Tensor` whose tensors have one type; None for what does not write."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or not op._schema.is_mutable:
        return None
    packet, _, overload = str(op).removeprefix("aten.").partition(".")
    found = getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None)
    if not packet.endswith("_") or found is None or found._schema.is_mutable:
        return None
    if [a.name for a in found._schema.arguments] != [a.name for a in op._schema.arguments]:
        return None
    values = [n.meta.get("val") for n in node.all_input_nodes]
    same = {value.dtype for value in values if isinstance(value, Tensor)}
    return found if len(same) == 1 and all(isinstance(value, Tensor) for value in values) else None
