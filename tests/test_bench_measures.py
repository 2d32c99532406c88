"""The benchmark of measures compares like with like: the published ways give flatcore's numbers, to what they reach."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from untouched import one_thread  # noqa: F401

import flatcore as fc
from benchmarks import measures
from flatcore.measures.scales import least_over_scales

pytestmark = pytest.mark.usefixtures("one_thread")


def test_relative_flatness_entry_by_entry():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 4)),
    ).double()
    x, y = torch.randn(30, 1, 8, 8).double(), torch.randint(4, (30,))
    published = measures.published_flatness(net, x, y)
    for batches in ((x, y), [(x[:11], y[:11]), (x[11:], y[11:])]):
        # A few thousand sums and products of float64 numbers.
        assert measures.our_flatness(fc.Objective(net, nn.CrossEntropyLoss(), batches)) == pytest.approx(
            published, rel=1e-12
        )


def test_features_given_is_the_same_problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 6).double(), torch.randint(3, (20,))
    alone = measures.published_flatness(nn.Sequential(net[-1]), net[:-1](x).detach(), y)
    assert alone == pytest.approx(measures.published_flatness(net, x, y), rel=1e-12)


def test_scales_by_descent_end_at_the_minimum():
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.rand(5, 7, generator=generator).double() + 0.1 for _ in range(2))
    least = least_over_scales(h, w)
    values = measures.descended_scales(h, w, lr=1.0, steps=500)
    # The curvatures of the divided sum are 0.4 to 1.4, the steps add up to 405: exp(-160) is left of the start.
    assert values[-1] == pytest.approx(least.value, rel=1e-12)
    assert min(values) >= least.value * (1 - 1e-12)
    assert values[0] == pytest.approx(float((h + w).sum()))
    assert values[0] > 1.001 * least.value


@pytest.mark.parametrize("command", ["flatness", "scales"])
def test_commands(command, monkeypatch):
    monkeypatch.setattr(measures, "STEPS", 20)
    options = ["--images", "40", "--rounds", "1", "--threads", "1", "--processor-time"]
    done = CliRunner().invoke(measures.main, [command, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert ("whole call: published / flatcore" if command == "flatness" else "all layers") in done.output
