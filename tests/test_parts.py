"""Attention whose queries, keys and values are parts of one value, or of each other, against dense operators.

What comes back to the parts is summed into the whole, on a GPU written there by attention itself (`make check-cuda`
runs this on the emulated one), where nothing else may be lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatcore as fc
from flatcore._C import engine
from tests.reference import Reference
from tests.test_engine import EXACT, directions, relative

HEADS, WIDTH, TOKENS, EXAMPLES = 2, 3, 4, 2
D = HEADS * WIDTH
Heads = tuple[Tensor, Tensor, Tensor]


def heads(x: Tensor) -> Tensor:
    """(examples, tokens, D) as (examples, heads, tokens, width)."""
    return x.view(-1, TOKENS, HEADS, WIDTH).transpose(1, 2)


def permuted(x: Tensor) -> Heads:
    q, k, v = x.view(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return q, k, v


def chunks(x: Tensor) -> Heads:
    q, k, v = (heads(part) for part in x.chunk(3, -1))
    return q, k, v


def permuted_twice(x: Tensor) -> Heads:
    q, k, v = x.view(-1, TOKENS, 3, HEADS, WIDTH).transpose(0, 2).permute(0, 2, 3, 1, 4)
    return q, k, v


def one_for_queries_and_keys(x: Tensor) -> Heads:
    q, _, v = permuted(x)
    return q, q, v


def unused(x: Tensor) -> Heads:
    q, _, v = permuted(x)
    return q, 0.5 * q, v


def overlapping(x: Tensor) -> Heads:
    return heads(x[..., :D]), heads(x[..., D // 2 : D // 2 + D]), heads(x[..., 2 * D :])


def interleaved(x: Tensor) -> Heads:
    return heads(x[..., 0::3]), heads(x[..., 1::3]), heads(x[..., 2::3])


def of_two_axes(x: Tensor) -> Heads:
    grid = x.view(-1, TOKENS, 3, HEADS, WIDTH)
    # The first token's value is that of none.
    q, k = grid[:, :, 0].transpose(1, 2), grid[:, :, 1].transpose(1, 2)
    return q, k, grid[:, 1:, 2].repeat_interleave(2, 1)[:, :TOKENS].transpose(1, 2)


def parts_of_parts(x: Tensor) -> Heads:
    first, second = x.split([2 * D, D], -1)
    q, k = first.chunk(2, -1)
    return heads(q), heads(k), heads(second)


def read_elsewhere(x: Tensor) -> Heads:
    q, k, v = permuted(x)
    return q, k + q.tanh(), v


FORMS: tuple[Callable[[Tensor], Heads], ...] = (
    permuted,
    chunks,
    permuted_twice,
    one_for_queries_and_keys,
    unused,
    overlapping,
    interleaved,
    of_two_axes,
    parts_of_parts,
    read_elsewhere,
)


class Attending(nn.Module):
    """whole: what the output has besides: "nothing", the parts' "sum", the "first" of them, or of one "token"."""

    def __init__(self, form: Callable[[Tensor], Heads], whole: str) -> None:
        super().__init__()
        self.form, self.whole = form, whole
        self.norm, self.into, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(self.norm(x))
        y = F.scaled_dot_product_attention(*self.form(parts), is_causal=True)
        y = x + self.out(y.transpose(1, 2).reshape(x.shape))
        if self.whole == "sum":
            y = y + parts.view(*x.shape, 3).sum(-1)
        elif self.whole == "first":
            y = y + parts[..., :D].tanh()
        elif self.whole == "token":
            y = y + parts[:, 1:2].sum(-1, keepdim=True)
        return y


class OfParameters(nn.Module):
    """Queries, keys and values are slices of one parameter; a second block reads the first's residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.randn(3, EXAMPLES, HEADS, TOKENS, WIDTH))
        self.second = Attending(permuted, "nothing")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.second(x + y.transpose(1, 2).reshape(x.shape))


@pytest.fixture(params=["choose", "fused"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    engine.set_attention_policy(request.param)
    yield
    engine.set_attention_policy("choose")


def check(model: nn.Module, loss: Callable[..., Tensor], by_example: bool = True) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, EXAMPLES, TOKENS, D, generator=generator, dtype=torch.float64)
    objective = fc.Objective(model, loss, (x, y))
    reference = Reference(model, loss, (x, y), "output_target")
    operators = [(fc.Hessian(objective), reference.hessian()), (fc.GGN(objective), reference.ggn())]
    if by_example:
        operators.append((fc.GradientCovariance(objective, centered=False), reference.covariance(EXAMPLES)))
    for A, dense in operators:
        assert A.plan().backend == "native"
        for K in (1, 3):
            V = directions(A.shape[0], K)
            assert relative(A @ V, dense @ V) <= EXACT, type(A).__name__


@pytest.mark.parametrize("whole", ["nothing", "sum", "first", "token"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_parts(form: Callable[[Tensor], Heads], whole: str) -> None:
    torch.manual_seed(0)
    check(Attending(form, whole).double(), F.mse_loss)


def test_parts_of_a_parameter() -> None:
    torch.manual_seed(0)
    check(OfParameters().double(), F.mse_loss, by_example=False)


def loss_of_both(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    parts, y = output
    return ((parts[..., :D] - target) ** 2).mean() + (parts**4).mean() + (y**2).mean()


@pytest.mark.parametrize("form", [permuted, chunks], ids=lambda form: form.__name__)
def test_parts_are_the_output(form: Callable[[Tensor], Heads]) -> None:
    """What the loss sends to the whole is there before attention writes."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(D, 3 * D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            parts = self.into(x)
            return parts, F.scaled_dot_product_attention(*form(parts))

    torch.manual_seed(0)
    check(Both().double(), loss_of_both)


def test_parts_are_an_output_of_four() -> None:
    """The loss reads a part of its own, so that the whole is read by parts alone, and is an output."""

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(D, 4 * D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            parts = self.into(x)
            q, k, v = (heads(part) for part in parts.split([D, D, D, D], -1)[:3])
            return parts, F.scaled_dot_product_attention(q, k, v)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return ((output[0][..., 3 * D :] - target) ** 2).mean() + (output[1] ** 2).mean()

    torch.manual_seed(0)
    check(Four().double(), loss)
