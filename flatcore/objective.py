"""The function whose curvature is asked for: the mean loss of a model over data, as a function of some
parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flatcore import changes, checks
from flatcore.capture.batch import split_batch
from flatcore.data import Batch, Data, count_examples
from flatcore.environment import ONE_AT_A_TIME, exclusive
from flatcore.evaluate import Evaluation, Evaluator, ModelLoss, hf_loss, plain_torch, takes_apart
from flatcore.memory import Budget
from flatcore.parameters import Selection, select
from flatcore.vectors import Layout

__all__ = ["ModelLoss", "Objective", "Snapshot", "WeightedBatch", "hf_loss"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class WeightedBatch:
    """A batch and its share of the objective, L = sum of weight * (loss of the batch)."""

    index: int
    batch: Batch
    examples: int
    weight: float


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of the selected parameters as they stood at one time, by name.

    versions: of all parameters; surroundings: of buffers, the loss and the data, which may decide what a batch
    counts; modules: their identities and modes.
    """

    values: dict[str, Tensor]
    versions: bytes
    surroundings: bytes
    modules: bytes

    @property
    def traces(self) -> tuple[bytes, bytes, bytes]:
        return self.versions, self.surroundings, self.modules


class Objective:
    """L(parameters) = mean loss over all examples of the data.

    Args:
        model: the module, in eval mode where it has dropout or batch normalisation (but see allow_train_mode).
            Nothing of it is changed, ever.
        loss: `loss(output, target)`, the mean over the batch; or `ModelLoss(fn)` with `fn(model, batch)`.
        data: one batch (a tuple or a mapping), a list of batches, or a loader that can be read again. For a
            loss of two arguments a batch is (inputs..., target), or a mapping with the target under target,
            targets, label, labels or y. The leading axis of a batch's first tensor counts its examples. Where
            the whole model is on a GPU, a batch that is wholly on the CPU is taken there, as in training; what
            ModelLoss(fn) gets is the batch as it was made.
        params: None for every parameter with requires_grad; else names, globs, or a callable(name, tensor)
            -> bool.
        memory: bytes for data, kept activations and the buffers of a product; default: half of what is free.
        allow_train_mode: take normalisation layers in train mode as what they are: they normalise by the batch's own
            mean and variance, so the examples of a batch interact, and how the data are cut into batches matters. L
            is then the mean of the batches' losses, weighted as below, and no longer that of one big batch. The
            running statistics stay as they are. Dropout in train mode, a random loss, is refused all the same.

    Batches may differ in size: each counts by its examples. If the loss is nothing but a mean
    `torch.nn.functional.cross_entropy` or `nll_loss`, each batch counts by what that divides by: its
    targets that are not ignored, or the sum of their class weights. So L is the mean over all examples (all
    targets), as from one big batch. A loss with reduction="sum" is taken with one batch only.

    The parameters are read when something is computed: after a step of an optimiser the same objective gives
    the curvature at the new point. Buffers, frozen parameters, and batches given as tensors or in a list, may
    change in place too, where torch counts it: a write through `.data` or numpy into these leaves no trace, and
    is not seen. What is none of these (a number in a module, a tensor that a function closes over) must stay as it
    is: make a new objective after changing it. Other threads may use objectives, also of the same model,
    but must not run the model itself meanwhile.

    Construction evaluates the loss once on every batch, and twice more on the
    first.

    Raises:
        TypeError, ValueError: one sentence that names the argument at fault.
    """

    @exclusive
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | ModelLoss,
        data: Any,
        params: Selection = None,
        *,
        memory: int | None = None,
        allow_train_mode: bool = False,
    ) -> None:
        checks.check_kinds(model, loss)
        # A compiled module cannot be differentiated twice; the module inside it is the same function.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.loss_function = loss
        selected = select(self.model, params)
        checks.check_finite(dict(self.model.named_parameters()), "parameter")
        self.allow_train_mode = bool(allow_train_mode)
        checks.check_mode(self.model, self.allow_train_mode)
        self.layout = Layout.of(selected)
        self.budget = Budget.of(memory, self.layout.device)
        self.data = Data(data, self.budget.data, self._count, self._device_of_batches())
        self.evaluate = Evaluator(self.model, loss)
        self._places: list[tuple[nn.Module, str]] = []
        self._snapshot: Snapshot | None = None
        self._loss: tuple[Snapshot, float] | None = None
        self.backends: object = None  # set by flatcore.backend, shared by the operators of this objective
        self._weights: tuple[float, ...] = ()
        self.snapshot()

    def __repr__(self) -> str:
        loss = self.loss_function.fn if isinstance(self.loss_function, ModelLoss) else self.loss_function
        return (
            f"Objective({type(self.model).__name__}, {getattr(loss, '__name__', type(loss).__name__)}: "
            f"{self.layout.size} parameters, {self.examples} examples in {len(self.data)} batches)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes programs and states of its own: the engine's cannot be copied."""
        return {**vars(self), "backends": None, "_snapshot": None, "_loss": None}

    @exclusive
    def check_parameters(self) -> None:
        """Raises ValueError where the selected parameters are no longer those the objective was made for."""
        current = dict(self.model.named_parameters())
        layout = self.layout
        for name, shape in layout.shapes.items():
            if name not in current or current[name].shape != shape:
                raise ValueError(
                    f"model: expected the parameters the objective was made for, got {name!r} gone or "
                    "reshaped; make a new Objective"
                )
            now = current[name]
            if now.dtype != layout.dtype or now.device != layout.device:
                raise ValueError(
                    f"model: expected parameters of {layout.dtype} on {layout.device}, as when the objective "
                    f"was made, got {now.dtype} on {now.device} for {name!r}; make a new Objective"
                )

    @property
    @exclusive
    def parameters(self) -> dict[str, Tensor]:
        """The selected parameters of the model by name, in the order of the flat vector."""
        self.check_parameters()
        current = dict(self.model.named_parameters())
        return {name: current[name] for name in self.layout.shapes}

    @property
    def parameter_slices(self) -> dict[str, slice]:
        """Where each selected parameter stands in the flat vector."""
        return self.layout.slices

    @property
    def examples(self) -> int:
        """Number of examples in all batches."""
        return sum(self.data.examples)

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of each batch in the mean; they sum to one."""
        return self._weights

    @exclusive
    def loss(self) -> float:
        """The value L at the present parameters. Costs one evaluation of the data, or nothing if it is
        known."""
        snapshot = self.snapshot()
        if self._loss is None or self._loss[0] is not snapshot:
            with plain_torch(self.layout.device), torch.no_grad():
                total = sum(
                    b.weight * float(self._evaluated(b.batch, snapshot.values, b.index).loss)
                    for b in self.batches()
                )
            self._loss = (snapshot, total)
        return self._loss[1]

    def batches(self) -> Iterator[WeightedBatch]:
        """The batches with their weights; those of weight zero (every target ignored) are left out."""
        for index, batch in enumerate(self.data):
            if self._weights[index]:
                yield WeightedBatch(index, batch, self.data.examples[index], self._weights[index])

    @exclusive
    def snapshot(self) -> Snapshot:
        """The selected parameters now: the same object as long as nothing changed that the loss depends on.

        Changes are seen by torch's version counters in all parameters, buffers and batches held in memory,
        by the mode of every module, and by comparing the selected parameters themselves (a write through
        `.data` leaves no other trace).
        """
        versions, surroundings, modules = traces = self._traces()
        old = self._snapshot
        if old and old.traces == traces and self._comparison(old).equal():
            return old
        current = self.parameters
        self._places = [_place(self.model, name) for name in current]
        if old:
            checks.check_mode(self.model, self.allow_train_mode)
            checks.check_finite(current, "parameter")
            if old.modules != modules:
                self.backends = None  # a program of the modules, or the modes, that were
        with torch.inference_mode(False):
            values = {n: p.detach().clone(memory_format=torch.contiguous_format) for n, p in current.items()}
        new = Snapshot(values, versions, surroundings, modules)
        if not old or (old.surroundings, old.modules) != (surroundings, modules):
            self._weigh(new)
        self._snapshot = new
        return new

    @property
    def last(self) -> Snapshot:
        """The last snapshot, which may be an old one."""
        return self._snapshot or self.snapshot()

    def at_present(self, work: Callable[[Snapshot], _Result]) -> _Result:
        """work(snapshot()), for work that may be done twice. On a GPU, which takes its time to compare the parameters,
        it is begun at the last snapshot meanwhile, and done again where that turns out to be an old one."""
        if not _goes_on_meanwhile(self.layout.device):
            return work(self.snapshot())
        with ONE_AT_A_TIME:
            old = self._snapshot
            comparison = self._comparison(old) if old and old.traces == self._traces() else None
        if old and comparison:
            try:
                result = work(old)
            except Exception:
                if comparison.equal():
                    raise
            else:
                if comparison.equal():
                    return result
                del result
        return work(self.snapshot())

    def _traces(self) -> tuple[bytes, bytes, bytes]:
        """Versions of all parameters; versions of the surroundings; identities and modes of the modules."""
        loss = self.loss_function
        parameters, surroundings, modules = changes.of_modules(
            self.model, loss if isinstance(loss, nn.Module) else None
        )
        return parameters, surroundings + self.data.versions(), modules

    def _comparison(self, snapshot: Snapshot) -> changes.Comparison:
        """Of each copied value with the parameter that now stands in its place."""
        values = list(snapshot.values.values())
        now = [module._parameters.get(key) for module, key in self._places]
        return changes.Comparison(
            values, [values[i].new_empty(0) if p is None else p for i, p in enumerate(now)]
        )

    def _device_of_batches(self) -> torch.device:
        """Where a batch goes that is on the CPU: to the model, if that is in one place and the batch is not the matter
        of the caller's own function."""
        device = self.layout.device
        tensors = (*self.model.parameters(), *self.model.buffers())
        together = all(t.device == device for t in tensors)
        return device if together and takes_apart(self.loss_function) else torch.device("cpu")

    def _count(self, batch: Batch, index: int) -> int:
        if not isinstance(self.loss_function, ModelLoss):
            target = split_batch(batch)[2]
            if isinstance(target, Tensor) and not target.dim():
                return 1  # one example without a batch axis
        return count_examples(batch, index)

    def _weigh(self, snapshot: Snapshot) -> None:
        """Evaluates and checks every batch: what it counts, and the loss."""
        values = snapshot.values
        losses, normalisers = [], []
        with plain_torch(self.layout.device), torch.no_grad():
            for index, batch in enumerate(self.data):
                result = checks.evaluate(self.evaluate.guarded, batch, values, index, twice=False)
                checks.check_unchanged(result)
                losses.append(float(result.loss))
                normalisers.append(self._normaliser(result))
                if index == 0:
                    again = self._evaluated(batch, values, index)
                    checks.check_repeats(self.model, losses[0], float(again.loss), self.layout.dtype)
                    self._check_dependence(batch, values)
        counts = self.data.examples if None in normalisers else normalisers
        total = float(sum(counts))  # type: ignore[arg-type]
        if total == 0:
            raise ValueError(
                "data: expected at least one target that is not ignored and has a weight, got none"
            )
        weights = tuple(count / total for count in counts)  # type: ignore[operator]
        for index, (value, weight) in enumerate(zip(losses, weights, strict=True)):
            if weight:
                checks.check_finite_loss(value, index)
        if list(map(bool, weights)) != list(map(bool, self._weights)):
            self.backends = None  # they know the batches that count
        self._weights = weights
        self._loss = (snapshot, sum(w * v for w, v in zip(weights, losses, strict=True) if w))

    def _evaluated(self, batch: Batch, values: dict[str, Tensor], index: int) -> Evaluation:
        return checks.evaluate(self.evaluate, batch, values, index, twice=False)

    def _normaliser(self, result: Evaluation) -> float | None:
        reduction = result.call.reduction if result.call else getattr(self.loss_function, "reduction", "mean")
        if reduction == "sum":
            self.refuse_sum()
        return result.call.normaliser if result.call else None

    def refuse_sum(self) -> None:
        """A sum over several batches of different size has no single mean."""
        if len(self.data) > 1:
            raise ValueError(
                f"loss: expected a mean over the batch to average over {len(self.data)} batches, got "
                'reduction="sum"; use '
                'reduction="mean", or pass one batch'
            )

    @torch.enable_grad()
    def _check_dependence(self, batch: Batch, values: dict[str, Tensor]) -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        if not self._evaluated(batch, leaves, 0).loss.requires_grad:
            raise ValueError(
                "loss: expected a differentiable function of the selected parameters, got one that does "
                "not depend on them; look for detach(), .item() or no_grad() in the model or the loss"
            )


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _goes_on_meanwhile(device: torch.device) -> bool:
    """Does it work while the process does something else?"""
    return device.type == "cuda"
