"""Bands of a spectral density: the smoothed truth lies in them as often as they say, with few probes too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from flatcore.density import spectral_density
from flatcore.sampling import gamma_band, student

SEEDS = 200
# Of 200 intervals that each cover with probability 0.9, less than this do with probability 1e-3 (three deviations).
LEAST_INSIDE = math.ceil(0.9 * SEEDS - 3 * (0.9 * 0.1 * SEEDS) ** 0.5)


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


RNG = np.random.default_rng(5)
SPECTRA = {
    "flat": np.linspace(0.5, 1.5, 100),
    "outliers": np.r_[10.0, 5.0, 3.0, 0.1 * RNG.random(97)],
    "null space": np.r_[np.zeros(60), 0.3 + RNG.random(40)],
    "indefinite": RNG.standard_normal(100),
}


def bell(x: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-0.5 * (x / width) ** 2) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("probes", [1, 8])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bands_and_sums_cover(spectrum: str, probes: int) -> None:
    """At the outliers (a single eigenvalue decides) and in the bulk. With one probe, the bound alone gives the band."""
    values = SPECTRA[spectrum]
    A, width = with_spectrum(values), 0.05 * np.ptp(values)
    points = np.quantile(values, [0.05, 0.5, 0.9, 1.0])
    between = np.array([np.quantile(values, 0.2) - 0.02, np.quantile(values, 0.97) + 0.02])
    density_true = bell(points[:, None] - values, width).mean(axis=1)
    share_true = (values <= between[:, None]).mean(axis=1)
    zero_true = float((values == 0).mean())
    inside = {"pdf": np.zeros(4), "cdf": np.zeros(2), "sum": np.zeros(1), "atom": np.zeros(1)}
    for seed in range(SEEDS):
        density = spectral_density(A, probes=probes, steps=20, seed=seed)
        lower, upper = density.pdf_band(points, width)
        inside["pdf"] += (lower <= density_true) & (density_true <= upper)
        lower, upper = density.cdf_band(between)
        inside["cdf"] += (lower <= share_true) & (share_true <= upper)
        if probes > 1:
            total = density.sum(np.square)
            inside["sum"] += abs(total.value - (values**2).sum()) <= 2 * total.stderr
        atom = density.near_zero(density.zero)
        least, most = atom.interval
        inside["atom"] += least - 1e-12 <= zero_true <= most + 1e-12
    for name, counts in inside.items():
        if probes > 1 or name != "sum":
            assert counts.min() >= LEAST_INSIDE, (name, counts)


def test_cdf_band_is_as_narrow_as_the_quadrature_allows() -> None:
    """All steps: only the probes' error is left. Outside the spectrum there is none."""
    values = SPECTRA["indefinite"]
    density = spectral_density(with_spectrum(values), probes=16, steps=100)
    grid = np.array([-10.0, -0.5, 0.3, 10.0])
    lower, upper = density.cdf_band(grid)
    share = (values <= grid[:, None]).mean(axis=1)
    assert ((lower <= share + 1e-9) & (share <= upper + 1e-9)).all()
    # 2.04 = t for 31 degrees; an indicator's deviation per probe is at most sqrt(2 F (1 - F) / P), doubled for chance.
    assert (upper - lower <= 2 * 2 * 2.04 * np.sqrt(2 * share * (1 - share) / 100 / 16) + 1e-6).all()
    assert density.cdf_band(grid.reshape(2, 2))[0].shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_null_space_behind_a_gap(dtype: torch.dtype) -> None:
    density = spectral_density(with_spectrum(SPECTRA["null space"], dtype), probes=8, steps=30)
    atom = density.atom
    assert atom.resolved
    # The edges of the first window are as uncertain as the node in it.
    assert density.zero == pytest.approx(32 * torch.finfo(dtype).eps * 1.25, rel=0.1)
    assert density.zero <= atom.radius <= 16 * density.zero
    assert abs(atom.share - 0.6) <= 4 * atom.stderr
    assert atom.high - atom.low <= 1e-3
    grid = np.linspace(-1, 3, 2001)
    rest, whole = (np.trapezoid(density.pdf(grid, atom=kept)[0], grid) for kept in (False, True))
    assert whole == pytest.approx(1, abs=1e-6)
    assert rest == pytest.approx(1 - atom.share, abs=1e-6)
    assert density.pdf(0.0, 0.02, atom=False)[0] < 1e-9
    assert str(atom).startswith("60.6 % (")


def test_null_space_without_a_gap_says_what_is_open() -> None:
    """Half the eigenvalues zero, the others down to 1e-9: the radius widens until the share is known."""
    values = np.r_[np.zeros(200), np.logspace(-9, 0, 200)]
    density = spectral_density(with_spectrum(values), probes=8, steps=24)
    narrow = density.near_zero(density.zero)
    assert not narrow.resolved
    assert narrow.low < 0.5 < narrow.high + 2 * narrow.stderr
    assert narrow.share not in (0, 1) or "to" in str(narrow)
    atom = density.atom
    assert atom.resolved
    assert atom.radius > density.zero
    least, most = atom.interval
    assert least <= (values <= atom.radius).mean() <= most
    assert spectral_density(with_spectrum(SPECTRA["flat"])).atom.share == 0


def test_sum_says_where_the_quadrature_decides() -> None:
    A = with_spectrum(np.logspace(-6, 0, 200))
    found = spectral_density(A, probes=8, steps=6).sum(lambda x: np.log(np.abs(x) + 1e-6))
    assert "error of the quadrature" in found.status
    assert abs(found.value - np.log(np.logspace(-6, 0, 200) + 1e-6).sum()) <= 2 * found.stderr
    assert spectral_density(A, probes=8, steps=60).sum(np.exp).status == "converged"


def test_isolated_eigenvalues() -> None:
    values = np.r_[-3.0, 5.0, 6.0, 6.01, 10.0, 0.3 * np.random.default_rng(2).standard_normal(195)]
    density = spectral_density(with_spectrum(values), probes=4, steps=60)
    assert np.allclose(density.isolated(), [-3, 5, 10], atol=1e-6)  # 6 and 6.01 are within a width


def test_decades() -> None:
    """Per decade, positive and negative apart: each part integrates to its share of the eigenvalues."""
    values = np.r_[np.zeros(30), np.logspace(-2, 1, 100), -np.logspace(-1, 0, 50)]
    density = spectral_density(with_spectrum(values), probes=8, steps=180)
    exponents = np.linspace(-5, 3, 1601)
    for sign, share in ((1, 100 / 180), (-1, 50 / 180)):
        value, _ = density.pdf(sign * 10**exponents, log=True)
        assert np.trapezoid(value, exponents) == pytest.approx(share, abs=0.05)
        lower, upper = density.pdf_band(sign * 10**exponents, log=True)
        true = bell(exponents[:, None] - np.log10(sign * values[sign * values > 0]), 0.1).sum(axis=1) / 180
        assert ((lower <= true + 1e-9) & (true <= upper + 1e-9)).mean() >= 0.9
    with pytest.raises(ValueError, match="grid: expected eigenvalues other than zero"):
        density.pdf(0.0, log=True)
    import matplotlib

    matplotlib.use("Agg")
    axes = density.plot(log=True)
    assert (axes.get_xscale(), axes.get_yscale(), len(axes.collections)) == ("log", "log", 2)
    matplotlib.pyplot.close("all")


def test_quantiles() -> None:
    """Against scipy: Student's t to 1e-3 from 16 degrees on, the Gamma interval where it is exact, n/2 eigenvalues."""
    for level in (0.5, 0.9, 0.95, 0.99):
        for degrees in (16, 30, 1000):
            assert student(level, degrees) == pytest.approx(stats.t.ppf(0.5 + level / 2, degrees), abs=2e-3)
    for shape in (4.0, 10.0, 100.0):
        lower, upper = gamma_band(np.array(2.0), np.array(2 / shape**0.5), stats.norm.ppf(0.975))
        assert lower == pytest.approx(2 * shape / stats.gamma.ppf(0.975, shape), rel=0.01)
        assert upper == pytest.approx(2 * shape / stats.gamma.ppf(0.025, shape), rel=0.02)
    assert [float(end) for end in gamma_band(np.array(0.0), np.array(0.0), 2.0)] == [0, 0]


def test_refused() -> None:
    density = spectral_density(with_spectrum(SPECTRA["flat"]), probes=2, steps=5)
    with pytest.raises(ValueError, match="level: expected a probability between 0 and 1"):
        density.pdf_band(0.0, level=1.5)
    with pytest.raises(ValueError, match="radius: expected a number >= 0"):
        density.near_zero(-1.0)
