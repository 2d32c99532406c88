"""Measures inside torch.inference_mode: the same numbers, and nothing of theirs is a tensor of that mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measured import batch, cross_entropy, mlp
from untouched import one_thread  # noqa: F401

import flatcore as fc
from flatcore import measures
from flatcore.measures import Measure

pytestmark = pytest.mark.usefixtures("one_thread")

# Wide enough for estimates where exact ways are for few parameters.
MEASURES: dict[str, Callable[[fc.Objective], Measure]] = {
    "relative_flatness": lambda o: measures.relative_flatness(o, rtol=0.5),
    "relative_flatness, exact": lambda o: measures.relative_flatness(o, "2", method="exact"),
    "lpf": lambda o: measures.lpf(o, draws=4),
    "local_energy": lambda o: measures.local_energy(o, 0.1, draws=3),
    "adaptive_sharpness_average": lambda o: measures.adaptive_sharpness_average(o, 0.1, draws=3),
    "adaptive_sharpness_worst": lambda o: measures.adaptive_sharpness_worst(o, 0.1, steps=3),
    "local_entropy": lambda o: measures.local_entropy(o, gamma=10.0, beta=1.0, steps=40),
    "gap": lambda o: measures.generalization_gap(o, 0.1, rtol=0.5),
    "gap, exact": lambda o: measures.generalization_gap(o, 0.1, method="exact"),
    "gap, probes": lambda o: measures.generalization_gap(o, 0.1, method="probes", rtol=0.5),
    "gap, sampled": lambda o: measures.generalization_gap(
        o, 0.1, gradients="sampled", method="probes", rtol=0.5
    ),
    "gap, calibrated": lambda o: measures.generalization_gap(o, 0.1, calibrated=True, rtol=0.5),
    "soft_rank": lambda o: measures.soft_rank(o, 0.1, rtol=0.5),
    "soft_rank, kfac": lambda o: measures.soft_rank(o, 0.1, method="kfac"),
    "normalized_sharpness": lambda o: measures.normalized_sharpness(o, curvature="ggn", rtol=0.5),
    "pac_bayes_sigma": lambda o: measures.pac_bayes_sigma(o, draws=3),
    "fisher_rao": measures.fisher_rao,
    "sam_sharpness": measures.sam_sharpness,
    "asam_sharpness": measures.asam_sharpness,
    "path_norm": measures.path_norm,
    "quotient_sharpness": measures.quotient_sharpness,
    "lambda_max": measures.lambda_max,
    "participation_ratio": lambda o: measures.participation_ratio(o, rtol=0.5),
    "edge_of_stability": lambda o: measures.edge_of_stability(o, 0.1),
    "width": measures.width,
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_same_in_inference_mode(name: str) -> None:
    measure = MEASURES[name]
    plain = measure(cross_entropy(mlp(6, 30, 4), batch(40, 6, 4)))
    objective = cross_entropy(mlp(6, 30, 4), batch(40, 6, 4))
    with torch.inference_mode():
        inside = measure(objective)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(inside.value, plain.value, rtol=0, atol=0, equal_nan=True)
    assert inside.status == plain.status
