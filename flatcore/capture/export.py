"""torch.export of a model and its loss on one batch, and from there to the program."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .assemble import assemble
from .batch import Structure, flatten_batch, split_batch
from .custom import recorded_functions, restore_functions
from .functional import functional_form
from .graph import Names, active_nodes, readable_path
from .in_place import without_first_writes, without_hidden_views
from .prelude import named_tensors
from .program import Program
from .refusals import (
    refuse_gradient_hooks,
    refuse_gradients_without_graph,
    refuse_stopped_gradients,
    refuse_tensor_hooks,
)
from .trial import tried

LossKind = Literal["output_target", "model_batch"]


def capture(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: Any,
    *,
    selected: Sequence[str],
    loss_kind: LossKind,
    allow_train_mode: bool = False,
) -> Program:
    """The program of `loss` on `batch` as a function of the selected parameters.

    selected:  names of `model.named_parameters()`; their order there is the order of the flat vector.
    loss_kind: "output_target": loss(model(*inputs), target), the batch being (inputs..., target) or a mapping
               that `split_batch` understands; "model_batch": loss(model, batch).
    allow_train_mode: normalisation layers may update their running statistics, which the program leaves out.
    Runs the model once on fake tensors; leaves model, loss and batch as they were. The program holds for
    batches of these shapes.

    Raises CaptureError, naming operation and module, for what the vocabulary cannot say: an unsupported or
    random operation, a stopped gradient, a changed buffer, a model that torch.export refuses. ValueError for
    unknown names, a batch of another form, or a loss that is not one number.
    """
    named = dict(model.named_parameters())
    unknown = [name for name in selected if name not in named]
    if unknown or not selected:
        raise ValueError(f"selected: expected names of parameters of the model, got {unknown or 'none'}")
    chosen = {name: t for name, t in named.items() if name in set(selected)}
    _check_dtypes(chosen)
    refuse_gradient_hooks(chosen)
    leaves, structure = flatten_batch(batch)
    examples = _examples(batch, leaves, loss_kind)
    wrapper = _Wrapper(model, loss, structure, loss_kind)
    with _requiring_gradients(chosen), recorded_functions():
        with _unchanged(model, loss):
            _forget_average_over_all(model)
            raw = _export(wrapper, leaves)
        without_hidden_views(raw)
        without_first_writes(raw)
        tensors = named_tensors(model, loss)
        names = Names(wrapper, {id(t): name for name, t in tensors.items()}, chosen)
        parameters, _ = names.inputs(raw)
        active = active_nodes(raw.graph, parameters)
        refuse_stopped_gradients(raw, active)
        with _quiet():
            exported = functional_form(raw, active)
        restore_functions(exported.graph)
    program = assemble(exported, names, loss_kind == "output_target", examples, allow_train_mode)
    if not any(op.external for op in program.ops):
        return program
    return tried(program, chosen, program.prelude.run(leaves, tensors))


@contextlib.contextmanager
def _requiring_gradients(chosen: Mapping[str, Tensor]) -> Iterator[None]:
    """What has a gradient is recognised by this mark while the model is traced."""
    frozen = [t for t in chosen.values() if not t.requires_grad]
    try:
        for t in frozen:
            t.requires_grad_(True)
        yield
    finally:
        for t in frozen:
            t.requires_grad_(False)


def _check_dtypes(chosen: Mapping[str, Tensor]) -> None:
    dtypes = {t.dtype for t in chosen.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise CaptureError(
            f"expected all selected parameters in float32 or float64, got {', '.join(map(str, dtypes))}"
        )


def _examples(batch: Any, leaves: list[Tensor], loss_kind: LossKind) -> int:
    """Length of axis 0 of the target, or of the first tensor that has axes; 1 for one example."""
    if loss_kind == "output_target":
        target = split_batch(batch)[2]
        leaves = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)] or leaves
        return int(leaves[0].shape[0]) if leaves and leaves[0].dim() else 1
    return next((int(leaf.shape[0]) for leaf in leaves if leaf.dim()), 1)


def _forget_average_over_all(model: nn.Module) -> None:
    """momentum=None has a layer read its count of batches to update statistics that the loss does not depend on;
    torch.export would stop there."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.momentum is None:
            module.momentum = 0.0


class _Wrapper(nn.Module):
    """forward(tensors of the batch) -> (loss, tensors of the model's output).

    The model's outputs are copied twice, once to mark where they stand and once for the loss, which may write
    into them.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], structure: Structure, loss_kind: LossKind
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.structure = structure
        self.loss_kind = loss_kind

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        batch = self.structure.rebuild(leaves)
        if self.loss_kind == "model_batch":
            return (_scalar(self.loss(self.model, batch)),)
        args, kwargs, target = split_batch(batch)
        outputs, spec = pytree.tree_flatten(self.model(*args, **kwargs))
        marks = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        handed = [mark.clone() if isinstance(mark, Tensor) else mark for mark in marks]
        value = _scalar(self.loss(pytree.tree_unflatten(handed, spec), target))
        return value, *(mark for mark in marks if isinstance(mark, Tensor))


class _NotScalar(ValueError):
    pass


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}"
        got = shape if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise _NotScalar(f"loss: expected one number, got {got}; take its mean over the examples")
    return loss.reshape(()) if loss.dim() else loss


def _export(wrapper: _Wrapper, leaves: list[Tensor]) -> ExportedProgram:
    try:
        with _quiet(), torch.enable_grad(), refuse_tensor_hooks(), refuse_gradients_without_graph():
            exported: ExportedProgram = torch.export.export(wrapper, tuple(leaves), strict=False)
            return exported
    except _NotScalar as error:
        raise ValueError(str(error)) from None
    except CaptureError as error:
        raise CaptureError(
            error.reason, op=error.op, path=error.path or _traced_module(error, wrapper)
        ) from None
    except Exception as error:  # whatever the user's own code or torch raises while it is traced
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = f"torch.export refused it ({type(error).__name__}: {lines[0][:200]})"
        if "fake tensor in the exported program constant's list" in lines[0]:
            reason = "it hides tensors from the trace, through .data or requires_grad_() on an input, say"
        if depends_on_values(error):
            reason = (
                f"its control flow depends on tensor values{_place(error)}, which a program cannot follow"
            )
        raise CaptureError(reason, path=_traced_module(error, wrapper)) from error


def depends_on_values(error: Exception) -> bool:
    """Did torch meet a number that is known only when the model runs? It calls them u0, u1, ..."""
    line = next(iter(str(error).strip().splitlines()), "")
    return "data-dependent" in line or bool(re.fullmatch(r"u\d+ -> u\d+", line))


def _place(error: BaseException) -> str:
    """The last line of code outside torch that led to an exception; nothing for code without a file."""
    ours = tuple(os.path.join(os.path.dirname(f), "") for f in (torch.__file__, os.path.dirname(__file__)))
    places = [
        f" ({os.path.basename(frame.f_code.co_filename)}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if os.path.isfile(frame.f_code.co_filename) and not frame.f_code.co_filename.startswith(ours)
    ]
    return places[-1] if places else ""


def _traced_module(error: BaseException, wrapper: nn.Module) -> str:
    """Path of the module in whose forward an exception was raised; "loss" where the model had ended."""
    paths = {id(module): name for name, module in wrapper.named_modules()}
    found = ""
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None:
            continue
        for frame, _ in traceback.walk_tb(current.__traceback__):
            module = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
            if isinstance(module, nn.Module) and frame.f_code.co_name == "forward" and id(module) in paths:
                found = paths[id(module)] or "loss"
        pending.append(current.__cause__ or current.__context__)
    return readable_path(found) if found else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns, logs and prints graphs about its internals: what matters is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _unchanged(*objects: object) -> Iterator[None]:
    """A forward pass may set attributes of a module (a cache, say) to fake tensors: put the old ones back."""
    modules = [m for thing in objects if isinstance(thing, nn.Module) for m in thing.modules()]
    saved = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in saved:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
