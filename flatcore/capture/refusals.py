"""What would have a program, but one with other derivatives than the user's: each is refused by name."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from ..errors import CaptureError
from .graph import Names, arguments, module_path, needed_nodes, outputs

_STOPS = "stops the gradient, so the loss has no Hessian that matches its gradient"
_DETACHED = ("aten.detach.default", "aten._local_scalar_dense.default", "aten.item.default")


def refuse_stopped_gradients(exported: ExportedProgram, active: Container[fx.Node]) -> None:
    """torch.no_grad around a value that depends on a parameter; decomposition removes its traces."""
    for node in needed_nodes(outputs(exported)[:1]):
        if "set_grad_enabled" in str(node.target) and node in active and node.args[0] is False:
            raise CaptureError(_STOPS, op="torch.no_grad", path=module_path(node))


def refuse_changed_buffers(exported: ExportedProgram, names: Names, allow_train_mode: bool) -> None:
    """A forward pass that writes into a buffer: the loss is another one the next time.

    allow_train_mode: the running statistics of normalisation layers may change, which do not enter a loss taken in
    train mode.
    """
    nodes = {node.name: node for node in exported.graph.nodes}
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            continue
        node = nodes[spec.arg.name]
        if allow_train_mode and (_updates_statistics(node) or names.is_statistic(str(spec.target))):
            continue
        while "getitem" in str(node.target):
            node = node.all_input_nodes[0]
        raise CaptureError(
            f"changes '{str(spec.target).removeprefix('model.')}', so two evaluations of the loss differ; "
            "call model.eval() if this is a normalisation layer in training mode",
            op=str(node.target),
            path=module_path(node),
        )


def _updates_statistics(node: fx.Node) -> bool:
    """Is it the running mean or variance as batch_norm leaves it?"""
    return node.target is operator.getitem and "batch_norm_legit_functional" in str(node.args[0].target)  # type: ignore[union-attr]


def refuse_random(nodes: Iterable[fx.Node]) -> None:
    """Random numbers drawn anywhere: the loss is another one the next time."""
    for node in nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        given = vars(arguments(node))
        training = given.get("train", given.get("training", True))
        probability = given.get("p", given.get("dropout_p", given.get("dropout", 1.0)))
        if given.get("num_layers") == 1:  # of a recurrent net, which drops between its layers
            continue
        if training and probability:
            raise CaptureError(
                "draws random numbers; call model.eval() first", op=str(node.target), path=module_path(node)
            )


def refuse_detached(nodes: Iterable[fx.Node], active: Container[fx.Node]) -> None:
    """A number that depends on a parameter and is taken out of its gradient: as itself or as a Python number."""
    for node in nodes:
        if node not in active or str(node.target) not in _DETACHED:
            continue
        source = node.all_input_nodes[0].meta["val"]
        if source.is_floating_point() or source.is_complex():
            raise CaptureError(_STOPS, op=str(node.target), path=module_path(node))


def refuse_gradient_hooks(selected: Mapping[str, Tensor]) -> None:
    """Hooks that may alter the gradient of a parameter."""
    for name, parameter in selected.items():
        if parameter._backward_hooks:
            raise CaptureError(
                f"parameter '{name}' has a gradient hook, which the captured program would not call"
            )


@contextlib.contextmanager
def refuse_tensor_hooks() -> Iterator[None]:
    """Refuse Tensor.register_hook while a model is traced by this thread."""
    tracing = threading.get_ident()
    register_hook: Any = Tensor.register_hook

    def checked_hook(self: Tensor, hook: Any) -> Any:
        if threading.get_ident() == tracing and self.requires_grad:
            raise CaptureError(
                "may alter the gradient, of which the graph shows nothing", op="Tensor.register_hook"
            )
        return register_hook(self, hook)

    with mock.patch.object(Tensor, "register_hook", checked_hook):
        yield


@contextlib.contextmanager
def refuse_gradients_without_graph() -> Iterator[None]:
    """Refuse torch.autograd.grad without create_graph, and backward(), while a model is traced by this thread: the
    traced graph would hold the gradient as a function of the parameters, where the model has a constant."""
    tracing = threading.get_ident()
    run: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def checked_run(
        outputs: Any, gradients: Any, keep: bool, create_graph: bool, *rest: Any, **named: Any
    ) -> Any:
        if threading.get_ident() == tracing and not create_graph:
            raise CaptureError(_STOPS, op="torch.autograd.grad without create_graph")
        return run(outputs, gradients, keep, create_graph, *rest, **named)

    with mock.patch.object(torch.autograd, "_engine_run_backward", checked_run):
        yield
