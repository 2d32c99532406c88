"""The property: products, gradient and loss of a graph are those of torch's double backward.

What rounding may do to them is measured: torch evaluates the same graph with every value multiplied by 1 + δ ξ, with
ξ random signs (Monte Carlo arithmetic; Parker, 1997). The change of a result divided by δ is what a relative error of
one in every value would do to it; an implementation that rounds to eps is allowed a small multiple of eps times that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import flatcore as fc
from flatcore.backend import backend_for
from flatcore.capture import lower
from flatcore.errors import FlatcoreWarning

from .builder import MOST_ELEMENTS
from .graph import Graph

DELTA = 2.0**-30
SAMPLES = 3
# Two evaluations, each with rounding errors of both signs in sums of at most so many terms.
ROUNDING = 2 * sqrt(MOST_ELEMENTS)
# A result that rounding alone changes by more than this says nothing.
MEANINGFUL = 1e-7
DIRECTIONS = 3


class IllConditioned(Exception):
    """Rounding decides the result."""


class Wrong(AssertionError):
    """A result that is not autograd's."""


@dataclass
class Results:
    """Of one evaluation, by torch or by the engine."""

    loss: Tensor
    gradient: Tensor
    hessian: Tensor  # (P, K)
    ggn: Tensor | None


def noisy(seed: int | None) -> Callable[[Any], Any]:
    """A function that multiplies floating tensors by 1 + DELTA times random signs; None: the identity."""
    if seed is None:
        return lambda value: value
    generator = torch.Generator().manual_seed(seed)

    def one(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        # In the value's own precision: in float32, the default, 1 + DELTA is 1.
        signs = torch.randint(2, value.shape, generator=generator).to(value.dtype) * 2 - 1
        return value * (1 + DELTA * signs)

    return lambda value: pytree.tree_map(one, value)


def by_torch(
    graph: Graph, batch: tuple[Tensor, ...], V: Tensor, ggn: bool, seed: int | None = None
) -> Results:
    """Reverse over reverse, one direction at a time."""
    theta = [p for p in graph.parameters() if p.requires_grad]
    sizes = [p.numel() for p in theta]

    def flat(parts: Any) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def derivative(value: Any, by: Any, along: Any = None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value, by, along, create_graph=True, allow_unused=True, materialize_grads=True
        )

    with sdpa_kernel(SDPBackend.MATH):
        output = graph.reference(batch[:-1], noisy(seed))
        loss = graph.loss(output, batch[-1])
        gradient = flat(derivative(loss, theta))
        columns, products = [], []
        for v in V.T:
            parts = [part.view(p.shape) for part, p in zip(v.split(sizes), theta, strict=True)]
            zero = torch.zeros_like(gradient)
            columns.append(flat(derivative(gradient @ v, theta)) if gradient.requires_grad else zero)
            if not ggn:
                continue
            z = [leaf for leaf in pytree.tree_leaves(output) if leaf.requires_grad]
            weights = [torch.zeros_like(leaf, requires_grad=True) for leaf in z]
            pulled = derivative(z, theta, weights)
            tangents = derivative(
                sum((p * part).sum() for p, part in zip(pulled, parts, strict=True)), weights
            )
            leaves = [leaf.detach().requires_grad_() for leaf in z]
            places = iter(leaves)
            handed = pytree.tree_map(lambda t, p=places: next(p) if t.requires_grad else t, output)
            slope = derivative(graph.loss(handed, batch[-1]), leaves)
            inner = sum((s * t.detach()).sum() for s, t in zip(slope, tangents, strict=True))
            curved = derivative(inner, leaves) if inner.requires_grad else [torch.zeros_like(t) for t in z]
            products.append(flat(derivative(z, theta, curved)))
    return Results(
        loss.detach(),
        gradient.detach(),
        torch.stack(columns, 1).detach(),
        torch.stack(products, 1).detach() if ggn else None,
    )


def differentiated_rightly(graph: Graph, v: Tensor, expected: Results) -> bool:
    """Is torch's gradient that of its loss? Central differences along v, with steps s and s/2: their own difference
    is the error of the larger step, more than that of the smaller (some backward formulas of torch 2.13 are wrong)."""
    theta = [p for p in graph.parameters() if p.requires_grad]

    def slope(step: float) -> float:
        values = []
        for sign in (step, -step):
            moved = copy.deepcopy(graph)
            parameters = [p for p in moved.parameters() if p.requires_grad]
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                for p, part in zip(parameters, v.split([p.numel() for p in theta]), strict=True):
                    p.add_(part.view(p.shape), alpha=sign)
                values.append(
                    moved.loss(moved.reference(graph.batch[:-1], noisy(None)), graph.batch[-1]).item()
                )
        return (values[0] - values[1]) / (2 * step)

    coarse, fine = slope(1e-4), slope(5e-5)
    size = max(abs(fine), expected.gradient.norm().item() * v.norm().item())
    half_the_digits = sqrt(torch.finfo(torch.float64).eps)
    return abs(fine - (expected.gradient @ v).item()) <= abs(fine - coarse) + half_the_digits * size


@contextmanager
def recorded_lowerings() -> Iterator[set[str]]:
    """The names of the lowerings that are asked for."""
    reached: set[str] = set()

    class Recording(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            reached.add(name)
            return super().get(name, default)

    with mock.patch.object(lower, "LOWERINGS", Recording(lower.LOWERINGS)):
        yield reached


@dataclass
class Outcome:
    native: float
    reached: set[str]
    worst: float  # error over what is allowed


def check(graph: Graph, whole: bool = True, single: bool = False, by_model: bool = False) -> Outcome:
    """Raises Wrong, with the program, where a result is not torch's; IllConditioned where rounding decides.

    whole:    every op has a rule, so everything must run natively.
    single:   the float32 product too.
    by_model: the loss is a function of model and batch. There the Gauss-Newton matrix is not compared.
    """
    P = sum(p.numel() for p in graph.parameters() if p.requires_grad)
    V = torch.randn(P, DIRECTIONS, generator=torch.Generator().manual_seed(P), dtype=torch.float64)
    ggn = not by_model
    expected = by_torch(graph, graph.batch, V, ggn)
    samples = [by_torch(graph, graph.batch, V, ggn, seed) for seed in range(SAMPLES)]
    eps = torch.finfo(torch.float32 if graph.casts else torch.float64).eps

    def allowed(name: str, eps: float = eps) -> float:
        value = getattr(expected, name)
        response = sqrt(sum((getattr(s, name) - value).square().sum().item() for s in samples)) / DELTA
        # Parameters are of size one: what cancels within an op is the loss over that.
        floor = expected.loss.abs().item() + (expected.gradient.norm().item() if value.dim() == 2 else 0.0)
        floor *= V.norm().item() if value.dim() == 2 else 1.0
        return ROUNDING * eps * (response + value.norm().item() + floor)

    found = (expected.loss, expected.gradient, expected.hessian, expected.ggn)
    if not all(t is None or t.isfinite().all() for t in found):
        raise IllConditioned
    if allowed("hessian", torch.finfo(torch.float64).eps) > MEANINGFUL * max(
        expected.hessian.norm().item(), 1e-3
    ):
        raise IllConditioned

    if not differentiated_rightly(graph, V[:, 0], expected):
        raise IllConditioned

    with warnings.catch_warnings(record=True) as said, recorded_lowerings() as reached:
        warnings.simplefilter("always", FlatcoreWarning)
        objective = _objective(graph, by_model)
        H = fc.Hessian(objective)
        got = Results(
            torch.tensor(objective.loss(), dtype=torch.float64),
            backend_for(objective, "hessian").gradient(objective.snapshot()),
            H @ V,
            (fc.GGN(objective) @ V) if ggn else None,
        )
    plan = H.plan()
    if whole and plan.native_fraction != 1:
        raise Wrong(f"{plan.reason or plan}\n{graph}")
    if plan.backend == "autograd" and not (plan.reason and any(plan.reason in str(w.message) for w in said)):
        raise Wrong(f"no reason is said why autograd is used: {plan.reason!r}\n{graph}")
    worst = 0.0
    for name in ("loss", "gradient", "hessian", *(["ggn"] if ggn else [])):
        error = (getattr(got, name) - getattr(expected, name)).norm().item()
        bound = allowed(name) + 1e-300
        worst = max(worst, error / bound)
        if not error <= bound:
            size = getattr(expected, name).norm().item()
            raise Wrong(f"{name}: error {error:.2e}, allowed {bound:.2e}, size {size:.2e}\n{graph}")
    for columns in ([0], [*range(DIRECTIONS)] * 4):  # one direction, and many, may go other ways
        error = (H @ V[:, columns] - expected.hessian[:, columns]).norm().item()
        if not error <= 2 * allowed("hessian") + 1e-300:
            raise Wrong(f"hessian: error {error:.2e} with {len(columns)} directions\n{graph}")
    products = V.T @ got.hessian
    if not (products - products.T).abs().max() <= allowed("hessian") * V.norm():
        raise Wrong(f"hessian: not symmetric\n{graph}")
    if single and not graph.casts:
        _check_single(graph, V, expected.hessian, allowed("hessian", torch.finfo(torch.float32).eps))
    return Outcome(plan.native_fraction, reached, worst)


def _objective(graph: Graph, by_model: bool = False) -> fc.Objective:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return graph.loss(model(*batch[:-1]), batch[-1])

    return fc.Objective(graph, fc.ModelLoss(loss) if by_model else graph.loss, graph.batch)


def _check_single(graph: Graph, V: Tensor, truth: Tensor, bound: float) -> None:
    """The rule of the table of cases: at most twice the error of torch in float32, from a floor on."""
    model = copy.deepcopy(graph).float()
    model.batch = tuple(t.float() if t.is_floating_point() else t for t in graph.batch)
    product = fc.Hessian(_objective(model)) @ V.float()
    by_autograd = by_torch(model, model.batch, V.float(), ggn=False).hessian
    error, theirs = ((Y.double() - truth).norm().item() for Y in (product, by_autograd))
    if not error <= max(2 * theirs, bound):
        raise Wrong(f"float32: error {error:.2e}, torch's {theirs:.2e}, bound {bound:.2e}\n{graph}")
