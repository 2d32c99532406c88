"""Everything flatcore says about one minimum, measured once and kept with how it was got."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatcore.density import Density, spectral_density
from flatcore.eigsh import eigsh
from flatcore.linear import check_count
from flatcore.machine import Machine, describe
from flatcore.measures.catalogue import chosen
from flatcore.objective import Objective
from flatcore.operators import Hessian
from flatcore.progress import progress_bar
from flatcore.report.autograd_loop import AutogradLoop
from flatcore.report.fit import Fit, fit
from flatcore.report.interrupts import interrupts_end_it, silent_but_for_interrupts
from flatcore.report.measures import Measured, measured
from flatcore.results import Eigenpairs, Estimate
from flatcore.trace import trace

if TYPE_CHECKING:
    from rich.console import Group

DENSITY_PROBES = 8
DENSITY_STEPS = 64
_STAGES = ("set-up", "trace", "largest eigenvalues", "smallest eigenvalue", "spectral density")


@dataclass(frozen=True)
class Curvature:
    """The Hessian's numbers and their cost. `top` and `bottom` carry no eigenvectors."""

    setup_seconds: float
    trace: Estimate
    top: Eigenpairs
    bottom: Eigenpairs
    density: Density

    @property
    def stages(self) -> tuple[tuple[str, int, float], ...]:
        """(what, products with one vector, seconds) in the order of work."""
        parts: tuple[Estimate | Eigenpairs | Density, ...] = (self.trace, self.top, self.bottom, self.density)
        return (
            (_STAGES[0], 0, self.setup_seconds),
            *((name, part.matvecs, part.seconds) for name, part in zip(_STAGES[1:], parts, strict=True)),
        )

    @property
    def products(self) -> int:
        return sum(products for _, products, _ in self.stages)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.stages)


@dataclass(frozen=True)
class Report:
    """The curvature of one objective's loss at its present parameters.

    `training` and `test`: loss and accuracy. `curvature`: the numbers, from flatcore; `autograd`: the same numbers and
    seed over an autograd loop, where asked for, without the trace's sweeps over examples, which a loop has not.
    `native_fraction`: share of the second-order floating point operations that run in flatcore's engine. `peak_bytes`:
    planned memory of the widest product made. `measures`: the published ones; `products` and `seconds` are those of
    `curvature` alone.
    """

    name: str
    parameters: int
    examples: int
    dtype: str
    device: str
    training: Fit
    test: Fit | None
    curvature: Curvature
    autograd: Curvature | None
    native_fraction: float
    peak_bytes: int
    seed: int
    rtol: float
    created: str
    machine: Machine
    measures: tuple[Measured, ...] = ()

    @property
    def loss(self) -> float:
        return self.training.loss

    @property
    def trace(self) -> Estimate:
        return self.curvature.trace

    @property
    def top(self) -> Eigenpairs:
        return self.curvature.top

    @property
    def bottom(self) -> Eigenpairs:
        return self.curvature.bottom

    @property
    def density(self) -> Density:
        return self.curvature.density

    @property
    def products(self) -> int:
        return self.curvature.products

    @property
    def seconds(self) -> float:
        return self.curvature.seconds

    def table(self) -> Group:
        """For a rich console: `rich.print(report.table())`."""
        return compare([self]).table()

    def to_json(self) -> str:
        return compare([self]).to_json()

    def save_html(self, path: str | Path) -> None:
        """One file that needs nothing else: no script, no font, no picture from elsewhere. Makes missing folders."""
        compare([self]).save_html(path)


@dataclass(frozen=True)
class Comparison:
    """Reports side by side."""

    reports: tuple[Report, ...]

    def table(self) -> Group:
        from flatcore.report.table import tables

        return tables(self.reports)

    def to_json(self) -> str:
        from flatcore.report.document import to_json

        return to_json(self.reports)

    def save_html(self, path: str | Path) -> None:
        """One file that needs nothing else: no script, no font, no picture from elsewhere. Makes missing folders."""
        from flatcore.report.html import page

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page(self.reports), encoding="utf-8")


def compare(reports: list[Report] | tuple[Report, ...]) -> Comparison:
    """Reports side by side, as a table, a page or JSON. Raises ValueError for none, or for two of one name."""
    names = [report.name for report in reports]
    if not names:
        raise ValueError("reports: expected at least one report, got none")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"reports: expected different names, got {twice[0]!r} twice; give each report(..., name=...)"
        )
    return Comparison(tuple(reports))


def report(
    obj: Objective,
    *,
    name: str | None = None,
    k: int = 5,
    rtol: float = 0.01,
    seed: int = 0,
    test: Any = None,
    measures: Any = "cheap",
    compare_autograd: bool = False,
    progress: bool = False,
) -> Report:
    """Trace, largest and smallest eigenvalues and spectral density of the Hessian of `obj`, and measures of flatness.

    Args:
        name: what to call it on the page; default: the model's class.
        k: how many of the largest eigenvalues, fewer than the parameters.
        rtol: relative standard error of the trace.
        test: held-out data in any form an Objective takes, for a loss and an accuracy beside the training ones.
        measures: "cheap", "all", "none", or names of `flatcore.measures`. What does not apply to the model is listed
            with the reason.
        compare_autograd: compute it all a second time through a loop of double backward passes, for the time it takes.
        progress: a bar on a terminal.

    Costs: the trace's products (their number follows from rtol), some tens for the eigenvalues, and
    DENSITY_PROBES * DENSITY_STEPS for the density; with compare_autograd as many again.
    Raises ValueError or TypeError for bad arguments, and KeyboardInterrupt on Ctrl-C, whichever part it meets.
    """
    if not isinstance(obj, Objective):
        raise TypeError(f"obj: expected a flatcore.Objective, got {type(obj).__name__}; make one first")
    k = check_count("k", k, 1)
    if k >= obj.layout.size:
        raise ValueError(f"k: expected fewer than the {obj.layout.size} parameters, got {k}")
    title = type(obj.model).__name__ if name is None else name
    names = chosen("measures", measures)
    total = len(_STAGES) * (2 if compare_autograd else 1) + len(names)
    with interrupts_end_it(), progress_bar(title, total=total, enabled=progress) as bar:
        done = 0

        def say(stage: str) -> None:
            nonlocal done
            bar.update(done, stage)
            done += 1

        training = fit(obj)
        held_out = None if test is None else fit(obj, test)
        operator, curvature = _measure(lambda: _ready(obj), k, rtol, seed, say)
        autograd = None
        if compare_autograd:
            with silent_but_for_interrupts():  # what there is to say was said of the same numbers
                _, autograd = _measure(
                    lambda: AutogradLoop(obj), k, rtol, seed, lambda s: say(f"autograd: {s}")
                )
        published = measured(obj, names, seed, say)
    plan = operator.plan()
    widest = min(plan.directions, max(DENSITY_PROBES, curvature.top.block_size))
    return Report(
        name=title,
        parameters=obj.layout.size,
        examples=obj.examples,
        dtype=str(obj.layout.dtype).removeprefix("torch."),
        device=str(obj.layout.device),
        training=training,
        test=held_out,
        curvature=curvature,
        autograd=autograd,
        native_fraction=float(plan.native_fraction),
        peak_bytes=int(plan.peak_bytes(widest)),
        seed=seed,
        rtol=rtol,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=describe(),
        measures=published,
    )


def _ready(obj: Objective) -> Hessian:
    """The operator with its program captured, so that the time this takes is counted once and by itself."""
    hessian = Hessian(obj)
    hessian.plan()
    return hessian


def _measure(
    make: Callable[[], Any], k: int, rtol: float, seed: int, say: Callable[[str], None]
) -> tuple[Any, Curvature]:
    """The operator that `make` gives, and its numbers."""
    began = time.perf_counter()
    say(_STAGES[0])
    operator = make()
    setup_seconds = time.perf_counter() - began
    say(_STAGES[1])
    total = trace(operator, rtol=rtol, seed=seed)
    say(_STAGES[2])
    top = eigsh(operator, k, which="LA", seed=seed, return_eigenvectors=False)
    say(_STAGES[3])
    bottom = eigsh(operator, 1, which="SA", seed=seed, return_eigenvectors=False)
    say(_STAGES[4])
    density = spectral_density(operator, probes=DENSITY_PROBES, steps=DENSITY_STEPS, seed=seed)
    return operator, Curvature(
        setup_seconds, total, replace(top, vectors=None), replace(bottom, vectors=None), density
    )
