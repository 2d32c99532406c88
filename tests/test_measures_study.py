"""The study of measures against generalisation gaps: its ranks against scipy and counting, its copies against torch."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"
PARAMETERS = 64 * 48 + 48 + 48 * 48 + 48 + 48 * 10 + 10
EPS = torch.finfo(torch.float64).eps
INVARIANT = ("normalized_sharpness", "fisher_rao", "path_norm")
OPTIONS = [
    *("--batch-size", "40"),
    *("--learning-rate", "0.3", "--learning-rate", "0.1", "--learning-rate", "0.001"),
    *("--weight-decay", "0", "--weight-decay", "0.002"),
    *("--images", "40", "--max-steps", "1000", "--resamples", "50"),
    *(part for name in (*INVARIANT, "trace", "random_number") for part in ("--measure", name)),
]


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("measures_study")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """What the command wrote as JSON, what it printed, and where it wrote."""
    out = tmp_path_factory.mktemp("study")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "measures_study.py"), *OPTIONS, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "measures_study.json").read_text()), done.stdout, out


def test_nets(run: tuple[dict[str, Any], str, Path]) -> None:
    """Those that learn too slowly are named and left out; the others are at the training loss."""
    report, printed, out = run
    (nets,) = report["nets"]
    assert printed.count("so its setting is left out") == 2
    assert {net["setting"]["learning_rate"] for net in nets} == {0.3, 0.1} and len(nets) == 4
    for net in nets:
        assert net["reached"] and net["training_loss"] <= 0.02 < net["test_loss"]
        assert net["training_error"] < net["test_error"]
    assert (out / "measures_study.png").stat().st_size > 10_000
    assert "Kendall's tau-b" in printed and "normalized sharpness" in printed


def test_copies(run: tuple[dict[str, Any], str, Path]) -> None:
    """Each of the net's products is off by its own rounding, a logit's thousand terms by no more than all of these;
    normalized sharpness is a minimum found to 1e-12 besides, on either side."""
    report, _, _ = run
    measures = report["measures"]
    assert report["largest_relative_difference_of_logits"] <= PARAMETERS * EPS
    for name in INVARIANT:
        search = 2e-12 if name == "normalized_sharpness" else 0.0
        assert 1 <= measures[name]["factor"] <= 1 + 2 * PARAMETERS * EPS + search, name
        assert measures[name]["loss"] == measures[name]["copied_loss"], name
    assert measures["trace"]["factor"] > 3


def test_readings(run: tuple[dict[str, Any], str, Path], study: ModuleType) -> None:
    """The traces of the first net and its copy, from the Jacobian of each example: both are of whom they say."""
    nets, predict = importlib.import_module("study_nets"), run[0]["measures"]["trace"]
    first, settings = run[0]["nets"][0][0], run[0]["settings"]
    training, test = nets.split(settings["images"])
    net = nets.train(nets.Setting(**first["setting"]), first["seed"], training, test, 0.02, 1000)
    copied = nets.rescaled(net.model, settings["most"], net.seed)
    for model, readings in ((net.model, predict["original"]), (copied, predict["copied"])):
        expected = trace(model, training[0].double())
        assert readings[0][0]["value"] == pytest.approx(expected, rel=PARAMETERS * EPS)
    c = (copied[0].bias / net.model[0].bias).detach()
    assert float(c.max()) <= 10 * (1 + EPS) and float(c.min()) >= 0.1 * (1 - EPS)


def trace(model: nn.Sequential, x: Tensor) -> float:
    """Of the Gauss-Newton matrix: mean over the examples of sum_k p_k |J_k|² - |sum_k p_k J_k|²."""
    names = dict(model.named_parameters())
    values = {name: p.detach() for name, p in names.items()}
    jacobians = torch.func.vmap(
        torch.func.jacrev(lambda v, one: torch.func.functional_call(model, v, (one,))), (None, 0)
    )(values, x)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    p = model(x).detach().softmax(dim=1)
    mean = torch.einsum("nk,nkp->np", p, J)
    return float(((p * J.square().sum(dim=2)).sum(dim=1) - mean.square().sum(dim=1)).mean())


def test_tau_is_that_of_scipy(study: ModuleType) -> None:
    """With ties, for whole repeats and for resamples, whose settings are there several times or not at all."""
    ranking = importlib.import_module("study_ranking")
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 24)).round(1), generator.normal(size=(2, 24)).round(1)
    found = ranking.rank(x, y, 10)
    assert found.tau == pytest.approx(
        np.mean([stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)])
    )
    counts = generator.multinomial(24, np.full(24, 1 / 24), size=20)
    taus = ranking._taus(ranking._signs(x), ranking._signs(y), counts.astype(float))
    for tau, count in zip(taus, counts, strict=True):
        there = np.repeat(np.arange(24), count)
        each = [stats.kendalltau(a[there], b[there]).statistic for a, b in zip(x, y, strict=True)]
        assert tau == pytest.approx(np.mean(each))


def test_interval_is_that_of_the_bootstrap(study: ModuleType) -> None:
    """Of scipy's resamples, other ones, the shares below the ends are 2.5 % and 97.5 % up to the noise of both."""
    ranking = importlib.import_module("study_ranking")
    generator = np.random.default_rng(1)
    x = generator.normal(size=24)
    y = x + generator.normal(size=24)
    resamples = 2000
    found = ranking.rank(x[None], y[None], resamples)
    theirs = stats.bootstrap(
        (x, y),
        lambda a, b: stats.kendalltau(a, b).statistic,
        n_resamples=resamples,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(2),
    ).bootstrap_distribution
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        noise = 4 * math.sqrt(2 * share * (1 - share) / resamples)
        assert (theirs < end).mean() - noise <= share <= (theirs <= end).mean() + noise


def test_chance_is_that_of_all_orders(study: ModuleType) -> None:
    """Without ties: of the n! orders of n settings, how many have how many inversions is a product of polynomials."""
    ranking = importlib.import_module("study_ranking")
    n, resamples = 9, 4000
    inversions = np.ones(1)
    for k in range(2, n + 1):
        inversions = np.convolve(inversions, np.ones(k) / k)
    taus = abs(1 - 2 * np.arange(len(inversions)) / (n * (n - 1) / 2))
    generator = np.random.default_rng(3)
    found = ranking.rank(generator.normal(size=(1, n)), generator.normal(size=(1, n)), resamples)
    noise = 4 * math.sqrt(0.05 * 0.95 / resamples)
    above = inversions[taus > found.chance + 1e-9].sum()
    reached = inversions[taus >= found.chance - 1e-9].sum()
    assert above - noise <= 0.05 <= reached + noise
    assert reached < 0.1
