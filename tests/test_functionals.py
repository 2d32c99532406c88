"""Functionals of all eigenvalues: against the spectrum, with bars that cover, errors of the quadrature included.

With FLATCORE_LONG=1 the coverage runs go over every functional and every spectrum (some minutes).
"""

from __future__ import annotations

import math
import os
import warnings

import numpy as np
import pytest
import torch

import flatcore as fc
from flatcore import _C
from flatcore.errors import FlatcoreWarning

SEEDS = 200
# Of 200 runs that each cover with probability 0.9, less than this do with probability 1e-3 (three deviations).
LEAST_INSIDE = math.ceil(0.9 * SEEDS - 3 * (0.9 * 0.1 * SEEDS) ** 0.5)
DAMPING = 0.01


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


RNG = np.random.default_rng(5)
POSITIVE = {
    "flat": np.linspace(0.5, 1.5, 100),
    "outliers": np.r_[10.0, 5.0, 3.0, 0.1 * RNG.random(97)],
    "null space": np.r_[np.zeros(60), RNG.random(40)],
    "rank one": np.r_[1.0, np.zeros(99)],
    "graded": np.logspace(-6, 0, 100),
}
INDEFINITE = {
    "indefinite": RNG.standard_normal(100),
    "negative outlier": np.r_[6.0, -3.0, 0.1 * RNG.standard_normal(98)],
}
SPECTRA = POSITIVE | INDEFINITE


def true_value(name: str, x: np.ndarray) -> float:
    return float(
        {
            "logdet": lambda: np.log(x + DAMPING).sum(),
            "soft_rank": lambda: (x / (x + DAMPING)).sum(),
            "effective_dimension": lambda: (x / (x + DAMPING)).sum(),
            "frobenius": lambda: (x**2).sum() ** 0.5,
            "participation_ratio": lambda: x.sum() ** 2 / (x**2).sum(),
            "schatten": lambda: np.abs(x).sum(),
            "functional": lambda: np.exp(x).sum(),
        }[name]()
    )


def call(name: str, A: object, **options: object) -> object:
    second = {"schatten": 1, "functional": np.exp}.get(name, DAMPING)
    arguments = (A,) if name in ("frobenius", "participation_ratio") else (A, second)
    return getattr(fc, name)(*arguments, **options)


def sampled(name: str) -> str:
    return "hutchinson" if name in ("frobenius", "participation_ratio") else "lanczos"


NAMES = ("logdet", "soft_rank", "frobenius", "participation_ratio", "schatten", "functional")
QUICK = [
    ("logdet", "rank one"),
    ("logdet", "null space"),
    ("soft_rank", "outliers"),
    ("soft_rank", "graded"),
    ("effective_dimension", "null space"),
    ("frobenius", "outliers"),
    ("frobenius", "indefinite"),
    ("participation_ratio", "outliers"),
    ("participation_ratio", "graded"),
    ("participation_ratio", "indefinite"),
    ("schatten", "null space"),
    ("functional", "rank one"),
    ("functional", "indefinite"),
]
ALL = [
    (name, spectrum)
    for name in NAMES
    for spectrum in (POSITIVE if name in ("logdet", "soft_rank") else SPECTRA)
]


@pytest.mark.parametrize(("name", "spectrum"), ALL if os.environ.get("FLATCORE_LONG") else QUICK)
def test_two_standard_errors_cover(name: str, spectrum: str) -> None:
    values = SPECTRA[spectrum]
    A, truth, inside = with_spectrum(values), true_value(name, values), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        for seed in range(SEEDS):
            found = call(name, A, method=sampled(name), rtol=0.2, max_matvecs=800, seed=seed)
            inside += abs(found.value - truth) <= 2 * found.stderr + 1e-12 * abs(truth)
    assert inside >= LEAST_INSIDE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact(name: str, dtype: torch.dtype) -> None:
    A = with_spectrum(POSITIVE["flat"], dtype)
    truth = true_value(name, np.linalg.eigvalsh(A.double().numpy()))
    found = call(name, A, method="exact")
    assert (found.method, found.stderr, found.matvecs, found.status) == ("exact", 0.0, 100, "converged")
    assert abs(found.value - truth) <= 1e-12 * 100 * max(1, abs(truth))
    small = A[:50, :50]
    assert call(name, small).method == "exact"


def test_changes_to_exact_where_cheaper() -> None:
    """A log determinant near zero: no number of probes up to P gives it to rtol."""
    values = np.exp(np.r_[np.linspace(-2, 2, 200), 0.01])
    A = with_spectrum(values)
    found = fc.logdet(A, 0)
    assert found.method == "exact"
    assert abs(found.value - 0.01) <= 1e-11
    assert 201 < found.matvecs <= 2000
    assert fc.frobenius(with_spectrum(np.linspace(1, 2, 400)), rtol=0.05).method == "hutchinson"


def test_estimates_converge_to_the_rtol_asked_for() -> None:
    """Four standard errors, which one seed in thousands exceeds."""
    values = np.r_[np.zeros(200), np.linspace(0.1, 1, 300)]
    for dtype in (torch.float64, torch.float32):
        A = with_spectrum(values, dtype)
        for name in NAMES:
            found = call(name, A, rtol=0.03, seed=1)
            assert found.status == "converged"
            assert found.stderr <= 0.03 * abs(found.value)
            assert abs(found.value - true_value(name, values)) <= 4 * found.stderr


@pytest.mark.parametrize("steps", [2, 6, 20])
def test_quadrature_error_is_in_the_bar(steps: int) -> None:
    """With few steps and a small damping the quadrature decides: its bounds hold the truth, and that is said."""
    values = np.logspace(-6, 0, 300)
    A = with_spectrum(values)
    for name, truth in (
        ("logdet", np.log(values + 1e-5).sum()),
        ("soft_rank", (values / (values + 1e-5)).sum()),
    ):
        with pytest.warns(FlatcoreWarning, match="error of the quadrature is up to"):
            found = getattr(fc, name)(A, 1e-5, method="lanczos", steps=steps, rtol=1e-3)
        assert "raise steps" in found.status
        assert abs(found.value - truth) <= found.stderr
    with pytest.warns(FlatcoreWarning, match="error of the quadrature"):
        found = fc.functional(A, lambda x: np.sqrt(np.abs(x)), method="lanczos", steps=steps, rtol=1e-6)
    assert abs(found.value - np.sqrt(values).sum()) <= 2 * found.stderr


def test_gauss_and_radau_enclose_every_probe() -> None:
    """For log(x + d) the value <v, f(A) v> of each probe lies between its two rules."""
    values = np.r_[np.zeros(20), np.logspace(-4, 0, 60)]
    A = with_spectrum(values)
    sizes, vectors = torch.linalg.eigh(A)
    for steps in (3, 8, 20):
        V = _C.krylov.rademacher(0, 0, 5, 80, torch.empty(0, dtype=torch.float64))
        alpha, beta, lengths, _ = _C.krylov.tridiagonalise(lambda X: (X @ A).contiguous(), V, steps)
        from flatcore.quadrature import Jacobi

        jacobi = Jacobi.of(alpha, beta, lengths, steps)
        true = ((V @ vectors) ** 2 / 80 @ torch.log(sizes.clamp(min=0) + 1e-3)).numpy()
        upper, lower = (
            (weights * np.log(nodes + 1e-3)).sum(axis=1)
            for nodes, weights in (jacobi.gauss(), jacobi.radau(-1e-13))
        )
        assert (lower <= true + 1e-9).all() and (true <= upper + 1e-9).all()
        # Degree 2 steps: one more than Gauss.
        nodes, weights = jacobi.radau(-0.1)
        for degree in range(2 * steps + 1 if steps < 10 else 1):
            moment = ((V @ vectors) ** 2 / 80 @ sizes**degree).numpy()
            assert np.abs((weights * nodes**degree).sum(axis=1) - moment).max() <= 1e-12


def test_steps_end_when_the_quadrature_is_good_enough() -> None:
    A = with_spectrum(np.linspace(1, 2, 200))
    found = fc.logdet(A, 1.0, method="lanczos", rtol=0.05)
    assert found.matvecs == 16 * 4
    assert fc.functional(A, np.exp, method="lanczos", rtol=0.05).matvecs == 16 * 12


def test_sampled_numbers_are_the_formulas() -> None:
    """frobenius and participation_ratio from |A v|² and <v, A v>, written out with their second-order corrections."""
    A = with_spectrum(INDEFINITE["indefinite"] + 2)
    V = _C.krylov.rademacher(3, 0, 32, 100, torch.empty(0, dtype=torch.float64))
    q, t = ((V @ A) ** 2).sum(dim=1), ((V @ A) * V).sum(dim=1)
    found = fc.frobenius(A, method="hutchinson", rtol=0.5, seed=3)
    root, variance = float(q.mean()) ** 0.5, float(q.var()) / 32
    assert found.matvecs == 32
    assert abs(found.value - (root + variance / (8 * root**3))) <= 1e-10 * root
    found = fc.participation_ratio(A, method="hutchinson", rtol=0.5, seed=3)
    a, b = float(t.mean()), float(q.mean())
    C = torch.cov(torch.stack([t, q])).numpy() / 32
    second = C[0, 0] / b - 2 * a / b**2 * C[0, 1] + a**2 / b**3 * C[1, 1]
    assert abs(found.value - (a**2 / b - second)) <= 1e-10 * a**2 / b


def test_bound_on_the_variance_is_the_true_one_for_random_eigenvectors() -> None:
    """2 (tr B² - (tr B)² / P), B = A², from pairs of probes: mean over seeds within four deviations."""
    from flatcore.functionals import _SquareSource
    from flatcore.linear import as_operator

    values = np.linspace(0.1, 2, 100)
    A = with_spectrum(values)
    bounds = [float(_SquareSource(as_operator(A), seed).draw(0, 8, 8).bound[0, 0]) for seed in range(SEEDS)]
    squares = values**2
    true = 2 * ((squares**2).sum() - squares.sum() ** 2 / 100)
    assert abs(np.mean(bounds) - true) <= 4 * np.std(bounds) / SEEDS**0.5 + 2 * true / 100


def test_zero_and_identity() -> None:
    zero, one = torch.zeros(100, 100), torch.eye(100, dtype=torch.float64)
    for name, expected in (
        ("soft_rank", 0.0),
        ("frobenius", 0.0),
        ("participation_ratio", 0.0),
        ("schatten", 0.0),
    ):
        found = call(name, zero, method=sampled(name))
        assert (found.value, found.stderr, found.status) == (expected, 0.0, "converged")
    for name in NAMES:
        found = call(name, one, method=sampled(name))
        assert abs(found.value - true_value(name, np.ones(100))) <= 1e-10 * 300
        assert found.stderr <= 1e-6
    assert call("logdet", torch.ones(1, 1)).value == pytest.approx(math.log(1 + DAMPING))


def test_a_function_needs_to_be_defined_on_the_spectrum_only() -> None:
    """Two eigenvalues, +-1: the Krylov space ends after two steps, and nothing is asked of f elsewhere."""
    A = with_spectrum(np.repeat([1.0, -1.0], [60, 40]))
    found = fc.functional(
        A, lambda x: 1 / np.where(np.abs(np.abs(x) - 1) < 0.1, x, 0.0), method="lanczos", rtol=0.5
    )
    assert abs(found.value - 20) <= 4 * found.stderr


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_never_clipped(method: str) -> None:
    A = with_spectrum(INDEFINITE["indefinite"])
    for function in (fc.logdet, fc.soft_rank):
        with pytest.raises(ValueError, match=r"A \+ damping to be positive definite.*at or below -"):
            function(A, 0.5, method=method)
    with pytest.raises(ValueError, match="positive definite beyond the rounding"):
        fc.logdet(with_spectrum(POSITIVE["null space"]), 0, method=method)
    least = float(INDEFINITE["indefinite"].min())
    values = INDEFINITE["indefinite"]
    with pytest.warns(FlatcoreWarning, match="negative eigenvalues, down to -"):
        found = fc.soft_rank(A, 2 - least, method=method, rtol=0.5, max_matvecs=1900)
    assert abs(found.value - (values / (values + 2 - least)).sum()) <= 4 * found.stderr + 1e-10


def test_products_are_counted_and_limited() -> None:
    class Counting:
        shape, dtype, device = (200, 200), torch.float64, torch.device("cpu")
        A, products = with_spectrum(np.logspace(-5, 0, 200)), 0

        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            self.products += V.shape[1]
            return self.A @ V

    for limit in (1, 5, 17, 40, 333):
        for name in NAMES:
            operator = Counting()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FlatcoreWarning)
                found = call(name, operator, method=sampled(name), rtol=1e-6, max_matvecs=limit)
            assert found.matvecs == operator.products <= limit
            assert found.status != "converged"


def test_same_seed_same_value() -> None:
    A = with_spectrum(POSITIVE["graded"])
    values = [fc.soft_rank(A, DAMPING, method="lanczos", rtol=0.1, seed=seed).value for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda A: fc.soft_rank(A, 0), "damping: expected a positive number, got 0"),
        (lambda A: fc.logdet(A, -1), "damping: expected a positive number, got -1"),
        (lambda A: fc.effective_dimension(A, 0), "z: expected a positive number"),
        (lambda A: fc.schatten(A, 0.5), "p: expected a number of at least 1, got 0.5"),
        (
            lambda A: fc.frobenius(A, method="lanczos"),
            "method: frobenius offers auto, exact, hutchinson, got",
        ),
        (lambda A: fc.logdet(A, 1, method="hutchinson"), "method: logdet offers auto, exact, lanczos, got"),
        (
            lambda A: fc.logdet(A, 1, method="exact", max_matvecs=9),
            "the exact logdet takes 100 products, got 9",
        ),
        (lambda A: fc.functional(A, np.exp, steps=0), "steps: expected at least 1"),
        (lambda A: fc.functional(A, np.sum, method="lanczos"), "f: expected the shape"),
        (
            lambda A: fc.functional(A, lambda x: x * np.inf, method="lanczos"),
            "f: expected a function that is finite",
        ),
        (lambda A: fc.functional(A * float("nan"), np.exp, method="lanczos"), "not finite"),
        (lambda A: fc.frobenius(A * float("nan")), "not finite"),
    ],
)
def test_refused(run: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(with_spectrum(POSITIVE["flat"]))
    with pytest.raises(TypeError, match="f: expected a function"):
        fc.functional(with_spectrum(POSITIVE["flat"]), 3)


def test_hessian_of_a_net() -> None:
    """On a GGN: the soft rank against its dense eigenvalues."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    data = torch.randn(30, 8), torch.randint(3, (30,))
    G = fc.GGN(fc.Objective(model, torch.nn.CrossEntropyLoss(), data))
    values = np.linalg.eigvalsh(G.to_dense().double().numpy())
    found = fc.soft_rank(G, 1e-2, method="lanczos", rtol=0.05)
    assert abs(found.value - (values / (values + 1e-2)).sum()) <= 4 * found.stderr
    assert found.status == "converged"
