"""Sums over all eigenvalues, held to the eigenvalues themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sampled_spectra import SEEDS, SPECTRA, P, least_covered

import flatcore as fc
from flatcore.density import spectral_density
from flatcore.errors import FlatcoreWarning
from flatcore.functionals import _QuadratureSource
from flatcore.spectral import Function
from tests.spectra import with_spectrum as matrix

# Name -> the call, the truth from eigenvalues, and the method that estimates.
CASES: dict[str, tuple[Callable[..., Any], Callable[[np.ndarray], float], str]] = {
    "logdet": (lambda A, **k: fc.logdet(A, 0.1, **k), lambda x: np.log(x + 0.1).sum(), "lanczos"),
    "soft_rank": (lambda A, **k: fc.soft_rank(A, 0.1, **k), lambda x: (x / (x + 0.1)).sum(), "lanczos"),
    "effective_dimension": (
        lambda A, **k: fc.effective_dimension(A, 2.0, **k),
        lambda x: (x / (x + 2)).sum(),
        "lanczos",
    ),
    "nuclear": (lambda A, **k: fc.schatten(A, 1, **k), lambda x: np.abs(x).sum(), "lanczos"),
    "schatten 3": (
        lambda A, **k: fc.schatten(A, 3, **k),
        lambda x: (np.abs(x) ** 3).sum() ** (1 / 3),
        "lanczos",
    ),
    "functional": (
        lambda A, **k: fc.functional(A, lambda x: np.exp(-x), **k),
        lambda x: np.exp(-x).sum(),
        "lanczos",
    ),
    "frobenius": (fc.frobenius, lambda x: np.sqrt((x**2).sum()), "hutchinson"),
    "participation_ratio": (
        fc.participation_ratio,
        lambda x: x.sum() ** 2 / (x**2).sum(),
        "hutchinson",
    ),
}
DAMPED = ("logdet", "soft_rank", "effective_dimension")  # not where eigenvalues lie below the damping
ALL = [(name, kind) for name in CASES for kind in SPECTRA if not (kind == "indefinite" and name in DAMPED)]
SHORT = [
    ("logdet", "null"),
    ("soft_rank", "outliers"),
    ("effective_dimension", "outliers"),
    ("nuclear", "indefinite"),
    ("schatten 3", "null"),
    ("functional", "flat"),
    ("frobenius", "outliers"),
    ("frobenius", "indefinite"),
    ("participation_ratio", "null"),
    ("participation_ratio", "flat"),
]


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
@pytest.mark.parametrize(("name", "kind"), ALL if os.environ.get("FLATCORE_LONG") else SHORT)
def test_two_standard_errors_hold_the_truth(name: str, kind: str) -> None:
    """Over 200 seeds, stopped where the bar says so, in at least 90 %. FLATCORE_LONG=1: every functional on every
    spectrum (a minute)."""
    call, truth, method = CASES[name]
    A, true = matrix(SPECTRA[kind]), truth(SPECTRA[kind])
    found = [call(A, rtol=0.1, seed=seed, method=method, max_matvecs=800) for seed in range(SEEDS)]
    held = np.mean([abs(e.value - true) <= 2 * e.stderr for e in found])
    assert held >= least_covered()
    # Nor are the bars wide for nothing: no more than twice what the values deviate.
    deviation = np.sqrt(np.mean([(e.value - true) ** 2 for e in found]))
    assert np.mean([e.stderr for e in found]) <= 2 * deviation
    for e in found[:20]:
        assert (e.status == "converged") == (e.stderr <= 0.1 * abs(e.value))


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    """Asked for, and for a matrix of 40 rows without being asked. Rounding: P eigenvalues, each to eps |A|, times the
    condition of log and of x / (x + d), at most |A| / 0.1."""
    call, truth, _ = CASES[name]
    kind = "null" if name in DAMPED else "indefinite"
    small = SPECTRA[kind][:40]
    for spectrum, arguments in ((SPECTRA[kind], {"method": "exact"}), (small, {})):
        estimate = call(matrix(spectrum), **arguments)
        tolerance = 2**-52 * len(spectrum) * np.abs(spectrum).max() ** 3 / 0.1
        assert abs(estimate.value - truth(spectrum)) <= tolerance
        assert (estimate.stderr, estimate.status, estimate.method) == (0, "converged", "exact")
        assert estimate.matvecs == len(spectrum)


def test_changes_over_where_exact_is_cheaper() -> None:
    """One eigenvalue of 50 among 96: the nuclear norm to 0.1 % would take 100 000 products, all columns take 96."""
    estimate = fc.schatten(matrix(SPECTRA["outliers"]), 1, rtol=1e-3)
    assert estimate.method == "exact"
    assert estimate.value == pytest.approx(SPECTRA["outliers"].sum(), rel=1e-12)
    assert P < estimate.matvecs <= 2000
    flat = fc.soft_rank(matrix(SPECTRA["flat"]), 0.1, rtol=0.01)
    assert flat.method == "stochastic Lanczos quadrature"


def test_seeds() -> None:
    A = matrix(SPECTRA["outliers"])
    one, again, other = (fc.frobenius(A, rtol=0.2, method="hutchinson", seed=s).value for s in (1, 1, 2))
    assert one == again != other


def test_few_steps_leave_a_bias_that_the_bar_holds() -> None:
    """The samples of 4 steps agree on a wrong value: the bar must come from the quadrature."""
    A, spectrum = matrix(np.geomspace(1e-6, 1, P)), np.geomspace(1e-6, 1, P)
    true = np.log(spectrum + 1e-6).sum()
    for seed in range(20):
        with pytest.warns(FlatcoreWarning, match="error of the quadrature"):
            estimate = fc.logdet(A, 1e-6, rtol=0.01, steps=4, seed=seed, method="lanczos")
        assert abs(estimate.value - true) <= 2 * estimate.stderr
        assert "raise steps" in estimate.status


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 12, 24])
def test_slow_convergence_is_not_taken_for_agreement(steps: int) -> None:
    """The same function without its bounds: each doubling of the steps gains as much as the last one."""
    spectrum = np.geomspace(1e-6, 1, P)
    A, true = matrix(spectrum), np.log(spectrum + 1e-6).sum()

    def logarithm(x: np.ndarray) -> np.ndarray:
        return np.log(np.abs(x) + 1e-6)

    with pytest.warns(FlatcoreWarning, match="error of the quadrature"):
        estimate = fc.functional(A, logarithm, rtol=0.01, steps=steps, method="lanczos")
    assert abs(estimate.value - true) <= 2 * estimate.stderr
    assert (estimate.stderr == math.inf) == (steps == 1)
    total = spectral_density(A, steps=steps).sum(logarithm)
    assert abs(total.value - true) <= 2 * total.stderr
    assert "error of the quadrature" in total.status


@pytest.mark.parametrize("limit", [1, 8, 16, 31])
def test_a_single_step_never_converges(limit: int) -> None:
    """Few products leave one step per probe, which is off by any amount and compares with nothing."""
    A = matrix(np.geomspace(1e-6, 1, P))
    with pytest.warns(FlatcoreWarning, match="error of the quadrature is up to inf"):
        estimate = fc.functional(A, lambda x: np.abs(x) ** 0.5, rtol=0.5, max_matvecs=limit, method="lanczos")
    assert estimate.matvecs <= limit
    # One that is exact for every probe does.
    assert fc.functional(3 * torch.eye(P), np.square, method="lanczos", max_matvecs=16).status == "converged"


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_gauss_and_radau_enclose_each_probe(steps: int) -> None:
    """For log(x + d) and x / (x + d) the true value of a probe lies within the error given, whatever the steps."""
    spectrum = np.geomspace(1e-4, 10, P)
    A = matrix(spectrum)
    values, vectors = torch.linalg.eigh(A)
    V = fc._C.krylov.rademacher(0, 0, 4, P, torch.empty(0, dtype=torch.float64))
    shares = ((V @ vectors) ** 2).numpy()
    for f in (lambda x: np.log(x + 1e-3), lambda x: x / (x + 1e-3)):
        source = _QuadratureSource(
            fc.linear.as_operator(A), Function(f, "f", pole=-1e-3, bernstein=True), steps, 1e-12, 0
        )
        block = source.draw(0, 4, 4 * steps)
        away = np.abs(block.values[:, 0] - shares @ f(values.numpy()))
        assert away.mean() <= block.bias[0] + 1e-9 * P
        assert block.products == 4 * steps


def test_degenerate() -> None:
    zero = torch.zeros(100, 100, dtype=torch.float64)
    for method in ("exact", "auto"):
        assert fc.frobenius(zero, method=method).value == 0
        assert fc.participation_ratio(zero, method=method).value == 0
        assert fc.soft_rank(zero, 0.1, method=method).value == 0
        assert fc.schatten(zero, 1.5, method=method).value == 0
    one = torch.tensor([[3.0]])
    assert fc.logdet(one, 1.0).value == pytest.approx(math.log(4))
    assert fc.frobenius(one, method="hutchinson").value == pytest.approx(3)
    # An eigenvalue, P times over: the first step ends the recurrence, and every sample is the truth.
    assert fc.logdet(2 * torch.eye(100), 1.0, method="lanczos").value == pytest.approx(
        100 * math.log(3), rel=1e-6
    )


def test_float32_null_space() -> None:
    """Rounding makes zeros slightly negative: no reason to refuse or to warn."""
    A = matrix(SPECTRA["null"], torch.float32)
    assert float(torch.linalg.eigvalsh(A.double()).min()) < 0
    for call in (fc.logdet, fc.soft_rank):
        for method in ("exact", "lanczos"):
            estimate = call(A, 0.01, method=method, rtol=0.2)
            x = SPECTRA["null"]
            true = (np.log(x + 0.01) if call is fc.logdet else x / (x + 0.01)).sum()
            assert abs(estimate.value - true) <= 3 * estimate.stderr + 1e-3 * abs(true)


def test_operators_of_a_net() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
    data = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    A = fc.GGN(fc.Objective(net, torch.nn.CrossEntropyLoss(), data))
    dense = A @ torch.eye(A.shape[0], dtype=torch.float64)
    x = np.linalg.eigvalsh(dense.numpy())
    for call, true in (
        (lambda **k: fc.soft_rank(A, 1e-3, **k), (x / (x + 1e-3)).sum()),
        (lambda **k: fc.logdet(A, 1e-3, **k), np.log(x + 1e-3).sum()),
        (lambda **k: fc.participation_ratio(A, **k), x.sum() ** 2 / (x**2).sum()),
    ):
        assert call(method="exact").value == pytest.approx(true, rel=1e-8)
        rough = call(rtol=0.2, method="hutchinson" if true == x.sum() ** 2 / (x**2).sum() else "lanczos")
        assert abs(rough.value - true) <= 4 * rough.stderr


def test_rtol_not_reached_is_said() -> None:
    with pytest.warns(FlatcoreWarning, match=r"the standard error is .* after 16 probes and 16 products"):
        estimate = fc.frobenius(matrix(SPECTRA["outliers"]), rtol=1e-4, max_matvecs=16)
    assert estimate.matvecs == 16
    assert "raise max_matvecs or rtol" in estimate.status


def test_negative_terms_are_said() -> None:
    spectrum = np.r_[np.linspace(0.5, 2, P - 1), -0.05]
    with pytest.warns(FlatcoreWarning, match=r"negative eigenvalues, down to -0\.05"):
        estimate = fc.soft_rank(matrix(spectrum), 0.1, method="exact")
    assert estimate.value == pytest.approx((spectrum / (spectrum + 0.1)).sum())


A0 = matrix(SPECTRA["indefinite"])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: fc.logdet(A0, 1.0, method="exact"), ValueError, "damping: expected A .* raise damping"),
        (lambda: fc.logdet(A0, 1.0), ValueError, "damping: expected A .* raise damping"),
        (lambda: fc.soft_rank(A0, 1.0), ValueError, "damping: expected A .* raise damping"),
        (
            lambda: fc.logdet(matrix(SPECTRA["null"]), 0),
            ValueError,
            "damping: expected A .* beyond the rounding",
        ),
        (lambda: fc.logdet(A0, -1.0), ValueError, "damping"),
        (lambda: fc.soft_rank(A0, 0.0), ValueError, "damping"),
        (lambda: fc.soft_rank(A0, "a"), TypeError, "damping"),
        (lambda: fc.effective_dimension(A0, math.nan), ValueError, "z: "),
        (lambda: fc.schatten(A0, 0.5), ValueError, "p: expected a number of at least 1"),
        (lambda: fc.schatten(A0, math.inf), ValueError, "p: "),
        (
            lambda: fc.frobenius(A0, method="lanczos"),
            ValueError,
            "method: frobenius offers auto, exact, hutchinson",
        ),
        (lambda: fc.frobenius(A0, rtol=0), ValueError, "rtol"),
        (lambda: fc.frobenius(A0, seed=-1), ValueError, "seed"),
        (lambda: fc.frobenius(A0, max_matvecs=0), ValueError, "max_matvecs"),
        (lambda: fc.frobenius(A0, max_matvecs=50, method="exact"), ValueError, "takes 96 products, got 50"),
        (lambda: fc.functional(A0, 3), TypeError, "f: expected a function"),
        (lambda: fc.functional(A0, np.sum), ValueError, "f: expected the shape"),
        (
            lambda: fc.functional(A0, lambda x: np.where(x < 0, np.nan, x)),
            ValueError,
            "f: expected .* finite",
        ),
        (lambda: fc.functional(A0, np.exp, steps=0), ValueError, "steps"),
        (lambda: fc.frobenius(A0 * math.nan), ValueError, "not finite"),
        (lambda: fc.frobenius(A0 * math.nan, method="exact"), ValueError, "not finite"),
        (lambda: fc.logdet(A0 * math.nan, 1.0), ValueError, "not finite"),
        (lambda: fc.frobenius(A0[:5]), ValueError, "A: "),
    ],
)
def test_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_must_be_raised_is_named_as_the_caller_knows_it() -> None:
    A = torch.diag(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    for call, name in (
        (lambda: fc.effective_dimension(A, 0.5), "z"),
        (lambda: fc.soft_rank(A, 0.5), "damping"),
        (lambda: fc.logdet(A, 0.5), "damping"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected A \+ {name} I .* raise {name}"):
            call()
