"""Measures of odd nets and odd data: the right number, or one sentence."""

from __future__ import annotations

import pytest
import torch
from measured import batch, blocks, close, cross_entropy, kappa, mlp
from untouched import one_thread  # noqa: F401

from flatcore import measures

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10


class TestConstantFeatures:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("widths", [(5, 7, 3), (5, 3)])
    def test_rounding_of_a_mean_is_no_deviation(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        """The mean of 40 times 0.1 is not 0.1: not to be divided by, as the deviation of 0 that it is."""
        (x, y), model = batch(40, 5, 3), mlp(*widths)
        x[:, 2] = 0.1
        s = x.std(0, correction=0)
        s[2] = 0
        inverse = torch.where(s > 0, 1 / s, 1.0)
        ((W, H),) = blocks(model, (x, y), "0")
        exact = kappa(W * s, H * inverse[:, None, None] * inverse)
        objective = cross_entropy(model.to(dtype), (x.to(dtype), y))
        found = measures.relative_flatness(objective, "0", method="auto" if len(widths) == 2 else "exact")
        # float32: products and sums of some hundred numbers.
        assert close(found.value, exact, EXACT if dtype == torch.float64 else 1e-4)
