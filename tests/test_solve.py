"""Block conjugate gradients against dense solves, with residuals that are the residuals."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from flatcore.errors import FlatcoreWarning
from flatcore.solve import solve

DTYPES = [torch.float64, torch.float32]


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).to(dtype)


class Counting:
    def __init__(self, A: torch.Tensor, bad: int = 10**9) -> None:
        self.A, self.products, self.bad = A, 0, bad
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        Y = self.A @ V
        self.products += V.shape[1]
        if self.products >= self.bad:
            Y[2, V.shape[1] - 1 - (self.products - self.bad)] = float("nan")
        return Y


@pytest.mark.parametrize("K", [None, 1, 4])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_against_dense(condition: float, K: int | None) -> None:
    """A graded spectrum of 60 values: |x - x*| <= |(A)⁻¹| |residual|, and no worse."""
    A = with_spectrum(np.geomspace(1, 1 / condition, 60))
    b = normal(60) if K is None else normal(60, K)
    operator, tol = Counting(A), 1e-7
    found = solve(operator, b, tol=tol, max_matvecs=20_000)
    assert found.status == "converged"
    assert found.matvecs == operator.products
    assert found.value.shape == b.shape
    true = (b - A @ found.value).norm(dim=0) / b.norm(dim=0)
    # Both residuals round to eps |A| |x| / |b|, |x| <= condition |b|.
    rounding = 8 * torch.finfo(A.dtype).eps * condition * 60**0.5
    assert (true - torch.as_tensor(found.residuals)).abs().max() <= rounding
    error = (found.value - torch.linalg.solve(A, b)).norm(dim=0) / b.norm(dim=0)
    assert (error <= condition * (tol + rounding)).all()
    # Rayleigh quotients lie above the least eigenvalue.
    assert found.curvature >= 1 / condition * (1 - 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_right_hand_sides(dtype: torch.dtype) -> None:
    """Repeated, dependent, zero and differently sized ones; damping; K systems share their directions."""
    A = with_spectrum(np.geomspace(1, 1e-6, 150), dtype)
    b = normal(150, 8, dtype=dtype)
    b[:, 3], b[:, 5], b[:, 6] = b[:, 0], b[:, 1] - 2 * b[:, 2], 0
    b[:, 1] *= 1e-8
    tol = 1e-6 if dtype == torch.float64 else 1e-3  # float32 rounds the residual to eps times |x| / |b|
    found = solve(A, b, damping=1e-3, tol=tol)
    assert found.status == "converged"
    assert found.converged.all()
    assert found.residuals[6] == 0
    assert not found.value[:, 6].any()
    assert torch.allclose(found.value[:, 3], found.value[:, 0], rtol=10 * tol, atol=10 * tol)
    exact = torch.linalg.solve(A.double() + 1e-3 * torch.eye(150), b.double())
    error = (found.value.double() - exact).norm(dim=0) / b.double().norm(dim=0).clamp_min(1e-300)
    rounding = 8 * torch.finfo(dtype).eps * 1e3 * 150**0.5
    assert (error <= 1e3 * (tol + rounding)).all()
    alone = sum(solve(A, b[:, i], damping=1e-3, tol=tol).iterations for i in (0, 1, 2, 4, 5, 7))
    assert found.iterations < alone / 6


def test_more_sides_than_rows_and_identity() -> None:
    b = normal(5, 9)
    assert torch.allclose(solve(torch.eye(5, dtype=torch.float64), b).value, b)
    A = with_spectrum(np.arange(1.0, 6))
    found = solve(A, b, tol=1e-10)
    assert torch.allclose(found.value, torch.linalg.solve(A, b), atol=1e-8)
    assert found.iterations == 1
    one = solve(torch.full((1, 1), 4.0), torch.ones(1))
    assert one.value.tolist() == [0.25]
    zero = solve(A, torch.zeros(5, dtype=torch.float64))
    assert zero.matvecs == 0
    assert zero.status == "converged"
    assert not zero.value.any()


def test_preconditioner() -> None:
    """A badly scaled matrix: its diagonal brings the condition down, the residuals stay the true ones."""
    scales = torch.from_numpy(np.geomspace(1, 1e4, 200))
    A = scales[:, None] * (with_spectrum(np.linspace(1, 3, 200)) * scales)
    b = normal(200, 2)
    plain = solve(A, b, damping=0.5, max_matvecs=100_000)
    found = solve(A, b, damping=0.5, preconditioner=A.diag() + 0.5)
    assert found.status == "converged"
    assert found.matvecs < plain.matvecs / 5
    shifted = A + 0.5 * torch.eye(200, dtype=torch.float64)
    true = (b - shifted @ found.value).norm(dim=0) / b.norm(dim=0)
    assert torch.allclose(true, found.residuals, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("least", [-1e-3, -0.5, -3.0])
def test_indefinite_is_named(least: float, K: int) -> None:
    A = with_spectrum(np.concatenate([[least], np.linspace(0.5, 2, 79)]))
    with pytest.raises(
        ValueError, match=r"not positive definite.*step \d+ met .* = -.*raise damping"
    ) as caught:
        solve(A, normal(80, K))
    message = str(caught.value)
    quotient = float(message.split("<v, v> = ")[1].split(";")[0])
    assert least - 1e-9 <= quotient < 0
    assert message.count(". ") == 0
    assert solve(A, normal(80, K), damping=-least + 0.1).status == "converged"


@pytest.mark.parametrize("dtype", DTYPES)
def test_singular(dtype: torch.dtype) -> None:
    """b in the range is solved, b outside of it is not, and that is said."""
    A = with_spectrum(np.concatenate([np.zeros(20), np.linspace(1, 2, 40)]), dtype)
    b = A @ normal(60, 2, dtype=dtype)
    assert solve(A, b, tol=1e-5).status == "converged"
    with pytest.warns(FlatcoreWarning, match="singular to the rounding|allows no less|raise max_matvecs"):
        found = solve(A, normal(60, dtype=dtype))
    assert not found.converged
    assert found.residuals > 0.1
    with pytest.warns(FlatcoreWarning, match="singular to the rounding"):
        nothing = solve(torch.zeros(9, 9), torch.ones(9))
    assert nothing.residuals == 1


def test_float32_says_where_it_ends() -> None:
    A = with_spectrum(np.geomspace(1, 1e-6, 100), torch.float32)
    with pytest.warns(FlatcoreWarning, match="float32"):
        found = solve(A, normal(100, dtype=torch.float32), damping=1e-4, tol=1e-12, max_matvecs=20_000)
    shifted = A.double() + 1e-4 * torch.eye(100)
    true = (normal(100).float().double() - shifted @ found.value.double()).norm() / normal(100).norm()
    assert abs(float(true) - found.residuals) <= 100 * torch.finfo(torch.float32).eps * 1e4
    assert found.residuals <= 1e-3


def test_budget() -> None:
    A = with_spectrum(np.geomspace(1, 1e-6, 100))
    operator = Counting(A)
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
        found = solve(operator, normal(100, 3), tol=1e-9, max_matvecs=50)
    assert found.matvecs == operator.products <= 50
    assert (found.residuals <= 1).all()


def test_not_symmetric_and_not_finite() -> None:
    A = normal(40, 40)
    with pytest.raises(ValueError, match="A: expected a symmetric operator"):
        solve(A @ A.T + 10 * torch.eye(40) + 3 * torch.triu(A), normal(40))
    with pytest.raises(ValueError, match=r"not finite .* in product 5;") as caught:
        solve(Counting(with_spectrum(np.linspace(1, 9, 40)), bad=5), normal(40, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"b": [1.0]}, TypeError, "b: expected a torch.Tensor, got list"),
        ({"b": torch.ones(9)}, ValueError, r"b: expected shape \(10,\) or \(10, K\)"),
        ({"b": torch.ones(10, 0)}, ValueError, "b: expected shape"),
        ({"b": torch.ones(10, dtype=torch.int64)}, TypeError, "b: expected a floating-point"),
        ({"b": torch.full((10,), float("nan"))}, ValueError, "b: expected finite"),
        ({"damping": -1}, ValueError, "damping: expected a finite number >= 0, got -1"),
        ({"damping": "x"}, TypeError, "damping: expected a number"),
        ({"tol": 0}, ValueError, "tol: expected a positive"),
        ({"max_matvecs": 3}, ValueError, "max_matvecs: expected at least 4"),
        (
            {"preconditioner": torch.ones(9)},
            ValueError,
            r"preconditioner: expected a tensor of shape \(10,\)",
        ),
        ({"preconditioner": torch.zeros(10)}, ValueError, "preconditioner: expected positive"),
    ],
)
def test_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve(torch.eye(10), **{"b": torch.ones(10), **arguments})


def test_quiet_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(torch.eye(10), torch.ones(10))
