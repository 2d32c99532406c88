"""The exceptions and the one warning class of flatcore."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch


class FlatcoreWarning(UserWarning):
    """Said once where a result is not converged, not exact, or was got in a slower way than asked for."""


def warn(message: str) -> None:
    """A FlatcoreWarning at the line outside of this package that led here, whatever lies between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FlatcoreWarning, stacklevel=level)  # noqa: TID251


def first_line(error: BaseException) -> str:
    """What an exception says first; torch goes on with stacks and advice."""
    return (str(error).strip() or "no message").splitlines()[0]


@contextlib.contextmanager
def told_as(exception: Callable[[str], Exception]) -> Iterator[None]:
    """What torch refuses, as exception(first line of what it says); that memory is out stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise exception(first_line(error)) from error


class CaptureError(Exception):
    """A model and its loss have no program of the vocabulary.

    `op` is the operation at fault ("" if none is), `path` the module it stands in ("" if unknown), `reason`
    one clause.
    """

    def __init__(self, reason: str, *, op: str = "", path: str = "") -> None:
        self.op, self.path, self.reason = op, path, reason
        where = f" in module '{path}'" if path else ""
        module = f"module '{path}'" if path else "the model"
        super().__init__(
            f"cannot capture {op}{where}: {reason}" if op else f"cannot capture {module}: {reason}"
        )


class NotTwiceDifferentiableError(CaptureError):
    """An operation that torch autograd cannot differentiate twice either."""


class NoRowsError(ValueError):
    """A Gauss-Newton matrix is not known by rows of the model's outputs; the message says why."""


class NotSeparable(Exception):
    """The loss is not seen to be a sum over examples. The message says which op mixes them."""
