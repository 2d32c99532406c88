"""The engine against the interpreter differentiated by torch, on random programs; see tests/random_graphs/check.py."""

from __future__ import annotations

import os
from math import sqrt

import pytest
import torch
from random_graphs.check import DELTA, MEANINGFUL, ROUNDING, noisy
from random_programs import OPS, Program, draw, offsets
from torch import Tensor

from flatcore._C import engine

PROGRAMS = int(os.environ.get("FLATCORE_PROGRAMS", "400"))
PIECE = 50
EPS = torch.finfo(torch.float64).eps


def by_torch(p: Program, V: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and product with the columns of V."""
    theta = [t for t, kind in zip(p.tensors, p.kinds, strict=True) if kind == "parameter"]

    def flat(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(V.shape[0], dtype=V.dtype)
        parts = torch.autograd.grad(
            value, theta, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])

    loss = p.evaluate(noisy(seed))
    gradient = flat(loss)
    products = torch.stack([flat(gradient @ v) for v in V.T], 1)
    return loss.detach(), gradient.detach(), products.detach()


def by_engine(p: Program, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    places, total = offsets(p)
    values = [(kind, list(t.shape)) for kind, t in zip(p.kinds, p.tensors, strict=True)]
    program = engine.Program(values, p.ops, places, total, len(values) - 1, [])
    leaves = {
        i: t.detach() for i, (k, t) in enumerate(zip(p.kinds, p.tensors, strict=True)) if k != "activation"
    }
    state = engine.Linearization(program, leaves, 1.0)
    gradient, Y = torch.empty(total, dtype=V.dtype), torch.empty(V.shape[1], total, dtype=V.dtype)
    state.gradient(gradient, False)
    state.product(V.T.contiguous(), Y, "hessian", False, 1, 1.0)
    return torch.tensor(state.loss, dtype=V.dtype), gradient, Y.T


def compare(seed: int) -> bool:
    """False where rounding decides the result."""
    p = draw(seed)
    _, total = offsets(p)
    V = torch.randn(total, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = by_torch(p, V)
    samples = [by_torch(p, V, s) for s in range(2)]
    floor = 1.0  # values and parameters are of size one
    bounds = []
    for i, value in enumerate(expected):
        response = sqrt(sum((s[i] - value).square().sum().item() for s in samples)) / DELTA
        floor += value.norm().item()
        bounds.append(ROUNDING * EPS * (response + floor * (V.norm().item() if i == 2 else 1.0)))
    if not bounds[2] < MEANINGFUL * max(expected[2].norm().item(), 1e-3):
        return False
    for what, got, wanted, bound in zip(
        ("loss", "gradient", "product"), by_engine(p, V), expected, bounds, strict=True
    ):
        error = (got - wanted).norm().item()
        text = "\n".join(f"{kind}{inputs} -> {out} {attrs}" for kind, inputs, out, attrs, _ in p.ops)
        assert error <= bound, f"program {seed}, {what}: error {error:.2e}, allowed {bound:.2e}\n{text}"
    return True


@pytest.mark.parametrize("first", range(0, PROGRAMS, PIECE))
def test_programs(first: int) -> None:
    count = min(PIECE, PROGRAMS - first)
    assert sum(compare(seed) for seed in range(first, first + count)) >= 0.8 * count


def test_every_kind_is_drawn() -> None:
    kinds = {kind for seed in range(2 * len(OPS)) for kind, *_ in draw(seed).ops}
    assert set(engine.op_kinds()) - kinds <= {"round", "external"}  # tests of their own
