"""Relative flatness from probes of each example's own (`flatcore.example_sweeps`), in standardised features too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.example_sweeps import ExampleSweeps, Samples, sweeps_for
from flatcore.measures.derived import restricted
from flatcore.measures.features import input_axis
from flatcore.measures.flatness_values import Found, named
from flatcore.measures.neurons import Neurons
from flatcore.objective import Objective, Snapshot
from flatcore.sampling import student

__all__ = ["by_example"]

_PILOT = 4  # probes of the first round
_FEWEST_PROBES = 2  # of a round, for a spread
_MOST_PROBES = 64  # of a round


def by_example(
    objective: Objective,
    layers: Mapping[str, Neurons],
    form: str,
    rtol: float,
    max_probes: int,
    seed: int,
    instead: int | None,
) -> Found | str:
    """As `flatness_values.probed`, with signs A of each example's own: their noise is averaged over the examples.

    Of those layers alone whose weights such probes reach; a sentence where these are none.
    """
    reason, given = "weights of grouped and of transposed convolutions are not rows of neurons", len(layers)
    layers = {
        path: one
        for path, one in layers.items()
        if one.layer.groups == 1 and not _transposed_convolution(one)
    }
    while layers:
        # Half of the budget is the other layers', where there are any.
        own = max_probes if len(layers) == given else max_probes // 2
        if own < _FEWEST_PROBES:
            return f"their spread takes {_FEWEST_PROBES} of them, got max_matvecs={max_probes}"
        target = _standardized(objective, layers)
        if isinstance(target, str):
            return target
        at = target.snapshot()
        sweeps = sweeps_for(target, at)
        if isinstance(sweeps, str):
            return sweeps
        reached = set(sweeps.probed) - set(sweeps.repeated if form == "2021" else ())
        if all(one.layer.weight in reached for one in layers.values()):
            try:
                return _sampled(sweeps, at, layers, form, rtol, own, seed, instead)
            finally:
                sweeps.release()
        reason = "the weight has several uses, or one that such probes do not know"
        layers = {path: one for path, one in layers.items() if one.layer.weight in reached}
    return reason


class _Tally:
    """Of the sum over all weights (entry 0) and of each: means of probes, their variance, and the sum of squares of the
    examples' shares in that."""

    def __init__(self, weights: int) -> None:
        self.K = 0
        self.mean, self._variance, self._fourth = torch.zeros(3, 1 + weights, dtype=torch.float64)

    def add(self, samples: Samples) -> None:
        """Another round of probes: what was there and what comes count by their numbers."""
        new = samples.K / (self.K + samples.K)
        old = 1 - new
        self.mean = old * self.mean + new * samples.mean
        self._variance = old**2 * self._variance + new**2 * samples.variance
        self._fourth = old**4 * self._fourth + new**4 * samples.fourth
        self.K += samples.K

    def stderr(self) -> Tensor:
        """A variance that is the sum of many examples', each from a few probes, has the degrees of freedom of
        Satterthwaite (Biometrics 2 (1946) 110-114); the square of a variance of one degree is three times too large."""
        freedom = (3 * self._variance.square() / self._fourth - 2).nan_to_num(math.inf).clamp(min=1)
        factors = torch.tensor([student(1 + float(f)) for f in freedom], dtype=torch.float64)
        stderr: Tensor = self._variance.sqrt() * factors
        return stderr


def _sampled(
    sweeps: ExampleSweeps,
    at: Snapshot,
    layers: Mapping[str, Neurons],
    form: str,
    rtol: float,
    max_probes: int,
    seed: int,
    instead: int | None,
) -> Found:
    by_weight = {one.layer.weight: path for path, one in layers.items()}
    paths = [by_weight[name] for name in sweeps.probed]
    squares = [1.0 if form == "2021" else float(layers[path].weight.square().sum()) for path in paths]
    factors, tally = torch.tensor(squares, dtype=torch.float64), _Tally(len(paths))
    needed = float(_PILOT)
    while True:
        wanted = max(1.2 * needed - tally.K, _FEWEST_PROBES)
        count = int(min(wanted, _MOST_PROBES, max_probes - tally.K))
        tally.add(sweeps.probe("hessian", at, seed, tally.K, count, relative=form == "2021"))
        values, errors = factors * tally.mean[1:], factors * tally.stderr()[1:]
        error, allowed = _of_sum(errors, tally, form), rtol * abs(float(values.sum()))
        reached = error <= allowed
        needed = tally.K * (error / allowed) ** 2 if allowed else math.inf
        cheaper = not reached and instead is not None and needed > instead <= max_probes - tally.K
        if reached or cheaper or max_probes - tally.K < _FEWEST_PROBES:
            break
    status = "converged"
    if not (reached or cheaper):
        status = (
            f"the standard error of the relative flatness of {named(paths, errors)} is {error:.3g} at "
            f"{float(values.sum()):.3g} after {tally.K} probes of each example, above rtol = {rtol:g}; raise "
            "max_matvecs or rtol"
        )
    found = {path: (float(v), float(e)) for path, v, e in zip(paths, values, errors, strict=True)}
    return Found(found, error, tally.K, status, cheaper)


def _of_sum(errors: Tensor, tally: _Tally, form: str) -> float:
    """Standard error of the layers' sum. Two layers share the term v_lᵀ H_lk v_k, whose variance is in both of theirs;
    with factors of their own the sum's variance is at most twice theirs added up."""
    if form == "2021" or len(errors) == 1:
        return float(tally.stderr()[0] if len(errors) > 1 else errors[0])
    return math.sqrt(2) * float(errors.norm())


def _standardized(objective: Objective, layers: Mapping[str, Neurons]) -> Objective | str:
    """The objective as a function of the layers' W' = W diag(s) alone, on a copy of the model that divides their inputs
    by s. A sentence where that is another function: features that never change, and are not zero, lose their weight."""
    names = [one.layer.weight for one in layers.values()]
    names = [name for name in objective.layout.shapes if name in names]
    if all(bool((one.inverse == 1).all()) and not one.standardized for one in layers.values()):
        return restricted(objective, names)
    try:
        model = copy.deepcopy(objective.model)
        for path, one in layers.items():
            module = model.get_submodule(path)
            weight = module._parameters["weight"]
            assert weight is not None
            groups, outputs, inputs, places = one.layer.matrices(weight).shape
            scaled = one.weight.view(groups, outputs, inputs, places).to(weight.dtype)
            with torch.no_grad():
                weight.copy_(one.layer.from_matrices(scaled, weight))
            by_input = one.inverse.view(inputs, places)[:, 0].to(weight.dtype)
            module.register_forward_pre_hook(_divider(by_input, input_axis(module)))
        found = Objective(
            model,
            objective.loss_function,
            objective.data.again,
            params=names,
            memory=objective.budget.total,
            allow_train_mode=objective.allow_train_mode,
        )
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"the model has no copy with standardised features: {error}"
    rounding = math.sqrt(torch.finfo(objective.layout.dtype).eps)
    if abs(found.loss() - objective.loss()) > rounding * (1 + abs(objective.loss())):
        return "standardised features change the function"
    return found


def _transposed_convolution(one: Neurons) -> bool:
    return isinstance(one.layer.module, nn.modules.conv._ConvTransposeNd)


def _divider(by_input: Tensor, axis: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    shape = (-1,) + (1,) * (-axis - 1)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * by_input.view(shape), *args[1:])

    return hook
