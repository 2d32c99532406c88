"""Everything of the user's that no call may change, taken down and compared; and a fixture for small problems."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Operations of a few dozen numbers take longer to share among threads than to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def state_of(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, object]:
    state: dict[str, object] = {}
    named = [
        *model.named_parameters(),
        *model.named_buffers(),
        *((f"data {i}", t) for i, t in enumerate(tensors)),
    ]
    for name, tensor in named:
        state[f"value of {name}"] = tensor.detach().clone()
        state[f"version of {name}"] = tensor._version
        state[f"identity of {name}"] = id(tensor)
        state[f"grad of {name}"] = None if tensor.grad is None else tensor.grad.clone()
        state[f"requires_grad of {name}"] = tensor.requires_grad
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = [list(getattr(module, kind).values()) for kind in HOOKS]
        state[f"attributes of {name}"] = sorted(vars(module))
    state["torch random state"] = torch.get_rng_state()
    state["numpy random state"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    state["python random state"] = random.getstate()
    state["grad enabled"] = torch.is_grad_enabled()
    state["threads"] = torch.get_num_threads()
    return state


@contextlib.contextmanager
def untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Fails where the block changed the model, the tensors or a random generator."""
    before = state_of(model, tensors)
    yield
    after = state_of(model, tensors)
    assert before.keys() == after.keys()
    for name, value in before.items():
        now = after[name]
        if isinstance(value, Tensor) and isinstance(now, Tensor):
            assert value.device == now.device, name
            same = value.is_meta or torch.allclose(value, now, rtol=0, atol=0, equal_nan=True)
        else:
            same = value == now
        assert same, f"{name} changed"
