"""Reports as JSON: plain numbers, every estimate with its error, its cost and its seed."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from flatcore.density import Density
from flatcore.report.compute import Curvature, Report
from flatcore.report.measures import document as measure_document
from flatcore.results import Eigenpairs, Estimate

SCHEMA = "flatcore-report/1"
_DENSITY_POINTS = 401


def to_json(reports: tuple[Report, ...]) -> str:
    """{"schema", "reports": [...]}. A number that is not finite becomes null."""
    return dumps({"schema": SCHEMA, "reports": [document(report) for report in reports]})


def dumps(tree: Any) -> str:
    return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def document(report: Report) -> dict[str, Any]:
    return {
        "name": report.name,
        "created": report.created,
        "parameters": report.parameters,
        "examples": report.examples,
        "dtype": report.dtype,
        "device": report.device,
        "training": dataclasses.asdict(report.training),
        "test": None if report.test is None else dataclasses.asdict(report.test),
        "curvature": _curvature(report.curvature),
        "autograd_loop": None if report.autograd is None else _curvature(report.autograd),
        "measures": {m.name: measure_document(m) for m in report.measures},
        "native_fraction": report.native_fraction,
        "peak_bytes": report.peak_bytes,
        "seed": report.seed,
        "rtol": report.rtol,
        "machine": dataclasses.asdict(report.machine),
    }


def eigenpairs(pairs: Eigenpairs) -> dict[str, Any]:
    """Without the vectors."""
    fields = dataclasses.asdict(dataclasses.replace(pairs, vectors=None))
    del fields["vectors"]
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()}


def estimate(result: Estimate) -> dict[str, Any]:
    parts = {name: {"value": e.value, "stderr": e.stderr} for name, e in (result.by_parameter or {}).items()}
    names = ("value", "stderr", "method", "matvecs", "seconds", "seed", "status")
    return {name: getattr(result, name) for name in names} | {"by_parameter": parts}


def density(result: Density) -> dict[str, Any]:
    """The smoothed curve of `Density.pdf` on an even grid over its range, and the probes' quadrature itself."""
    grid = np.linspace(*result.range, _DENSITY_POINTS)
    value, stderr = result.pdf(grid)
    return {
        "grid": grid.tolist(),
        "pdf": value.tolist(),
        "stderr": stderr.tolist(),
        "nodes": result.nodes.tolist(),
        "weights": result.weights.tolist(),
        "matvecs": result.matvecs,
        "seconds": result.seconds,
        "seed": result.seed,
        "status": result.status,
    }


def _curvature(numbers: Curvature) -> dict[str, Any]:
    return {
        "trace": estimate(numbers.trace),
        "top": eigenpairs(numbers.top),
        "bottom": eigenpairs(numbers.bottom),
        "density": density(numbers.density),
        "stages": [{"name": n, "products": p, "seconds": s} for n, p, s in numbers.stages],
        "products": numbers.products,
        "seconds": numbers.seconds,
    }


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
