"""What flatcore is meant to reach on a GPU, beside what `benchmarks.gpu` found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]  # name -> figure of one step
FLATCORE = "flatcore"


@dataclass(frozen=True)
class Goal:
    """met: None where there is no figure."""

    name: str
    goal: str
    found: str
    met: bool | None


def goals(steps: dict[str, Figures]) -> list[Goal]:
    """Every goal, by the figures of the steps."""
    products, long = _by_workload(steps.get("products", {})), steps.get("gpt2", {})
    found = [_factor(products, p, least) for p, least in (("full", 3.0), ("tf32", 8.0), ("bf16", 8.0))]
    share = [
        long[f"flatcore {p} K=8"]["gemm_share"]
        for p in ("full", "tf32", "bf16")
        if f"flatcore {p} K=8" in long
    ]
    found.append(
        _goal(
            "GPT-2 small, K = 8, share of the GEMM rate (full, tf32, bf16)",
            ">= 60 %",
            ", ".join(f"{100 * s:.0f} %" for s in share),
            min(share) >= 0.6 if share else None,
        )
    )
    tiny = {name: figure for name, figure in products.items() if name.startswith("mlp-tiny ")}
    found.append(_factor(tiny, "full", 10.0, "tiny net, full, against the best autograd", compiled=False))
    top = steps.get("eigenvalues", {}).get("top 10")
    found.append(
        _goal(
            "top 10 of 124 million parameters",
            "< 60 s",
            f"{top['seconds']:.1f} s, {top['matvecs']} products, {top['status']}" if top else "",
            top["seconds"] < 60 and top["status"] == "converged" if top else None,
        )
    )
    found.append(_linear(steps.get("attention", {})))
    return found


def lines(steps: dict[str, Figures]) -> Iterator[tuple[str, str]]:
    """The figures without a goal, for a person."""
    for name, figure in steps.get("ceilings", {}).items():
        yield (
            f"{name} ceilings",
            f"{figure['gemm'] / 1e12:.0f} Tflop/s, copy {figure['bandwidth'] / 1e12:.2f} TB/s",
        )
    for name, figure in _by_workload(steps.get("products", {})).items():
        parts = [f"{p} {_ms(figure[p]['ways'][FLATCORE]['seconds'])}" for p in figure]
        best = _best(figure, compiled=False)
        yield name, ", ".join(parts) + (f" ms/vector; autograd {_ms(best)}" if best else " ms/vector")
    for name, figure in steps.get("gpt2", {}).items():
        if "seconds" in figure:
            share = f", {100 * figure['gemm_share']:.0f} % of GEMM" if "gemm_share" in figure else ""
            yield f"GPT-2 {name}", f"{_ms(figure['seconds'])} ms/vector, {_gb(figure)} GB{share}"
        else:
            yield f"GPT-2 {name}", ", ".join(f"{p} {error:.0e}" for p, error in figure.items())
    for name, figure in steps.get("trace", {}).items():
        yield (
            f"trace, {name}",
            f"{figure['parameters'] / 1e9:.2f} billion parameters: {figure['value']:.4g} +- {figure['stderr']:.2g} "
            f"in {figure['seconds']:.1f} s",
        )
    for name, calls in steps.get("tiny", {}).items():
        yield f"tiny net, {name}", ", ".join(f"{call} {count}" for call, count in calls.items())


def _by_workload(products: Figures) -> Figures:
    """Workload and K -> precision -> figure."""
    found: Figures = {}
    for name, figure in products.items():
        workload, precision = name.rsplit(" ", 1)
        found.setdefault(workload, {})[precision] = figure
    return found


def _factor(products: Figures, precision: str, least: float, name: str = "", compiled: bool = True) -> Goal:
    """Geometric mean over workloads and K of autograd's best time in float32 over flatcore's in this precision."""
    ratios, errors = [], []
    for figure in products.values():
        best, ours = _best(figure, compiled), figure.get(precision, {}).get("ways", {}).get(FLATCORE)
        if best and ours:
            ratios.append(best / ours["seconds"])
            errors.append(ours["error"])
    mean = statistics.geometric_mean(ratios) if ratios else 0.0
    return _goal(
        name or f"products, {precision}, against the best compiled autograd",
        f">= {least:g}x",
        f"{mean:.1f}x over {len(ratios)} (least {min(ratios):.1f}x), error <= {max(errors):.0e}"
        if ratios
        else "",
        mean >= least if ratios else None,
    )


def _best(figure: Figures, compiled: bool) -> float | None:
    """Seconds of the fastest way of bare torch in float32, of the compiled ones alone or of all."""
    ways = figure.get("full", {}).get("ways", {})
    wanted = [
        w["seconds"] for n, w in ways.items() if n != FLATCORE and (n.startswith("compiled") or not compiled)
    ]
    return min(wanted, default=None)


def _linear(attention: Figures) -> Goal:
    sizes = sorted((int(name.split()[0]), figure["peak_bytes"]) for name, figure in attention.items())
    name = "memory of attention, twice the tokens"
    if len(sizes) < 2:
        return _goal(name, "<= 2.2x", "", None)
    (short, less), (long, more) = sizes[0], sizes[-1]
    return _goal(
        name,
        "<= 2.2x",
        f"{more / less:.2f}x ({short} tokens {less / 1e9:.2f} GB, {long} {more / 1e9:.2f} GB)",
        more / less <= 2.2,
    )


def _goal(name: str, goal: str, found: str, met: bool | None) -> Goal:
    return Goal(name, goal, found or "no figure", met)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _gb(figure: dict[str, float]) -> str:
    return f"{figure['peak_bytes'] / 1e9:.3g}"
