"""The check on a GPU, as far as it goes without one: what it says, and how figures become goals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_goals import goals, lines

ROOT = Path(__file__).parents[1]


def product(ours: float, error: float, **ways: float) -> dict:
    timings = {"flatcore": {"seconds": ours, "error": error}}
    timings |= {name: {"seconds": s, "error": 0.0} for name, s in ways.items()}
    return {"ways": timings}


STEPS = {
    "ceilings": {"fp32": {"gemm": 5e13, "bandwidth": 4e12}},
    "products": {
        "mlp-tiny K=1 full": product(1e-3, 1e-7, **{"compiled a": 2e-3, "eager": 1.5e-3}),
        "mlp-tiny K=1 tf32": product(5e-4, 1e-4, eager=1e-9),
        "resnet K=8 full": product(1e-3, 2e-7, **{"compiled a": 8e-3, "compiled b": 9e-3}),
    },
    "gpt2": {
        f"flatcore {p} K=8": {"seconds": 0.1, "gemm_share": share, "peak_bytes": 1e10}
        for p, share in (("full", 0.7), ("tf32", 0.65), ("bf16", 0.5))
    },
    "attention": {"4096 tokens": {"peak_bytes": 1e9}, "8192 tokens": {"peak_bytes": 2e9}},
    "eigenvalues": {"top 10": {"seconds": 30.0, "matvecs": 200, "status": "converged"}},
}


def test_goals():
    found = goals(STEPS)
    assert [goal.met for goal in found] == [True, False, None, False, False, True, True]
    # sqrt(2 x 8); the one workload with a figure in TF32: 2e-3 over 5e-4; the tiny net against the eager way.
    assert found[0].found == "4.0x over 2 (least 2.0x), error <= 2e-07"
    assert found[1].found == "4.0x over 1 (least 4.0x), error <= 1e-04"
    assert found[4].found.startswith("1.5x over 1")
    assert dict(lines(STEPS))["mlp-tiny K=1"] == "full 1, tf32 0.5 ms/vector; autograd 1.5"


def test_nothing_was_found():
    assert {goal.met for goal in goals({})} == {None} and list(lines({})) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_is_missing_is_said_in_one_sentence():
    ran = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check"], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("gpu_check: ") and ran.stderr.count("\n") == 1
