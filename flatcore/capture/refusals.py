"""What has a program but not the right derivatives: stopped gradients, changed buffers, random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from ..errors import CaptureError
from .graph import Names, module_path, outputs
from .lower import active_nodes, arguments, needed_nodes


def refuse_stopped_gradients(exported: ExportedProgram, names: Names) -> None:
    """torch.no_grad around a value that depends on a parameter; only the graph before decomposition still shows it."""
    parameters, _ = names.inputs(exported)
    active = active_nodes(exported.graph, parameters)
    for node in needed_nodes(outputs(exported)[:1]):
        if "set_grad_enabled" in str(node.target) and node in active and node.args[0] is False:
            raise CaptureError(
                "stops the gradient, so the loss has no Hessian that matches its gradient",
                op="torch.no_grad",
                path=module_path(node),
            )


def refuse_changed_buffers(exported: ExportedProgram) -> None:
    """A forward pass that writes into a buffer: the loss is another one the next time."""
    nodes = {node.name: node for node in exported.graph.nodes}
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            continue
        node = nodes[spec.arg.name]
        while "getitem" in str(node.target):
            node = node.all_input_nodes[0]
        raise CaptureError(
            f"changes '{str(spec.target).removeprefix('model.')}', so two evaluations of the loss differ; "
            "call model.eval() if this is a normalisation layer in training mode",
            op=str(node.target),
            path=module_path(node),
        )


def refuse_random(nodes: Iterable[fx.Node]) -> None:
    """Random numbers drawn anywhere: the loss is another one the next time."""
    for node in nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        given = vars(arguments(node))
        training = given.get("train", given.get("training", True))
        probability = given.get("p", given.get("dropout_p", 1.0))
        if training and probability:
            raise CaptureError(
                "draws random numbers; call model.eval() first", op=str(node.target), path=module_path(node)
            )
