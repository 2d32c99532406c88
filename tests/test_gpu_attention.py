"""Attention's two ways on a GPU, by tiles and by one kernel a sweep, emulated, against the plain definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flatcore._C import engine
from tests.test_attention import EXACT, Problem, relative, shapes

pytestmark = pytest.mark.skipif(
    engine.gpu != "emulated",
    reason="for the emulated build (make check-cuda); tests/test_gpu.py is for devices",
)


@pytest.fixture(params=["tiles", "fused"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    engine.set_attention_policy(request.param)
    yield request.param
    engine.set_attention_policy("choose")


def check(problem: Problem, directions: tuple[int, ...] = (1, 3)) -> None:
    for K in directions:
        V = problem.directions(K)
        for mode in ("hessian", "ggn"):
            assert relative(problem.product(V, mode), problem.twin(V, mode)) <= EXACT


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 1, 5), (2, 3, 7, 7), (1, 2, 35, 18), (1, 1, 67, 70), (1, 2, 9, 1)], ids=str
)
def test_sizes(sizes: tuple[int, int, int, int], causal: bool) -> None:
    check(Problem(*shapes(*sizes), causal=causal))


@pytest.mark.parametrize("widths", [(1, 1), (16, 16), (24, 40), (64, 64), (80, 8)], ids=str)
def test_widths(widths: tuple[int, int]) -> None:
    check(Problem(*shapes(1, 2, 6, 5, *widths)), (2,))


@pytest.mark.parametrize("active", ["q", "k", "v", "qk", "qv", "kv"])
def test_subsets(active: str) -> None:
    check(Problem(*shapes(1, 2, 6, 9), active=active, causal=True))


def test_projections() -> None:
    check(Problem(*shapes(2, 3, 6, 9), permuted=True))


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 3, 6, 9), (1, 1, 6, 9), (6, 9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "bool":
        mask = mask > -0.5
        if shape[-2] > 1:
            mask[..., 0, :] = False  # rows that see no key
    check(Problem(*shapes(2, 3, 6, 9), mask=mask))


def logits(problem: Problem) -> Tensor:
    q, k, _ = problem.tensors
    return problem.scale * q @ k.transpose(-2, -1)


@pytest.mark.parametrize(("precision", "rounding"), [("tf32", 2.0**-11), ("bf16", 2.0**-8)])
def test_rounded_operands(precision: str, rounding: float, way: str) -> None:
    """A product chains at most six matrix products, whose operands are each off by the rounding, and logits of size z
    that are off by twice that change probabilities by 2 z times the rounding, in each of three places."""
    if way == "tiles":
        pytest.skip("cuBLAS rounds there, which is not emulated")
    full = Problem(*shapes(1, 2, 20, 20, 16, 16), dtype=torch.float32)
    V = full.directions(3)
    Y = torch.empty_like(V)
    full.state.product(V, Y, "hessian", False, 1, 1.0, precision)
    error = relative(Y, full.product(V).double())
    size = logits(full).abs().max().item()
    assert rounding / 16 <= error <= (12 + 6 * size) * rounding
