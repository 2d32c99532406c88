"""Reading an exported graph: what its inputs and outputs are in the user's model, and where a node stands."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .prelude import Source


@dataclass(frozen=True)
class Names:
    """What the tensors of the exported module are called in the user's model and loss."""

    module: nn.Module
    names: Mapping[int, str]  # id of a tensor -> name
    selected: Mapping[str, Tensor]

    def inputs(self, exported: ExportedProgram) -> tuple[dict[fx.Node, str], dict[fx.Node, Source]]:
        """The placeholders of selected parameters with their names, and the sources of all others."""
        nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        parameters, sources, leaf = {}, {}, 0
        for spec in exported.graph_signature.input_specs:
            if spec.kind == InputKind.TOKEN:  # orders ops with side effects, holds nothing
                continue
            node = nodes[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                sources[node] = Source(leaf=leaf)
                leaf += 1
                continue
            assert spec.target is not None
            name = self._name(spec.target)
            if name is None:
                sources[node] = Source(tensor=exported.constants[spec.target])
            elif name in self.selected:
                parameters[node] = name
            else:
                sources[node] = Source(name=name)
        return parameters, sources

    def is_statistic(self, target: str) -> bool:
        """Is the buffer at `target` kept by a normalisation layer over what it has seen?"""
        path, _, attribute = target.rpartition(".")
        layer = isinstance(self.module.get_submodule(path), nn.modules.batchnorm._NormBase)
        return layer and attribute in ("running_mean", "running_var", "num_batches_tracked")

    def _name(self, target: str) -> str | None:
        """The user's name of the tensor at `target`; None for a tensor that export found in the code."""
        path, _, attribute = target.rpartition(".")
        try:
            tensor = getattr(self.module.get_submodule(path), attribute)
        except AttributeError:
            return None
        return self.names.get(id(tensor))


def outputs(exported: ExportedProgram) -> list[fx.Node]:
    """The nodes of the loss and of the model's outputs."""
    nodes = {node.name: node for node in exported.graph.nodes}
    specs = exported.graph_signature.output_specs
    return [nodes[spec.arg.name] for spec in specs if spec.kind == OutputKind.USER_OUTPUT]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module around a node; "model" for the model's root, "loss" for the loss."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return readable_path(re.sub(r"@\d+", "", stack[-1][0]) if stack else "")  # "@1": a module's second call


def readable_path(path: str) -> str:
    """The user's name for a module of the exported wrapper."""
    if path in ("", "loss") or path.startswith("loss."):
        return path or "loss"
    return path.removeprefix("model.")


def is_composite(op: torch._ops.OpOverload) -> bool:
    """Does torch have a kernel of it that is written in terms of other operations?"""
    return bool(op.has_kernel_for_dispatch_key(COMPOSITE))


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # where such kernels are kept

# Ops that read only the shape of their first input: what they give does not depend on the parameters.
FILL_VALUES: dict[str, Callable[[SimpleNamespace], Any]] = {
    "zeros_like.default": lambda a: 0,
    "ones_like.default": lambda a: 1,
    "full_like.default": lambda a: a.fill_value,
    "empty_like.default": lambda a: 0,  # whoever reads it has written it first
    "zero.default": lambda a: 0,
    "fill.Scalar": lambda a: a.value,
    "new_empty.default": lambda a: 0,
    "new_zeros.default": lambda a: 0,
    "new_ones.default": lambda a: 1,
    "new_full.default": lambda a: a.fill_value,
}


def aten_name(node: fx.Node) -> str:
    """Name of an ATen overload: "add.Tensor" for torch.ops.aten.add.Tensor."""
    return str(node.target).removeprefix("aten.")


def op_name(node: fx.Node) -> str:
    """Name of an operation for people: "aten.add.Tensor"; of one of several outputs, that of what gives them."""
    if node.target is operator.getitem:
        return op_name(node.args[0])  # type: ignore[arg-type]
    named = isinstance(node.target, str | torch._ops.OperatorBase)
    return str(node.target) if named else getattr(node.target, "__qualname__", str(node.target))


def arguments(node: fx.Node) -> SimpleNamespace:
    """The arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return SimpleNamespace(**{s.name: given.get(s.name, s.default_value) for s in schema.arguments})


def fill_value(node: fx.Node) -> Any:
    """The number with which a shape-only op fills its output; None for any other op."""
    rule = FILL_VALUES.get(aten_name(node)) if node.op == "call_function" else None
    return rule(arguments(node)) if rule else None


def active_nodes(graph: fx.Graph, parameters: Mapping[fx.Node, str]) -> set[fx.Node]:
    """The nodes whose numbers depend on a selected parameter."""
    active: set[fx.Node] = set()
    for node in graph.nodes:
        reached = fill_value(node) is None and any(n in active for n in node.all_input_nodes)
        if reached or node in parameters:
            active.add(node)
    return active


def needed_nodes(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that `outputs` need, themselves included."""
    needed: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes if fill_value(node) is None else ())
    return needed
