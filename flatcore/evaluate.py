"""The loss of one batch at given parameter values, in plain torch, without touching the model.

Besides the loss this finds out what the loss was: a call of a function of `torch.nn.functional` that is the
    whole loss tells its reduction, what it divides by, and where the model ends (its first argument).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flatcore.capture.batch import flatten_batch, split_batch
from flatcore.data import Batch, preserved_random_state
from flatcore.environment import full_float32, full_precision

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ModelLoss:
    """A loss `fn(model, batch)` that returns the scalar mean over the batch's examples, for any model and
    any batch."""

    fn: Callable[[nn.Module, Any], Tensor]


def hf_loss() -> ModelLoss:
    """The loss of models whose output carries it as `.loss` (Hugging Face, with labels in the batch)."""
    return ModelLoss(_loss_of_output)


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    loss = getattr(model(**batch) if isinstance(batch, Mapping) else model(*batch), "loss", None)
    if loss is None:
        raise ValueError("the model's output carries no .loss; put labels into the batch")
    return cast(Tensor, loss)


def takes_apart(loss: object) -> bool:
    """Is a batch taken apart here, and not in a function of the caller's?"""
    return not isinstance(loss, ModelLoss) or loss.fn is _loss_of_output


# The functions that can be a whole loss; the model ends at their first argument.
_LOSS_FUNCTIONS = (
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
    F.poisson_nll_loss,
)


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function, with every argument by name."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    result: Tensor

    @property
    def reduction(self) -> str:
        return str(self.arguments["reduction"])

    @property
    def normaliser(self) -> float | None:
        """What a mean cross-entropy divides by: its non-ignored targets, or the sum of their class weights.

        With class probabilities as targets torch divides by their number whatever the weights.
        """
        if self.function not in (F.cross_entropy, F.nll_loss) or self.reduction != "mean":
            return None
        scores, target = self.arguments["input"], self.arguments["target"]
        if target.is_floating_point():
            return float(target.numel() / scores.shape[1 if scores.dim() > 1 else 0])
        counted = target[target != self.arguments["ignore_index"]]
        weight = self.arguments["weight"]
        return float(counted.numel() if weight is None else weight[counted].sum())


_signature = functools.cache(inspect.signature)


class _LossCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.last: LossCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LOSS_FUNCTIONS:
            bound = _signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.last = LossCall(func, dict(bound.arguments), result)
        return result


def recorded_loss(loss: Callable[[], Tensor]) -> tuple[Tensor, LossCall | None]:
    """loss(), and the call of a loss function that it is nothing but, if it is."""
    with _LossCalls() as calls:
        result = loss()
    return result, calls.last if calls.last is not None and calls.last.result is result else None


@dataclass(frozen=True)
class Evaluation:
    """The loss of one batch, and the way from the model's outputs to it.

    outputs: the floating tensors the model hands to the loss (empty where they are not known).
    loss_of: the loss as a function of such outputs.
    call: the call of a loss function that gave the loss, if the loss is nothing but that.
    changed: names of the parameters that the model wrote into, where the evaluation was `guarded`.
    """

    loss: Tensor
    outputs: tuple[Tensor, ...]
    loss_of: Callable[[tuple[Tensor, ...]], Tensor]
    call: LossCall | None
    changed: tuple[str, ...] = ()


class Evaluator:
    """Evaluates (model, loss) with some parameters replaced; the rest enter detached, buffers as copies."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | ModelLoss) -> None:
        self._model = model
        self._loss = loss
        self._roots = [root for root in (model, loss) if isinstance(root, nn.Module)]

    def guarded(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Evaluation:
        """The same with copies of all parameters, which are then looked at for changes."""
        originals = dict(self._model.named_parameters()) | dict(parameters)
        copies = {name: value.detach().clone() for name, value in originals.items()}
        for name, value in parameters.items():
            copies[name].requires_grad_(value.requires_grad)
        result = self(batch, copies)
        changed = tuple(n for n, value in originals.items() if not _same(value.detach(), copies[n]))
        return dataclasses.replace(result, changed=changed)

    def __call__(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Evaluation:
        # In-place operations of the model must not reach the user's batch.
        tensors, structure = flatten_batch(batch)
        batch = structure.rebuild([t.clone() for t in tensors])
        output = target = None
        with _LossCalls() as calls, _substituted(self._roots, self._values(parameters)):
            if isinstance(self._loss, ModelLoss):
                loss = self._loss.fn(self._model, batch)
            else:
                args, kwargs, target = split_batch(batch)
                output = self._model(*args, **kwargs)
                loss = self._loss(output, target)
        call = calls.last if calls.last is not None and calls.last.result is loss else None
        if isinstance(self._loss, ModelLoss):
            if call is None:
                return Evaluation(loss, (), _unknown, None)
            rest = {k: v for k, v in call.arguments.items() if k != "input"}
            if any(isinstance(v, Tensor) and v.requires_grad for v in rest.values()):
                return Evaluation(loss, (), _unknown, call)
            return Evaluation(loss, (call.arguments["input"],), lambda z: call.function(z[0], **rest), call)
        leaves, tree = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
            replaced = list(leaves)
            for place, value in zip(places, outputs, strict=True):
                replaced[place] = value
            return self._loss(pytree.tree_unflatten(replaced, tree), target)  # type: ignore[operator]

        return Evaluation(loss, tuple(leaves[i] for i in places), loss_of, call)

    def _values(self, parameters: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """What stands in for each parameter and buffer, by the identity of the original."""
        values = {id(b): b.detach().clone() for root in self._roots for b in root.buffers()}
        # .data, unlike detach(), counts versions on its own
        originals = dict(self._model.named_parameters())
        others = (p for root in self._roots if root is not self._model for p in root.parameters())
        values |= {id(p): p.data for p in (*originals.values(), *others)}
        return values | {id(originals[name]): value for name, value in parameters.items()}


# Most of a module's attributes; its tensors stand in its dicts of parameters and buffers.
_NO_TENSORS = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set})


@contextlib.contextmanager
def _substituted(roots: list[nn.Module], values: Mapping[int, Tensor]) -> Iterator[None]:
    """The modules with other tensors in them; afterwards with all their attributes as they were.

    torch.func.functional_call is not used: in torch 2.13 it leaves its own tensors behind in a module that is
    registered under two names. Tensors are known by identity, so ties need no care, and lists of them
    (recurrent layers keep one) are replaced too.
    """

    def other(value: Any) -> Any:
        if isinstance(value, Tensor):
            return values.get(id(value), value)
        if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
            return type(value)(other(item) for item in value)
        return value

    modules = {id(m): m for root in roots for m in root.modules()}.values()
    saved = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    try:
        for module, attributes, own_parameters, own_buffers in saved:
            held = ((name, value) for name, value in attributes.items() if type(value) not in _NO_TENSORS)
            vars(module).update((name, other(value)) for name, value in held)
            module._parameters.update((name, other(value)) for name, value in own_parameters.items())
            module._buffers.update((name, other(value)) for name, value in own_buffers.items())
        yield
    finally:
        for module, attributes, own_parameters, own_buffers in saved:
            module._parameters.clear()
            module._parameters.update(own_parameters)
            module._buffers.clear()
            module._buffers.update(own_buffers)
            vars(module).clear()
            vars(module).update(attributes)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _unknown(_: tuple[Tensor, ...]) -> Tensor:
    raise ValueError("the model's outputs are not known")


def rows_mix(outputs_of: Callable[[Batch], Sequence[Tensor]], batch: Batch, examples: int) -> bool:
    """Do other rows of the outputs than the first example's depend on the first example's data?

    Tried with another example's data in their place. Each example has equally many rows along axis 0.
    """
    leaves, structure = flatten_batch(batch)
    others_first = [examples - 1, *range(1, examples)]
    replaced = structure.rebuild(
        [leaf[others_first] if leaf.shape[:1] == (examples,) else leaf for leaf in leaves]
    )
    for before, after in zip(outputs_of(batch), outputs_of(replaced), strict=True):
        own = before.shape[0] // examples
        scale = before.abs().max() * math.sqrt(torch.finfo(before.dtype).eps)
        if bool(((before - after)[own:].abs() > scale).any()):
            return True
    return False


def once_differentiable(run: Callable[[], _Result]) -> _Result:
    """run() with attention that holds no tensor of queries x keys, whose derivative has no derivative.

    That attention takes no mask of one axis, and no second derivatives that a model takes of its own: where it fails,
    run() goes without.
    """
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return run()


@contextlib.contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """For evaluations on a device: autograd on, autocast and TF32 off, attention in its twice differentiable form,
    random generators set back afterwards."""
    with (
        preserved_random_state(),
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(),
        full_float32(device),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
