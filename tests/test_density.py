"""Stochastic Lanczos quadrature, held to the spectrum it samples."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from flatcore import _C
from flatcore.density import spectral_density

matplotlib.use("Agg")


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


SPECTRUM = np.concatenate([[8.0, 5.0, 5.0, -2.0], 0.5 * np.random.default_rng(1).standard_normal(146)])


def exact_measure(A: torch.Tensor, probe: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and the shares of the start vector in them: what the probe's quadrature approximates."""
    values, vectors = torch.linalg.eigh(A.double())
    v = _C.krylov.rademacher(seed, probe, 1, len(A), torch.empty(0, dtype=torch.float64))[0]
    return values.numpy(), ((vectors.T @ v) ** 2 / len(A)).numpy()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_quadrature_integrates_polynomials(dtype: torch.dtype, rounding: float) -> None:
    """Gauss: j nodes integrate degree 2 j - 1 exactly: with 5 steps every moment to the 9th, but not the
    10th.

    On a uniform spectrum in [-1, 1] the 10th is off by about |monic Legendre 5|² / 2 = 1.5e-3.
    """
    A = with_spectrum(np.linspace(-1, 1, 90), dtype)
    density = spectral_density(A, probes=3, steps=5, seed=2)
    for probe in range(3):
        values, shares = exact_measure(A, probe, 2)
        error = [
            abs((density.weights[probe] * density.nodes[probe] ** d).sum() - shares @ values**d)
            for d in range(11)
        ]
        assert max(error[:10]) <= rounding
        assert error[10] > 1e-4


def test_cdf_obeys_chebyshev_markov_stieltjes() -> None:
    """At a node the true distribution lies between the weights below it and the weights up to it."""
    A = with_spectrum(SPECTRUM)
    density = spectral_density(A, probes=4, steps=20)
    for probe in range(4):
        values, shares = exact_measure(A, probe, 0)
        upto = np.cumsum(density.weights[probe])
        for j, node in enumerate(density.nodes[probe]):
            below = shares[values < node - 1e-9].sum()
            up_to = shares[values <= node + 1e-9].sum()
            assert upto[j] - density.weights[probe][j] - 1e-9 <= up_to
            assert below <= upto[j] + 1e-9


def test_all_steps_give_the_whole_spectrum() -> None:
    """steps = P: each probe knows its measure exactly, and their mean estimates the exact one."""
    A = with_spectrum(SPECTRUM)
    density = spectral_density(A, probes=16, steps=1000)
    assert density.nodes.shape == (16, 150)  # clipped
    values, shares = exact_measure(A, 3, 0)
    grid = np.linspace(-3.01, 9.03, 61)  # no eigenvalue on it
    one = (density.weights[3][None] * (density.nodes[3] < grid[:, None])).sum(axis=1)
    np.testing.assert_allclose(one, (shares[None] * (values < grid[:, None])).sum(axis=1), atol=1e-9)
    true = (SPECTRUM[None] < grid[:, None]).mean(axis=1)
    # The deviation of <v, Π v> for the projector Π onto the eigenvalues below: Hutchinson's formula. The
    # sample's own bar would not do: where one eigenvalue decides, it comes from sixteen squares of a normal
    # number.
    sizes, vectors = torch.linalg.eigh(A)
    for x, share, expected in zip(grid, density.cdf(grid)[0], true, strict=True):
        projector = vectors[:, sizes < x] @ vectors[:, sizes < x].T
        deviation = (2 * float((projector**2).sum() - (projector.diag() ** 2).sum()) / 16) ** 0.5 / 150
        assert abs(share - expected) <= 4 * deviation + 1e-9


def test_sums_against_the_truth() -> None:
    """tr A and tr A² are polynomials, so the only error is the probes'; tr exp(A) converges fast."""
    A = with_spectrum(SPECTRUM)
    density = spectral_density(A, probes=32, steps=30, seed=1)
    for function in (lambda x: x, np.square, np.exp):
        estimate = density.sum(function)
        assert abs(estimate.value - function(SPECTRUM).sum()) <= 4 * estimate.stderr
    V = _C.krylov.rademacher(1, 0, 32, 150, torch.empty(0, dtype=torch.float64))
    hutchinson = ((V @ A) * V).sum(dim=1)
    assert abs(density.sum(lambda x: x).value - float(hutchinson.mean())) <= 1e-10
    # 31 degrees of freedom of the sample and 16 of the bound 2 (tr A² - (tr A)² / P), both from the same products.
    bound = 2 * (float(((V @ A) ** 2).sum(dim=1).mean()) - float(hutchinson.mean()) ** 2 / 150)
    moderated = (31 * float(hutchinson.var()) + 16 * bound) / 47
    assert abs(density.sum(lambda x: x).stderr - (moderated / 32) ** 0.5) <= 1e-10
    assert density.sum(np.ones_like).value == pytest.approx(150, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "spectrum", [np.zeros(40), np.full(40, -3.0), np.repeat([2.0, -1.0], 20), np.r_[7.0, np.zeros(39)]]
)
def test_exhausted_krylov_spaces(spectrum: np.ndarray, dtype: torch.dtype) -> None:
    """Few distinct eigenvalues: the recurrence ends early, nodes are eigenvalues and weights exact."""
    A = with_spectrum(spectrum, dtype)
    density = spectral_density(A, probes=3, steps=30)
    rounding = 64 * torch.finfo(dtype).eps * 40**0.5
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, atol=rounding)
    for probe in range(3):
        _, shares = exact_measure(A, probe, 0)
        values = np.linalg.eigvalsh(A.double().numpy())
        for value in np.unique(spectrum):
            near = np.abs(density.nodes[probe] - value) <= rounding * max(1, np.abs(spectrum).max())
            true = shares[np.abs(values - value) < 1e-3].sum()
            assert abs(density.weights[probe][near].sum() - true) <= 10 * rounding


@pytest.mark.parametrize("P", [1, 2, 3])
def test_tiny(P: int) -> None:
    A = torch.diag(torch.arange(1.0, P + 1))
    density = spectral_density(A, probes=2)
    assert density.sum(lambda x: x).value == pytest.approx(P * (P + 1) / 2, rel=1e-6)
    # Signs sample a diagonal matrix exactly; the bound on their variance does not know it for diagonal.
    spread = sum(x**2 for x in range(1, P + 1)) - (P * (P + 1) / 2) ** 2 / P
    assert 0 <= density.sum(lambda x: x).stderr <= spread**0.5 + 1e-5


def test_block_size_changes_nothing_but_memory() -> None:
    A = with_spectrum(SPECTRUM)
    whole, parts = (
        spectral_density(A, probes=5, steps=12),
        spectral_density(A, probes=5, steps=12, block_size=2),
    )
    np.testing.assert_allclose(whole.nodes, parts.nodes, atol=1e-9)
    np.testing.assert_allclose(whole.weights, parts.weights, atol=1e-9)
    assert whole.matvecs == parts.matvecs == 60
    again = spectral_density(A, probes=5, steps=12)
    assert np.array_equal(whole.nodes, again.nodes)
    assert np.array_equal(whole.weights, again.weights)


def test_density_curve() -> None:
    """It integrates to 1, is the smoothed spectrum within its band, and stands for any grid shape."""
    A = with_spectrum(SPECTRUM)
    density = spectral_density(A, probes=16, steps=150)
    grid = np.linspace(-4, 10, 4001)
    for width in (None, 0.3):
        value, _ = density.pdf(grid, width)
        assert np.trapezoid(value, grid) == pytest.approx(1, abs=1e-6)
    value, stderr = density.pdf(grid, 0.3)
    true = np.exp(-0.5 * ((grid[:, None] - SPECTRUM) / 0.3) ** 2).mean(axis=1) / (0.3 * np.sqrt(2 * np.pi))
    assert (np.abs(value - true) <= 4 * stderr + 1e-9).all()
    assert density.pdf(grid.reshape(-1, 1)[:8])[0].shape == (8, 1)
    assert density.cdf(0.0)[0].shape == ()


def test_one_probe_has_no_band() -> None:
    density = spectral_density(with_spectrum(SPECTRUM), probes=1, steps=10)
    assert np.isnan(density.sum(np.square).stderr)
    assert np.isnan(density.pdf(0.0)[1])


@pytest.mark.parametrize("probes", [1, 4])
def test_plot(probes: int) -> None:
    density = spectral_density(with_spectrum(SPECTRUM), probes=probes, steps=20)
    axes = density.plot()
    assert axes.get_yscale() == "log"
    assert len(axes.collections) == 1  # a band even for one probe
    assert density.plot(axes) is axes
    matplotlib.pyplot.close("all")
    spectral_density(torch.eye(5)).plot()
    matplotlib.pyplot.close("all")


def test_exceptions_pass_through() -> None:
    class Failing:
        shape, dtype, device = (9, 9), torch.float64, torch.device("cpu")

        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        spectral_density(Failing())


def test_refused() -> None:
    A = with_spectrum(SPECTRUM)
    for arguments in ({"probes": 0}, {"steps": 0}, {"block_size": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            spectral_density(A, **arguments)
    with pytest.raises(ValueError, match="not finite"):
        spectral_density(A * float("nan"))
    density = spectral_density(A, probes=2, steps=5)
    with pytest.raises(ValueError, match="function: expected the shape"):
        density.sum(np.sum)
    with pytest.raises(ValueError, match="width: expected a positive number"):
        density.pdf(0.0, width=0.0)
