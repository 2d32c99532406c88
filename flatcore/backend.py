"""Who computes the products of an objective: the engine where the model has a program, torch autograd "
"elsewhere."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from flatcore.autograd import AutogradBackend, Mode
from flatcore.objective import Objective
from flatcore.plan import Plan


class Backend(Protocol):
    def product(self, mode: Mode, V: Tensor, Y: Tensor) -> None:
        """Y = A V for the rows of V and Y, both (K, P) with unit stride along P; Y is overwritten."""

    def gradient(self) -> Tensor:
        """Gradient of the objective, (P,)."""

    def plan(self, mode: Mode) -> Plan:
        """How products are computed."""


def backend_for(objective: Objective, mode: Mode) -> Backend:
    """The one backend of an objective, made at first use and shared by all its operators."""
    if objective._backend is None:
        objective._backend = AutogradBackend(objective, "not captured")
    return objective._backend
