"""Curvature followed during training: each look at the model starts where the last one ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flatcore import track_views
from flatcore.data import preserved_random_state
from flatcore.eigsh import eigsh
from flatcore.environment import modules_in
from flatcore.errors import CaptureError, warn
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.catalogue import by_name
from flatcore.measures.edge_of_stability import stability_limit
from flatcore.objective import Objective
from flatcore.operators import Hessian
from flatcore.report.document import dumps
from flatcore.results import Eigenpairs
from flatcore.trace import trace as trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["Tracker", "track"]

Columns = dict[str, float]


def track(
    objective: Objective | tuple[Any, ...],
    *,
    every: int = 1,
    eigenvalues: int = 1,
    trace: bool = True,
    optimizer: torch.optim.Optimizer | float | None = None,
    measures: Any = (),
    tol: float = 1e-3,
    rtol: float = 0.05,
    seed: int = 0,
) -> Tracker:
    """Follows the curvature of a model in training: ``t = track(...)``, then ``t.step(step)`` in the loop.

    Args:
        objective: an Objective on a fixed batch, or (model, loss, data). Measured in eval mode; for an Objective with
            allow_train_mode in the modes the model has now.
        every: `step` measures where the step is a multiple of this.
        eigenvalues: how many of the largest, 0 for none; each search starts from the vectors of the last one.
        trace: whether to estimate the trace, to rtol.
        optimizer: SGD, Adam or AdamW, or a step size: its stability threshold, 2 / lr for plain SGD, and "edge", the
            largest eigenvalue over it (`flatcore.measures.edge_of_stability`; Adam's is a search of its own).
        measures: names of `flatcore.measures`, functions of the objective that give a number or a Measure, or a mapping
            from name to such a function.
        tol: of the eigenvalues. rtol: of the trace. seed: of all random probes.

    A step leaves parameters, gradients, modes and random generators as they are. What goes wrong in the first
    measurement is raised; later, when training may have diverged, it is nan, with the reason in "status" and in a
    FlatcoreWarning. Cost: some 10 products for the eigenvalue after the first step, and the trace's. Memory: the
    eigenvectors. Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    if isinstance(objective, tuple):
        if len(objective) != 3 or not isinstance(objective[0], torch.nn.Module):
            raise TypeError("objective: expected an Objective or (model, loss, data), got another tuple")
        with modules_in(objective[0], {}):
            objective = Objective(*objective)
    elif not isinstance(objective, Objective):
        raise TypeError(
            f"objective: expected a flatcore.Objective or (model, loss, data), got {type(objective).__name__}"
        )
    return Tracker(
        objective,
        check_count("every", every, 1),
        check_count("eigenvalues", eigenvalues, 0),
        bool(trace),
        optimizer,
        by_name(measures, check_seed(seed)),
        check_positive("tol", tol, 1e-3),
        check_positive("rtol", rtol, 0.05),
        check_seed(seed),
    )


class Tracker:
    """What `track` gives. ``history``: one dict for each measurement, its numbers in the order of the table."""

    def __init__(
        self,
        objective: Objective,
        every: int,
        eigenvalues: int,
        trace: bool,
        optimizer: torch.optim.Optimizer | float | None,
        measures: Mapping[str, Callable[[Objective], Any]],
        tol: float,
        rtol: float,
        seed: int,
    ) -> None:
        if eigenvalues >= objective.layout.size:
            raise ValueError(
                f"eigenvalues: expected fewer than the {objective.layout.size} parameters, got {eigenvalues}"
            )
        if optimizer is not None and not eigenvalues:
            raise ValueError("eigenvalues: expected at least 1 for an optimizer's threshold, got 0")
        self.objective, self.history = objective, list[dict[str, Any]]()
        self._every, self._tol, self._rtol, self._seed = every, tol, rtol, seed
        self._modes = {m: m.training for m in objective.model.modules()} if objective.allow_train_mode else {}
        self._hessian = Hessian(objective)
        self._found: dict[str, Eigenpairs] = {}
        self._calls = self._products = 0
        self._optimizer: torch.optim.Optimizer | float | None = None
        self._parts: dict[str, tuple[tuple[str, ...], Callable[[], Columns]]] = {
            "loss": (("loss",), lambda: {"loss": objective.loss()})
        }
        if eigenvalues:
            names = ("lambda_max", *(f"lambda_{i}" for i in range(2, eigenvalues + 1)))
            self._parts["eigenvalues"] = (
                (names[0], "lambda_max_error", *names[1:]),
                partial(self._top, names),
            )
        if trace:
            self._parts["trace"] = (("trace", "trace_error"), self._trace)
        if optimizer is not None:
            self.follow(optimizer)
        for name, function in measures.items():
            taken = {n for names, _ in self._parts.values() for n in names}
            if name in (*taken, *self._parts, "step", "products", "seconds", "status"):
                raise ValueError(f"measures: {name} is a column already; give it another name")
            self._parts[name] = ((name, f"{name}_error"), partial(self._measure, name, function))

    def follow(self, optimizer: torch.optim.Optimizer | float) -> None:
        """Compares the largest eigenvalue with this optimizer's stability threshold from now on."""
        try:
            if not _stands_still(optimizer):
                stability_limit(self.objective, optimizer)
        except (TypeError, ValueError) as error:
            if "take a step first" not in str(error):  # Adam's state comes with its first step
                raise type(error)(str(error).replace("lr:", "optimizer:", 1)) from None
        self._optimizer = optimizer
        self._parts["edge"] = (("edge", "threshold"), self._edge)

    def step(self, step: int | None = None) -> dict[str, Any] | None:
        """Measures if this step's number, by default the number of calls before, is a multiple of ``every``."""
        number = self._calls if step is None else check_count("step", step, 0)
        self._calls += 1
        return self.measure(number) if number % self._every == 0 else None

    def measure(self, step: int) -> dict[str, Any]:
        """Measures now, whatever ``every`` is."""
        began, self._products = time.perf_counter(), 0
        row: dict[str, Any] = {"step": step}
        self._told: list[str] = []
        with modules_in(self.objective.model, self._modes):
            for what, (names, function) in self._parts.items():
                try:
                    row |= function()
                except (ValueError, TypeError, RuntimeError, CaptureError) as error:  # noqa: PERF203
                    waits = what == "edge" and "take a step first" in str(error)
                    if not (self.history or waits):
                        raise
                    row |= dict.fromkeys(names, math.nan)
                    self._told.append(f"{what}: {error}")
                    if not waits:
                        warn(f"track: step {step}, {self._told[-1]}")
        row["products"], row["seconds"] = self._products, time.perf_counter() - began
        row["status"] = "; ".join(self._told) or "converged"
        self.history.append(row)
        return row

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The history by column; nan where a measurement lacks one."""
        names = dict.fromkeys(name for row in self.history for name in row)
        return {name: [row.get(name, math.nan) for row in self.history] for name in names}

    def table(self) -> Table:
        """For a rich console: `rich.print(t.table())`."""
        return track_views.table(self.columns)

    def plot(self) -> Figure:
        """A new figure with a panel for each number that is followed."""
        return track_views.plot(self.columns)

    def to_json(self, path: str | Path) -> None:
        """{"schema", "seed", "history"}; a number that is not finite becomes null."""
        document = {"schema": "flatcore-track/1", "seed": self._seed, "history": self.history}
        Path(path).write_text(dumps(document), encoding="utf-8")

    def trainer_callback(self, trainer: Any = None, *, edge_of_stability: bool = False) -> Any:
        """A `flatcore.TrackCallback` for the Trainer of transformers, which is imported here."""
        from flatcore.track_callback import TrackCallback

        return TrackCallback(self, trainer, edge_of_stability=edge_of_stability)

    def _search(self, what: str, operator: Any, k: int) -> Eigenpairs:
        found = eigsh(operator, k, which="LA", tol=self._tol, v0=self._found.get(what), seed=self._seed)
        self._found[what] = found
        self._note("eigenvalues", found)
        return found

    def _note(self, what: str, found: Any) -> None:
        self._products += getattr(found, "matvecs", 0)
        status = getattr(found, "status", "converged")
        if status != "converged":
            self._told.append(f"{what}: {status}")

    def _top(self, names: tuple[str, ...]) -> Columns:
        found = self._search("H", self._hessian, len(names))
        first, *others = zip(names, found.values.tolist(), strict=True)
        return dict([first, ("lambda_max_error", float(found.residuals[0])), *others])

    def _trace(self) -> Columns:
        found = trace_of(self._hessian, rtol=self._rtol, seed=self._seed)
        self._note("trace", found)
        return {"trace": found.value, "trace_error": found.stderr}

    def _edge(self) -> Columns:
        assert self._optimizer is not None
        if _stands_still(self._optimizer):
            return {"edge": 0.0, "threshold": math.inf}
        limit = stability_limit(self.objective, self._optimizer)
        pairs = self._search("scaled", limit.operator, 1) if limit.matrix != "H" else self._found["H"]
        top = float(pairs.values[0]) + limit.decay
        return {"edge": top / limit.threshold, "threshold": limit.threshold}

    def _measure(self, name: str, function: Callable[[Objective], Any]) -> Columns:
        with preserved_random_state():
            found = function(self.objective)
        self._note(name, found)
        try:
            return {name: float(found), f"{name}_error": float(getattr(found, "stderr", math.nan))}
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"measures: expected {name} to give a number or a Measure of one, got {type(found).__name__}"
            ) from None


def _stands_still(optimizer: torch.optim.Optimizer | float) -> bool:
    """Where a schedule begins or ends at a step size of 0: every curvature is stable."""
    return isinstance(optimizer, torch.optim.Optimizer) and all(g["lr"] == 0 for g in optimizer.param_groups)
