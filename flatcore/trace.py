"""Trace and diagonal of a symmetric operator, estimated or exactly."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from flatcore.automatic import automatic
from flatcore.by_example import ByExample
from flatcore.environment import full_precision
from flatcore.errors import NotSeparable, warn
from flatcore.linear import LinearView, as_operator, check_count, check_positive, check_seed
from flatcore.progress import Bar, progress_bar
from flatcore.projected import hutch_plus_plus, known_basis, leave_one_out, remainder
from flatcore.results import Estimate
from flatcore.sampling import DiagonalTally, Products, Run, TraceTally, exact, hutchinson

__all__ = ["diagonal", "trace"]

_EXACT_AT_ONCE = 64  # rows up to which "auto" does not estimate at all
_EXACT_AT_MOST = 4096  # rows up to which "auto" may change over to "exact"
_MAX_MATVECS = 2000


def trace(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    deflate: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """tr A of the symmetric operator A, (P, P): ``value`` and ``stderr`` are floats.

    ``method``:
    "exact": for a GGN, a GradientCovariance and the Hessian of a piecewise-linear model, where the loss is a sum
    over examples with at most 256 outputs each: one sweep for each output of an example, about a third of a
    product; all P columns otherwise. ``stderr`` is 0.
    "example": where the loss is a sum over examples: probes of each example's own, whose noise is averaged over
    the examples and which cost about half a product; ``by_parameter`` from the same passes. Where examples
    interact, a FlatcoreWarning says which operation mixes them, and "hutchinson" takes its place.
    "hutchinson": mean of <v, A v> over probes v of random signs (Hutchinson, Commun. Stat. Simul. Comput. 18
    (1989) 1059-1076). The error falls as 1 / sqrt(products), whatever the spectrum.
    "hutch++": exactly on a sketch of the range, probes for the rest (Meyer, Musco, Musco and Woodruff, SOSA
    2021); better where few eigenvalues carry the trace.
    "xtrace": the same from one set of probes, each estimated with the others as its sketch (Epperly, Tropp
    and Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1-23); the best where the spectrum decays fast. The
    standard error counts what these estimates have in common. Memory: two vectors a probe.
    "auto": exact where P <= 64, else the cheapest of these to rtol as far as a pilot shows, among them
    "ggn+example": the Gauss-Newton part of a Hessian exactly, and the rest, small near a minimum, by probes of
    each example's own. ``method`` of the result is the one taken.

    All stop at stderr <= rtol |value|, with a margin while samples are few. ``deflate``: Eigenpairs, or a
    tensor (P, k): the part of A in the span of these vectors is taken exactly, for k products; only the rest
    is estimated. The vectors need not be accurate. ``max_matvecs``: products with one vector, or probes and
    outputs of sweeps over the examples, by default 2000 for an estimate. rtol not reached by then: ``status``
    says so, and a FlatcoreWarning. ``by_parameter``: the same for the diagonal block of each parameter, where A has
    ``parameter_slices`` (name -> slice), else None. Raises ValueError or TypeError for bad arguments and for
    products that are not finite.
    """
    return _estimate("trace", TraceTally, A, method, rtol, max_matvecs, deflate, seed, progress)


def diagonal(
    A: Any,
    *,
    method: str = "auto",
    rtol: float = 0.01,
    max_matvecs: int | None = None,
    deflate: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """diag A of the symmetric operator A, (P, P): ``value`` and ``stderr`` are (P,) float64 tensors on A's
    device.

    As ``trace``, with v * (A v) in place of <v, A v> (Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57
    (2007) 1214-1229) and "xdiag" (or "xtrace") for XDiag, until the norm of stderr <= rtol times the norm of
    value. Single entries may be far less certain than that.
    """
    return _estimate("diagonal", DiagonalTally, A, method, rtol, max_matvecs, deflate, seed, progress)


def _estimate(
    what: str,
    kind: type[TraceTally],
    A: Any,
    method: str,
    rtol: float,
    max_matvecs: int | None,
    deflate: Any,
    seed: int,
    progress: bool,
) -> Estimate:
    began = time.perf_counter()
    operator = as_operator(A)
    method, rtol, seed = (
        _checked_method(what, A, method),
        check_positive("rtol", rtol, 0.01),
        check_seed(seed),
    )
    limit = None if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    if method == "auto" and min(_EXACT_AT_ONCE, limit or _MAX_MATVECS) >= operator.P:
        method = "exact"
    if method == "example" and limit == 1:
        raise ValueError(
            "max_matvecs: expected at least 2 for probes of each example's own, got 1; allow more"
        )
    sweeps = _sweeps(what, A, method) if deflate is None and limit != 1 else None
    swept, used_up = None, 0
    with full_precision(), progress_bar(what, total=limit or _MAX_MATVECS, enabled=progress) as bar:
        if sweeps is not None:
            swept = ByExample(sweeps, operator, what == "diagonal", rtol, limit or _MAX_MATVECS, seed, bar)
            try:
                used = swept.run(method)
            except NotSeparable as reason:  # only the data of a batch tell
                used = None
                _shared(what, method, str(reason))
            finally:
                sweeps.release()
            used_up = swept.used
        if swept is None or used is None:
            swept = None
            left = None if limit is None else max(1, limit - used_up)
            run, used = _by_products(what, kind, operator, method, rtol, left, deflate, seed, bar)
            used_up += run.products.used
    if swept is not None:
        error, size = swept.error_and_size()
        status = (
            "converged"
            if swept.believed and error <= rtol * size
            else _unreached(what, error, size, used_up, rtol)
        )
        numbers = swept.results(operator.parameter_slices or {})
    else:
        status = "converged" if used == "exact" else _status(what, run)
        numbers = run.tally.results(used == "exact")
    if status != "converged":
        warn(f"{what}: {status}")
    seconds = time.perf_counter() - began

    def result(numbers: tuple[Any, Any], parts: dict[str, Estimate] | None) -> Estimate:
        return Estimate(*numbers, used_up, parts, method=used, seed=seed, seconds=seconds, status=status)

    whole = numbers.pop("")
    has_parts = operator.parameter_slices is not None
    return result(whole, {name: result(n, None) for name, n in numbers.items()} if has_parts else None)


def _sweeps(what: str, A: Any, method: str) -> Any:
    """The sweeps over examples that an operator offers, where the method wants them; None where there are none."""
    offer = getattr(A, "example_sweeps", None)
    if method not in ("auto", "exact", "example") or offer is None:
        return None
    found = offer(what == "diagonal")
    if not isinstance(found, str):
        return found
    _shared(what, method, found)
    return None


def _shared(what: str, method: str, reason: str) -> None:
    if method == "example":
        warn(f"{what}: {reason}; so all examples share their probes")


def _by_products(
    what: str,
    kind: type[TraceTally],
    operator: LinearView,
    method: str,
    rtol: float,
    limit: int | None,
    deflate: Any,
    seed: int,
    bar: Bar,
) -> tuple[Run, str]:
    """The estimate from products with the whole matrix, and the method that was carried out."""
    if method == "exact" and limit is not None and limit < operator.P:
        raise ValueError(
            f"max_matvecs: the exact {what} takes P = {operator.P} products, got {limit}; allow as many"
        )
    budget = limit or max(_MAX_MATVECS, operator.P if method == "exact" else 0)
    if method == "example":
        method = "hutchinson"
    products = Products(operator)
    counted = LinearView(operator.P, operator.dtype, operator.device, products, operator.parameter_slices)
    known = None
    if deflate is not None and method != "exact":
        basis = known_basis(deflate, counted, budget)
        counted, known = remainder(counted, basis), basis.known_diagonal()
    new_tally = functools.partial(_tally, kind, operator, known)
    run = Run(counted, products, new_tally(None), new_tally, rtol, budget, seed, bar)
    used = _run(run, method)
    if used == "exact":
        exact(run)
    return run, "xdiag" if used == "xtrace" and what == "diagonal" else used


def _run(run: Run, method: str) -> str:
    """Fills the tally; returns the method used, "exact" for one that is still to be carried out."""
    if method == "exact":
        return method
    if method == "auto":
        return automatic(run, may_be_exact=run.operator.P <= _EXACT_AT_MOST)
    if method == "hutchinson":
        hutchinson(run, may_change=False)
        return method
    change = leave_one_out(run) if method == "xtrace" else hutch_plus_plus(run)
    return "exact" if change else method


def _checked_method(what: str, A: Any, method: str) -> str:
    methods = ["auto", "exact", "hutchinson", "hutch++", "xtrace"] + ["xdiag"] * (what == "diagonal")
    if hasattr(A, "example_sweeps"):
        methods.insert(2, "example")
    if method not in methods:
        raise ValueError(f"method: this operator offers {', '.join(methods)}, got {method!r}")
    return "xtrace" if method == "xdiag" else method


def _tally(
    kind: type[TraceTally], operator: LinearView, deflated: torch.Tensor | None, known: torch.Tensor | None
) -> TraceTally:
    """``known`` of what is sampled, beside what was deflated."""
    parts = [part for part in (deflated, known) if part is not None]
    return kind(operator, sum(parts[1:], parts[0]) if parts else None)


def _status(what: str, run: Run) -> str:
    error, size = run.tally.error_and_size()
    if error <= run.rtol * size and run.tally.n > 1:
        return "converged"
    return _unreached(what, error, size, run.products.used, run.rtol)


def _unreached(what: str, error: float, size: float, used: int, rtol: float) -> str:
    return (
        f"the standard error of the {what} is {error:.3g} at {size:.3g} after {used} products, "
        f"above rtol = {rtol:g}; raise max_matvecs or rtol"
    )
