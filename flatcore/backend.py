"""Who computes the products of an objective: the engine where there is a program, torch autograd
elsewhere."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from flatcore.autograd import AutogradBackend, Mode
from flatcore.capture import NO_VALUE, NOT_DERIVATIVE
from flatcore.cut_rows import ROWS_MIX
from flatcore.errors import CaptureError, NotTwiceDifferentiableError, warn
from flatcore.kept_maps import KeptMaps
from flatcore.native import NativeBackend
from flatcore.objective import Objective, Snapshot
from flatcore.plan import Plan
from flatcore.precision import Precision


class Backend(Protocol):
    def product(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, precision: Precision = "full") -> None:
        """Y = A V for the rows of V and Y, both (K, P) with unit stride along P; Y is overwritten."""

    def quadratic_form(self, mode: Mode, V: Tensor, at: Snapshot, precision: Precision = "full") -> Tensor:
        """<v, A v> for the rows of V (K, P): (K,) float64 on the CPU."""

    def gradient(self, at: Snapshot) -> Tensor:
        """Gradient of the objective, (P,)."""

    def plan(self, mode: Mode, precision: Precision = "full") -> Plan:
        """How products are computed."""


class Backends:
    """What computes the products of one objective, made at first use and shared by all its operators."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._others: dict[tuple[str, bool], AutogradBackend] = {}
        self._kept = KeptMaps(objective.budget.states)
        self._native: NativeBackend | None = None
        self._told = self._once = False
        try:
            self._native = NativeBackend(objective)
        except CaptureError as error:
            self._reason = str(error)
            self._once = isinstance(error, NotTwiceDifferentiableError)

    def native(self) -> NativeBackend | str:
        return self._native or self._reason

    def choose(self, mode: Mode) -> Backend:
        reason = self._native.refusal(mode) if self._native else self._reason
        if self._native and not reason:
            if self._native.external and not self._told:
                self._told = True
                warn(_said_of(self._native.external))
            return self._native
        if self._native and mode == "ggn" and reason != NO_VALUE:
            raise ValueError(
                f"loss: the Gauss-Newton matrix needs a cut between model and loss, got none: {reason}"
            )
        by_example = reason == ROWS_MIX or (self._once and mode == "covariance")
        if (reason, by_example) not in self._others:
            backend = AutogradBackend(self._objective, reason, self._kept, by_example)
            if self._once and not by_example:
                _try(backend, mode, reason)
            self._others[reason, by_example] = backend
            how = "example by example" if by_example else "one direction at a time"
            warn(
                f"{reason}; so products of the whole model run through torch autograd, {how}, which is slower"
            )
        return self._others[reason, by_example]


def _try(backend: AutogradBackend, mode: Mode, reason: str) -> None:
    """What cannot be differentiated twice alone may be computed in another way inside the model."""
    try:
        backend.plan(mode)
    except ValueError as error:
        raise ValueError(
            f"model: {reason}, so the loss has no products with second derivatives; replace the operation, leave the "
            "parameters in front of it out with params=, or ask for the gradient covariance"
        ) from error


def _said_of(operations: list[str]) -> str:
    count = len(operations)
    shown = ", ".join(operations[:4]) + (f" and {count - 4} more" if count > 4 else "")
    right = "no better than these derivatives" if any(NOT_DERIVATIVE in o for o in operations) else "right"
    return (
        f"{count} {'operation runs' if count == 1 else 'operations run'} through torch autograd inside the native "
        f"program: {shown}; the results are {right}, and products slower than without"
    )


def backend_for(objective: Objective, mode: Mode) -> Backend:
    """The backend for this kind of product; warns once where it is not the engine.

    Take the snapshot that the product is to be at first: it forgets a backend whose modules were replaced.
    """
    if not isinstance(objective.backends, Backends):
        objective.backends = Backends(objective)
    return objective.backends.choose(mode)


def native_backend(objective: Objective) -> NativeBackend | str:
    """The engine's backend of an objective, or why there is none."""
    if not isinstance(objective.backends, Backends):
        objective.backends = Backends(objective)
    return objective.backends.native()
