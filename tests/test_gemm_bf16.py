"""Products of float32 matrices with operands rounded to bfloat16, against float64 with torch's own rounding."""

from __future__ import annotations

import pytest
import torch
from test_tuning import LAYOUTS
from torch import Tensor

from flatcore._C import engine

pytestmark = pytest.mark.skipif(
    not engine.bf16_available(), reason="the processor has no instructions for bfloat16"
)


def rounded(t: Tensor) -> Tensor:
    return t.bfloat16().double()


def check(a: Tensor, b: Tensor, c: Tensor, accumulate: bool) -> None:
    """Products of rounded elements are exact in float32; a sum of k of them is right to k eps times their sizes."""
    start = c.double() if accumulate else torch.zeros(c.shape, dtype=torch.float64)
    if not accumulate:
        c.fill_(torch.nan)  # what was there must not be read
    engine.multiply_bf16(c, a, b, accumulate)
    exact = start + rounded(a) @ rounded(b)
    sizes = start.abs() + rounded(a).abs() @ rounded(b).abs()
    eps = torch.finfo(torch.float32).eps
    assert bool(((c.double() - exact).abs() <= (a.shape[-1] + 2) * eps * sizes).all())


# More than a block, less than one, one with a rest, several depths, odd depths.
SIZES = [
    (35, 83, 71),
    (64, 64, 64),
    (1, 1, 1),
    (130, 70, 1101),
    (70, 130, 1101),
    (16, 16, 2050),
    (3, 200, 33),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=str)
def test_products_of_any_size(size: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    m, n, k = size
    for left in ("dense", "transposed"):
        for right in ("dense", "transposed"):
            a = LAYOUTS[left](*batch, m, k, dtype=torch.float32)
            b = LAYOUTS[right](*batch, k, n, dtype=torch.float32)
            for accumulate in (False, True):
                check(a, b, LAYOUTS["rows apart"](*batch, m, n, dtype=torch.float32), accumulate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batch"])
def test_products_of_any_layout(layout: str, batch: tuple[int, ...]) -> None:
    m, n, k = 96, 80, 67
    for left, right in ((layout, "dense"), ("dense", layout), (layout, layout)):
        a = LAYOUTS[left](*batch, m, k, dtype=torch.float32)
        b = LAYOUTS[right](*batch, k, n, dtype=torch.float32)
        check(a, b, torch.empty(*batch, m, n), False)


def test_more_operands_than_are_rounded_at_once() -> None:
    a, b = (LAYOUTS["dense"](5, *shape, dtype=torch.float32) for shape in ((520, 1030), (1030, 512)))
    check(a, b, torch.empty(5, 520, 512), False)


def test_results_anywhere_in_a_larger_matrix() -> None:
    """As slices of the flat vector lie: directions far apart, and what stands between them is left alone."""
    whole = torch.full((3, 5000), torch.nan)
    c = whole[:, 100 : 100 + 33 * 40].view(3, 33, 40)
    a, b = LAYOUTS["dense"](3, 33, 70, dtype=torch.float32), LAYOUTS["dense"](70, 40, dtype=torch.float32)
    check(a, b.expand(3, 70, 40), c, False)
    assert int(whole.isnan().sum()) == whole.numel() - c.numel()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_with_any_number_of_threads(threads: int) -> None:
    """Blocks may differ, the order of every sum does not."""
    a, b = (
        LAYOUTS["dense"](2, 150, 1500, dtype=torch.float32),
        LAYOUTS["transposed"](2, 1500, 90, dtype=torch.float32),
    )
    alone, together = torch.empty(2, 150, 90), torch.empty(2, 150, 90)
    engine.multiply_bf16(alone, a, b, False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        engine.multiply_bf16(together, a, b, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


# All ties and their neighbours in one binade of either sign, the largest and the least normal numbers.
BITS = torch.cat(
    [0x3F800000 + torch.arange(0, 1 << 23, 1 << 15) + shift for shift in (-1, 0, 1)]
    + [torch.tensor([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x00800000, 0x00807FFF, 0x00808000, 0, 0])]
).to(torch.int32)


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("depth", [1, 64])
def test_rounding_is_torchs(layout: str, depth: int) -> None:
    """To nearest, ties to even, by products with the columns of the identity; 64 deep it goes by tiles."""
    values = torch.cat([BITS, BITS | -(1 << 31)]).view(torch.float32)
    values = values[: len(values) // 64 * 64]
    x = values.reshape(-1, depth)
    # Infinity times zero is no number: what rounds to infinity goes alone.
    x = x if depth == 1 else torch.where(x.bfloat16().isinf(), 1.0, x)
    x = x if layout == "dense" else x.T.contiguous().T
    y = torch.empty(len(x), depth)
    engine.multiply_bf16(y, x, torch.eye(depth), False)
    assert torch.equal(y, x.bfloat16().float())


@pytest.mark.parametrize("depth", [1, 64])
def test_no_numbers_stay_no_numbers(depth: int) -> None:
    x = torch.ones(64, depth)
    x[3, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x[5, depth - 1] = torch.nan
    x[7, 0] = -torch.inf
    y = torch.empty(64, 1)
    engine.multiply_bf16(y, x, torch.ones(depth, 1), False)
    assert y.isnan().nonzero()[:, 0].tolist() == [3, 5]
    assert float(y[7]) == -torch.inf
