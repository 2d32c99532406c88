"""What surrounds a computation: one thread at a time where a model is evaluated, modes, and full precision."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import ParamSpec, TypeVar

import torch

from flatcore._C import engine

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# An evaluation puts other tensors into the user's modules, sets the random generators of the process and may
# trace the model, which replaces functions of torch for the time. Products of the engine run without it.
ONE_AT_A_TIME = threading.RLock()
# A forked child has no other thread that would let the lock go.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=ONE_AT_A_TIME.acquire,
        after_in_parent=ONE_AT_A_TIME.release,
        after_in_child=ONE_AT_A_TIME.release,
    )


def exclusive(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, run by one thread at a time."""

    @functools.wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return locked


_NOTHING = contextlib.nullcontext()


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Autocast off: products in half precision are neither symmetric nor what was asked for."""
    on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return _without_autocast() if on else _NOTHING


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else _NOTHING,
    ):
        yield


def full_float32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Float32 multiplied on a GPU without rounding to TF32, whatever torch is set to; on the CPU nothing is entered.

    The settings are the process' own, so other threads that change them wait. Who takes ONE_AT_A_TIME as well takes it
    before.
    """
    return engine.Float32Products(str(device)) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def modules_in(model: torch.nn.Module, wanted: Mapping[torch.nn.Module, bool]) -> Iterator[None]:
    """All modules in eval mode, or as wanted; set without calling train(), which models may redefine."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = wanted.get(module, False)
        yield
    finally:
        for module, training in before.items():
            module.training = training
