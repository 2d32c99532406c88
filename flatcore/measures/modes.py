"""What a measure runs in, whatever its caller runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["outside_inference_mode"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def outside_inference_mode(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, run outside of torch.inference_mode: tensors made there cannot be written to anywhere else."""

    @functools.wraps(function)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return outside
