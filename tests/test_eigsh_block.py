"""The width of a block: from k, given, or measured."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from flatcore.block_choice import measured_block
from flatcore.eigsh import eigsh
from flatcore.linear import as_operator
from tests.spectra import SPECTRA, Counting, wanted, with_spectrum


class Clocked(Counting):
    """A product of K columns takes fixed + each K seconds of a clock of its own."""

    def __init__(self, fixed: float, each: float) -> None:
        super().__init__(torch.eye(40))
        self.fixed, self.each, self.now = fixed, each, 0.0

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.now += self.fixed + self.each * V.shape[1]
        return super().__matmul__(V)


@pytest.mark.parametrize(
    ("fixed", "each", "k", "best"),
    # (fixed + each K) / sqrt(K) is least at K = fixed / each.
    [
        (0, 1, 20, 1),
        (1, 1, 20, 1),
        (4, 1, 20, 4),
        (8, 1, 20, 8),
        (99, 1, 20, 16),
        (99, 1, 4, 4),
        (99, 1, 1, 2),
    ],
)
def test_least_time(fixed: float, each: float, k: int, best: int) -> None:
    A = Clocked(fixed, each)
    block, products = measured_block(as_operator(A), k, 0, lambda: A.now)
    assert block == best
    assert products == A.products


def test_measured_changes_no_answer() -> None:
    A = Counting(with_spectrum(SPECTRA["indefinite"]))
    found = eigsh(A, 6, tol=1e-9, block_size="measured")
    assert found.matvecs == A.products
    assert found.block_size in (1, 2, 4, 8)
    np.testing.assert_allclose(found.values, wanted(SPECTRA["indefinite"], 6, "LM"), atol=1e-8)
    again = eigsh(A, 6, tol=1e-9, block_size=found.block_size)
    assert torch.equal(again.vectors, found.vectors)


def test_default_is_no_matter_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", iter(np.random.default_rng(0).random(99)).__next__)
    A = with_spectrum(SPECTRA["indefinite"])
    one, two = eigsh(A, 3), eigsh(A, 3)
    assert one.block_size == two.block_size == 2
    assert torch.equal(one.vectors, two.vectors)


def test_refused() -> None:
    with pytest.raises(ValueError, match="block_size: expected a number, None or 'measured', got 'auto'"):
        eigsh(torch.eye(9), 2, block_size="auto")
