"""Warnings point at the line that called flatcore, whatever lies between, so that each line's is said once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import flatcore as fc
from flatcore.errors import FlatcoreWarning

CALLS: dict[str, Callable[[fc.Hessian], object]] = {
    "eigsh": lambda H: fc.eigsh(H, k=3, max_matvecs=20, tol=1e-14),
    "trace": lambda H: fc.trace(H, rtol=1e-12, max_matvecs=8, method="hutchinson"),
    "diagonal": lambda H: fc.diagonal(H, rtol=1e-12, max_matvecs=8, method="hutchinson"),
    "logdet": lambda H: fc.logdet(H, damping=100.0, rtol=1e-12, max_matvecs=16, method="lanczos"),
    "soft_rank": lambda H: fc.soft_rank(H, 100.0),
    "solve": lambda H: fc.solve(
        fc.GGN(H.objective), torch.ones(H.shape[0]), damping=1e-6, tol=1e-14, max_matvecs=4
    ),
    "block_spectra": lambda H: fc.block_spectra(H, k=1, max_steps=1),
    "report": lambda H: fc.report(H.objective, k=3, rtol=1e-12, measures="none"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_points_at_the_call(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 3))
    batch = (torch.randn(20, 8), torch.randint(3, (20,)))
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), batch))
    with pytest.warns(FlatcoreWarning) as told:
        CALLS[name](H)
    line = CALLS[name].__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in told} == {(__file__, line)}
