"""The device that the tests of the GPU run on, and what stands on it.

FLATCORE_TEST_GPU=cpu runs those that need nothing of CUDA on the CPU, which tests the tests.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from tests.cases import Case

DEVICE = torch.device(os.environ.get("FLATCORE_TEST_GPU", "cuda"))
# A product asked for again must give the same bits; unless told so, cuDNN may add up in another order every time.
torch.backends.cudnn.deterministic = True

NONE = "torch finds no CUDA device"
on_gpu = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason=NONE)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NONE)


def moved(thing: Any) -> Any:
    """A batch, a module or a loss on the device."""
    if isinstance(thing, (tuple, list)):
        return type(thing)(moved(part) for part in thing)
    if isinstance(thing, dict):
        return {key: moved(part) for key, part in thing.items()}
    return thing.to(DEVICE) if isinstance(thing, (nn.Module, Tensor)) else thing


def objective_there(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> fc.Objective:
    model, loss, batch = map(moved, case.build(0, dtype))
    return fc.Objective(
        model, fc.ModelLoss(loss) if case.loss_kind == "model_batch" else loss, batch, **options
    )


def net(*widths: int, examples: int, dtype: torch.dtype = torch.float32, **options: Any) -> fc.Objective:
    """A tanh net with cross-entropy on random data, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        for p in layer.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / inputs**0.5)
        layers += [layer, nn.Tanh()]
    x = torch.randn(examples, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(widths[-1], (examples,), generator=generator)
    device = options.pop("device", DEVICE)
    model = nn.Sequential(*layers[:-1]).to(device, dtype)
    return fc.Objective(model, nn.CrossEntropyLoss(), (x.to(device), y.to(device)), **options)
