"""Reading an exported graph: what its inputs and outputs are in the user's model, and where a node stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
    path = re.sub(r"@\d+", "", stack[-1][0]) if stack else ""  # "@1": the second call of a module
    if path in ("", "loss") or path.startswith("loss."):
        return path or "loss"
    return path.removeprefix("model.")
