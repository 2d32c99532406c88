"""The density's bands, its atom at zero and the marks of single eigenvalues, held to the spectrum."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from sampled_spectra import SEEDS, SPECTRA, P, least_covered

from flatcore.density import Density, spectral_density
from flatcore.means import score_interval, student
from tests.spectra import with_spectrum as matrix

matplotlib.use("Agg")


def smoothed(spectrum: np.ndarray, grid: np.ndarray, width: float, log: bool = False) -> np.ndarray:
    """The density of the eigenvalues other than zero; ``log``: of the positive ones, per decade."""
    nonzero = spectrum[spectrum > 1e-9] if log else spectrum[np.abs(spectrum) > 1e-9]
    away = np.log10(nonzero) - np.log10(grid[:, None]) if log else grid[:, None] - nonzero
    bells = np.exp(-0.5 * (away / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return np.asarray(bells.sum(axis=1) / len(spectrum))


@pytest.mark.parametrize(
    ("kind", "probes", "steps"),
    [("flat", 4, 20), ("outliers", 2, 12), ("null", 4, 12), ("indefinite", 4, 20)],
)
def test_bands_hold_the_truth(kind: str, probes: int, steps: int) -> None:
    """At every point, over 200 seeds, at least 90 % of the time (they are asked for 95 %)."""
    spectrum = SPECTRA[kind]
    A, low, high = matrix(spectrum), spectrum.min(), spectrum.max()
    width = (high - low) / 30
    grid = np.linspace(low - width, high + width, 9) + 1e-4 * width  # no eigenvalue on it
    decades = np.geomspace(0.02, high, 7)
    upto = (spectrum < grid[:, None]).mean(axis=1)
    linear, log = smoothed(spectrum, grid, width), smoothed(spectrum, decades, 0.15, log=True)
    held = {
        "cdf": np.zeros(9),
        "pdf": np.zeros(9),
        "log": np.zeros(7),
        "atom": np.zeros(1),
        "sum": np.zeros(1),
    }
    zeros, total = (np.abs(spectrum) < 1e-9).mean(), np.log(np.abs(spectrum) + 0.5).sum()
    for seed in range(SEEDS):
        density = spectral_density(A, probes=probes, steps=steps, seed=seed)
        for name, (lower, upper), true in (
            ("cdf", density.cdf_band(grid), upto),
            ("pdf", density.pdf_band(grid, width, atom=False), linear),
            ("log", density.pdf_band(decades, 0.15, log=True), log),
        ):
            held[name] += (lower - 1e-9 <= true) & (true <= upper + 1e-9)
        held["atom"] += abs(density.atom.share - zeros) <= 2 * density.atom.stderr
        estimate = density.sum(lambda x: np.log(np.abs(x) + 0.5))
        held["sum"] += abs(estimate.value - total) <= 2 * estimate.stderr
    assert {
        name: (counts / SEEDS).min() >= least_covered() for name, counts in held.items()
    } == dict.fromkeys(held, True), {name: counts / SEEDS for name, counts in held.items()}


def test_bands_are_not_wide_for_nothing() -> None:
    """40 steps and 8 probes of a flat spectrum: the share below is known to two deviations of 8 * 96 / 2
    binomial trials, 0.05, and the weight of a node, 0.04 in the middle; the pdf to a third."""
    density = spectral_density(matrix(SPECTRA["flat"]), probes=8, steps=40)
    grid = np.linspace(0.6, 1.4, 30)
    lower, upper = density.cdf_band(grid)
    assert (upper - lower).mean() <= 0.14
    lower, upper = density.pdf_band(grid, 0.1)
    assert (upper - lower).mean() <= 0.67
    wider = density.pdf_band(grid, 0.1, level=0.99)
    assert (wider[1] - wider[0] > upper - lower).all()


def test_band_is_open_where_steps_do_not_reach() -> None:
    """Between nodes that lie far apart the density may be zero or not: rules of 6 and 8 steps agree on zero."""
    spectrum = np.r_[np.linspace(-1, 1, P - 1), 0.003]
    density = spectral_density(matrix(spectrum), probes=8, steps=8)
    point, width = np.array([0.003]), 0.02
    _, upper = density.pdf_band(point, width)
    assert upper >= smoothed(spectrum, point, width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_atom_at_zero(dtype: torch.dtype) -> None:
    """72 of 96 eigenvalues are zero; the Krylov space of 25 distinct ones is exhausted, so all is resolved."""
    density = spectral_density(matrix(SPECTRA["null"], dtype), probes=8, steps=40)
    atom = density.atom
    assert atom.resolved
    assert abs(atom.share - 0.75) <= 3 * atom.stderr
    assert 0 < atom.stderr <= 0.05
    assert atom.low - 1e-9 <= atom.share <= atom.high + 1e-9
    grid = np.linspace(-1, 12, 4001)
    rest = np.trapezoid(density.pdf(grid, 0.05, atom=False)[0], grid)
    assert rest == pytest.approx(1 - atom.share, abs=1e-4)
    assert np.trapezoid(density.pdf(grid, 0.05)[0], grid) == pytest.approx(1, abs=1e-4)
    assert density.near_zero(100.0).share == pytest.approx(1)


def test_atom_is_open_without_a_gap() -> None:
    """Eigenvalues down to zero: 8 steps cannot tell what lies within 1e-3, and say so."""
    atom = spectral_density(matrix(np.linspace(-1, 1, P)), probes=4, steps=8).near_zero(1e-3)
    assert not atom.resolved
    assert atom.high >= 0.02
    assert atom.low == 0


def test_null_space_without_a_gap() -> None:
    """Half the eigenvalues zero, the others down to 1e-9: the window widens until the share in it is known."""
    values = np.r_[np.zeros(200), np.geomspace(1e-9, 1, 200)]
    density = spectral_density(matrix(values), probes=8, steps=24)
    assert density.atom.high - density.atom.low > 0.05
    wide = density.near_zero()
    assert wide.high - wide.low <= 0.05
    assert density.zero < wide.radius <= 0.1
    assert abs(wide.share - (values <= wide.radius).mean()) <= 2 * wide.stderr
    assert f"% within {wide.radius:.2g} of zero" in str(wide)
    behind_a_gap = spectral_density(matrix(SPECTRA["null"]))
    assert behind_a_gap.near_zero() == behind_a_gap.atom


def test_no_atom() -> None:
    assert spectral_density(matrix(SPECTRA["flat"])).atom.share == 0
    assert spectral_density(torch.zeros(7, 7)).atom.share == pytest.approx(1)


def test_isolated() -> None:
    density = spectral_density(matrix(SPECTRA["outliers"]), probes=8, steps=30)
    np.testing.assert_allclose(density.isolated(), [8, 20, 50], rtol=1e-6)
    assert len(spectral_density(matrix(SPECTRA["flat"]), probes=8, steps=30).isolated(0.02)) == 0


def test_decades_count_every_positive_eigenvalue() -> None:
    density = spectral_density(matrix(SPECTRA["indefinite"]), probes=8, steps=P)
    share = 0.0
    for sign in (1, -1):
        exponents = np.linspace(-8, 3, 4001)
        value = density.pdf(sign * 10.0**exponents, log=True)[0]
        share += np.trapezoid(value, exponents)
    assert share == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", SPECTRA)
def test_plot(kind: str, log: bool) -> None:
    density = spectral_density(matrix(SPECTRA[kind]), probes=4, steps=30)
    axes = density.plot(log=log)
    assert axes.get_yscale() == "log"
    assert axes.get_xscale() == ("log" if log else "linear")
    texts = " | ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert ("at zero" in texts) == (kind == "null")
    assert ("isolated" in texts) or log or kind == "flat"
    assert ("negative" in texts) == (log and kind == "indefinite")
    matplotlib.pyplot.close("all")


def test_student() -> None:
    """Tables of Student's t: 2.306 for 8 degrees of freedom, 2.060 for 25; 3.355 at 99 % for 8."""
    assert student(0.95, 8) == pytest.approx(2.306, abs=2e-3)
    assert student(0.95, 25) == pytest.approx(2.060, abs=1e-3)
    assert student(0.99, 8) == pytest.approx(3.355, abs=5e-3)


def test_score_interval_solves_its_equation() -> None:
    for share in (0.0, 0.01, 0.5, 1.0):
        for end in score_interval(np.float64(share), 50.0, 0.95):
            assert abs(end - share) == pytest.approx(1.959964 * (end * (1 - end) / 50) ** 0.5, abs=1e-6)


def refusals(density: Density) -> list[tuple[str, object]]:
    return [
        ("width: expected a positive", lambda: density.pdf_band(1.0, 0.0)),
        ("width: expected a positive", lambda: density.pdf(1.0, -1.0, log=True)),
        ("level: expected a probability", lambda: density.pdf_band(1.0, level=1.0)),
        ("level: expected a probability", lambda: density.cdf_band(1.0, level=0.0)),
        ("grid: expected eigenvalues other than zero", lambda: density.pdf(0.0, log=True)),
        ("radius: expected a number >= 0", lambda: density.near_zero(-1.0)),
    ]


def test_refused() -> None:
    for text, call in refusals(spectral_density(matrix(SPECTRA["flat"]), probes=2, steps=5)):
        with pytest.raises(ValueError, match=text):
            call()
