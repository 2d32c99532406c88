"""What goes into the layers of a model, seen while it is evaluated on the data of an objective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatcore import checks
from flatcore.changes import versions
from flatcore.environment import exclusive
from flatcore.evaluate import Evaluation, plain_torch
from flatcore.measures.layers import Layer
from flatcore.objective import Objective, WeightedBatch

__all__ = [
    "Call",
    "Moments",
    "deviations",
    "evaluated",
    "feature_rows",
    "in_order_of_use",
    "input_axis",
    "layer_calls",
]

_ROUNDING = 8.0  # units in the last place of a constant feature that count as no deviation


class Call(NamedTuple):
    """What a module was given, what it returned before hooks of others, and the versions of both then."""

    given: Tensor
    output: Any
    versions: bytes

    @property
    def changed(self) -> bool:
        """Has either been written over since?"""
        return _versions(self.given, self.output) != self.versions


def _versions(*values: Any) -> bytes:
    return versions(value for value in values if isinstance(value, Tensor))


@exclusive
def evaluated(
    objective: Objective,
    layers: Sequence[Layer],
    see: Callable[[WeightedBatch, Evaluation, Mapping[str, list[Call]]], None],
    differentiable: str | None = None,
) -> None:
    """Runs every batch; ``see`` gets the batch, its evaluation, and the calls of each layer, by path.

    ``differentiable``: the one parameter that the values are functions of for autograd.
    """
    snapshot = objective.snapshot()
    values = dict(snapshot.values)
    with plain_torch(objective.layout.device), torch.set_grad_enabled(differentiable is not None):
        if differentiable is not None:
            values[differentiable] = values[differentiable].detach().requires_grad_()
        for batch in objective.batches():
            with layer_calls(layers) as calls:
                result = checks.evaluate(objective.evaluate, batch.batch, values, batch.index, twice=False)
            see(batch, result, calls)


def feature_rows(layer: Layer, given: Tensor) -> Tensor:
    """The input of a layer as rows of features, those of a convolution for every place of the image: (rows, inputs)."""
    axis = input_axis(layer.module)
    return given.movedim(axis, -1).reshape(-1, given.shape[axis])


def input_axis(module: nn.Module) -> int:
    """The axis of a layer's input that holds the features, counted from the last, -1."""
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


class Moments:
    """Number, mean and sum of squared deviations of rows of features, float64."""

    def __init__(self) -> None:
        self._n, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())
        self._eps = 0.0

    def add(self, rows: Tensor) -> None:
        """By the update of Chan, Golub and LeVeque, which loses no digits."""
        self._eps = torch.finfo(rows.dtype).eps
        rows = rows.double()
        n, mean = len(rows), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self._n:
            away, total = mean - self._mean, n + self._n
            squares = squares + self._squares + away.square() * (n * self._n / total)
            n, mean = total, self._mean + away * (n / total)
        self._n, self._mean, self._squares = n, mean, squares

    @property
    def deviations(self) -> Tensor:
        """Standard deviations, divided by the number of rows: 0 where they are within rounding of the features.

        The mean of equal numbers is off by a few units in the last place, and dividing by that would be dividing by 0.
        """
        found = (self._squares / self._n).sqrt()
        return torch.where(found > _ROUNDING * self._eps * self._mean.abs(), found, 0.0)


def deviations(objective: Objective, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Standard deviation of each input feature of each layer over the data, float64 (inputs,).

    Every row counts once: each example, of sequences and images each place of each example. A layer that is not called
    is left out.
    """
    moments: dict[str, Moments] = {}

    def see(batch: WeightedBatch, result: Evaluation, calls: Mapping[str, list[Call]]) -> None:
        for layer in layers:
            for call in calls[layer.path]:
                moments.setdefault(layer.path, Moments()).add(feature_rows(layer, call.given))

    if layers:
        evaluated(objective, layers, see)
    return {path: one.deviations for path, one in moments.items()}


@exclusive
def in_order_of_use(objective: Objective, layers: Sequence[Layer]) -> list[Layer]:
    """The layers as the model first calls them, seen on one batch; those that it does not call come first.

    A model may hold its modules in any order.
    """
    if len(layers) < 2:
        return list(layers)
    places: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            places.setdefault(path, len(places))

        return hook

    handles = [layer.module.register_forward_pre_hook(note(layer.path)) for layer in layers]
    try:
        with plain_torch(objective.layout.device), torch.no_grad():
            values, batch = objective.snapshot().values, next(objective.batches())
            checks.evaluate(objective.evaluate, batch.batch, values, batch.index, twice=False)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(layers, key=lambda layer: places.get(layer.path, -1))


@contextlib.contextmanager
def layer_calls(layers: Sequence[Layer]) -> Iterator[dict[str, list[Call]]]:
    """What the layers are given and return while the block runs, by path."""
    calls: dict[str, list[Call]] = {layer.path: [] for layer in layers}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            calls[path].append(Call(given, output, _versions(given, output)))

        return hook

    handles = [
        layer.module.register_forward_hook(note(layer.path), with_kwargs=True, prepend=True)
        for layer in layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
