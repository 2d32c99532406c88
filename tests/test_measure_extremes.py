"""The least eigenvalue, to what a measure needs of it: intervals that hold it, and what is said where none is known."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import one_thread  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures import extremes
from flatcore.measures.extremes import least

pytestmark = pytest.mark.usefixtures("one_thread")

soft_rank_module = importlib.import_module(
    "flatcore.measures.soft_rank"
)  # the package's name is the function
EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotated(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(normal(len(values), len(values)))[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def regression(values: Tensor) -> fc.Objective:
    """A linear regression whose Hessian has these eigenvalues."""
    n = 2 * len(values)
    Q = torch.linalg.qr(normal(n, len(values)))[0]
    V = torch.linalg.qr(normal(len(values), len(values), seed=1))[0]
    x = math.sqrt(n / 2) * (Q * values.sqrt()) @ V.T
    model = nn.Linear(len(values), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(normal(1, len(values), seed=2))
    return fc.Objective(model, F.mse_loss, (x, normal(n, 1, seed=3)))


def logspace(least: float, P: int) -> Tensor:
    return torch.logspace(math.log10(least), 0, P, dtype=torch.float64)


class TestLeast:
    @pytest.mark.parametrize("dense", [True, False])
    @pytest.mark.parametrize("P", [3, 100, 200])
    @pytest.mark.parametrize("value", [-0.3, -1e-4, 1e-3])
    def test_interval(self, value: float, P: int, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the interval, which is as short as wanted, by the spectrum and by searches."""
        if not dense:
            monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        A = rotated(torch.cat([torch.tensor([value], dtype=torch.float64), logspace(2e-3, P - 1)]))
        found = least(A, lambda v: 0.01 * abs(v), 0)
        assert found.reached and found.error <= 0.01 * abs(found.value)
        assert found.lower - found.rounding <= value <= found.value + found.rounding
        assert found.rounding <= 8 * EPS * math.sqrt(P) and not found.zero
        assert found.matvecs <= extremes.MAX_MATVECS
        if found.greatest is not None:
            assert (dense or P <= 64) and found.greatest == pytest.approx(1, abs=found.rounding)

    def test_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        values = torch.cat([torch.zeros(50, dtype=torch.float64), logspace(1e-2, 50)])
        assert least(rotated(values), lambda v: 1e-3 * abs(v), 0).zero
        assert least(rotated(values[:60]), lambda v: 1e-3 * abs(v), 0).zero

    def test_budget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not zero to rounding because products ran out."""
        monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        A = rotated(logspace(1e-6, 400))
        for most in (8, 9, 30, 51, 200):
            found = least(A, lambda v: 1e-3 * abs(v), 0, most)
            assert found.matvecs <= most and not found.reached and not found.zero
            assert found.lower <= 1e-6 <= found.value


class TestConditionNumber:
    @pytest.mark.parametrize(
        ("P", "condition"), [(10, 1e3), (10, 1e5), (60, 3e3), (100, 3e3), (100, 1e5), (100, 1e9)]
    )
    def test_of_a_regression(self, P: int, condition: float) -> None:
        found = measures.condition_number(regression(logspace(1 / condition, P)))
        # The regression's own eigenvalues are off by rounding of lambda_max.
        off = P * EPS * condition
        assert abs(found.value / condition - 1) <= found.stderr / condition + off
        assert found.status == "converged" and found.stderr <= 1e-3 * condition

    def test_by_searches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        found = measures.condition_number(regression(logspace(1e-3, 100)))
        assert found.method == "lanczos" and found.status == "converged"
        assert abs(found.value - 1e3) <= found.stderr <= 1e-3 * found.value

    def test_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        objective = regression(logspace(1e-5, 100))
        with pytest.warns(FlatcoreWarning, match="condition_number: the least eigenvalue is known to lie"):
            found = measures.condition_number(objective, max_matvecs=30)
        assert found.status != "converged" and math.isfinite(found.value) and found.stderr == math.inf
        low, error = found.details["lambda_min"], found.details["lambda_min_error"]
        assert low - error <= 1e-5 <= low

    def test_zero_to_rounding(self) -> None:
        objective = regression(torch.cat([torch.zeros(30, dtype=torch.float64), logspace(1e-2, 70)]))
        with pytest.warns(FlatcoreWarning, match="the least eigenvalue is zero to the rounding"):
            found = measures.condition_number(objective)
        assert math.isinf(found.value) and math.isnan(found.stderr) and "zero" in found.status


class TestPole:
    @pytest.mark.parametrize("damping", [1e-3, 1e-4, 1e-6])
    def test_positive_definite(self, damping: float) -> None:
        """The least eigenvalue is far below the tolerance of the first search, which must not be taken for a pole."""
        values = logspace(2e-5, 100)
        objective = regression(values)
        found = measures.soft_rank(objective, damping, matrix="hessian", method="exact")
        assert found.value == pytest.approx(float((values / (values + damping)).sum()), rel=1e-8)
        assert found.status == "converged"
        low, error = found.details["lowest"], found.details["lowest_error"]
        assert low - error - 100 * EPS <= 2e-5 <= low + 100 * EPS
        gap = measures.generalization_gap(objective, damping, matrix="hessian", method="probes", rtol=0.2)
        exact = measures.generalization_gap(objective, damping, matrix="hessian", method="exact")
        assert gap.status == "converged" and abs(gap.value - exact.value) <= 4 * gap.stderr

    def test_negative_and_small(self) -> None:
        """Warned of, or refused, where the eigenvalue is below the tolerance of the first search."""
        values = torch.cat([torch.full((50,), -4e-5, dtype=torch.float64), logspace(0.1, 50)])
        A = rotated(values)

        class Quadratic(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.zeros(100, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return x[:, 0] * 0 + 0.5 * self.w @ A @ self.w

        loss = fc.ModelLoss(lambda m, b: m(b[0]).mean())
        objective = fc.Objective(Quadratic(), loss, (torch.zeros(1, 1).double(),))
        for damping in (1e-3, 4.1e-5):
            with pytest.warns(FlatcoreWarning, match="the Hessian has a negative eigenvalue, -4e-05"):
                measures.soft_rank(objective, damping, matrix="hessian", method="exact")
        with pytest.raises(
            ValueError, match=r"the Hessian has an eigenvalue of -4e-05 or below, got 3\.9e-05"
        ):
            measures.soft_rank(objective, 3.9e-5, matrix="hessian", method="exact")

    def test_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said, and no bar is made up: nothing bounds what the solves leave open."""
        monkeypatch.setattr(extremes, "_DENSE_AT_MOST", 0)
        monkeypatch.setattr(soft_rank_module, "least", functools.partial(least, most=16))
        objective = regression(logspace(2e-5, 100))
        with pytest.warns(
            FlatcoreWarning, match="soft_rank: whether the Hessian's least eigenvalue, between"
        ):
            found = measures.soft_rank(objective, 1e-4, matrix="hessian", method="exact")
        assert "not known" in found.status and found.details["lowest_error"] > 0
        options = {"matrix": "hessian", "method": "probes", "rtol": 0.2}
        with pytest.warns(FlatcoreWarning, match="generalization_gap: whether the Hessian's least"):
            gap = measures.generalization_gap(objective, 1e-4, **options)
        assert "not known" in gap.status and gap.stderr == math.inf and gap.value > 0
