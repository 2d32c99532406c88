"""Which way to a trace or diagonal is the cheapest, as far as a pilot shows."""

from __future__ import annotations

import math

import torch

from flatcore import _C
from flatcore.projected import leave_one_out_of, remainder
from flatcore.sampling import BLOCK, LEAST_PROBES, Run, hutchinson

__all__ = ["automatic"]


def automatic(run: Run, may_be_exact: bool) -> str:
    """The cheapest way to rtol as far as a pilot of Hutchinson's probes shows; returns the method it took,
    "exact" for a method that is still to be carried out.

    The pilot gives Hutchinson's spread and, from the products' Gram matrix, the share of A outside of their
    span. Only where that share promises fewer products than Hutchinson's spread does the pilot get its second
    products, which make an XTrace of it. From then on, block by block, the least of four predictions is
    followed: Hutchinson's probes, probes of what the basis leaves (Hutch++), a larger basis (XTrace), all
    columns. Hutchinson's probes stay valid throughout, so that what a wrong promise costs is the second
    products.
    """
    P, images = run.operator.P, []
    for first in range(0, min(LEAST_PROBES, run.left), BLOCK):
        probes = run.products.probes(run.seed, first, min(BLOCK, LEAST_PROBES - first, run.left))
        images.append(run.operator.apply(probes))
        run.tally.add(images[-1] * probes)
    if run.reached() or run.tally.n < LEAST_PROBES:
        return "hutchinson"
    plain = run.tally  # Hutchinson's, of all probes

    def all_columns() -> float:
        return P if may_be_exact and run.left >= P else math.inf

    def hutchinson_or_exact() -> str:
        run.tally = plain
        if all_columns() < run.samples_needed() - plain.n:
            return "exact"
        return "exact" if hutchinson(run, may_be_exact) else "hutchinson"

    m, needed = plain.n, run.samples_needed()
    share, slope = share_outside(torch.cat(images))
    promised = m + min(needed * share**2, growth_cost(m, needed * share**2, slope))
    if 4 * m > P or run.left < 2 * m or promised >= min(needed - m, all_columns()):
        return hutchinson_or_exact()

    estimator = leave_one_out_of(run)
    for part in images:
        estimator.extend(part)
    del images
    first_error = math.nan
    while True:
        run.tally = plain
        others = min(run.samples_needed() - plain.n, all_columns())
        run.tally = run.new_tally(None)
        run.tally.take(estimator, final=False)
        if run.reached():
            run.tally.take(estimator, final=True)
            return "xtrace"
        m, needed, error = run.tally.n, run.samples_needed(), run.tally.error_and_size()[0]
        if m == LEAST_PROBES:
            first_error = error
        elif error > 0:  # what growing has brought, where that is less than promised
            slope = min(slope, max(0.0, math.log(first_error / error) / math.log(m / LEAST_PROBES) - 0.5))
        probing, growing = max(needed, LEAST_PROBES), growth_cost(m, needed, slope)
        may_grow = 2 * (m + BLOCK) <= P and run.left >= 2 * BLOCK
        if may_grow and growing <= min(probing, others):
            probes = run.products.probes(run.seed, m, BLOCK)
            image = run.operator.apply(probes)
            plain.add(image * probes)
            estimator.extend(image)
        elif probing <= others and run.left >= LEAST_PROBES:
            run.tally, run.first_probe = run.new_tally(estimator.known_diagonal()), m
            run.operator = remainder(run.operator, estimator)
            return "exact" if hutchinson(run, may_be_exact) else "hutch++"
        else:
            return hutchinson_or_exact()


def growth_cost(m: int, needed: float, slope: float) -> float:
    """Products until XTrace reaches rtol from m probes, two a probe.

    At equal spread ``needed`` probes would do; where the share outside of the basis falls as m^-slope, the
    error falls as m^-(slope + 1/2).
    """
    if needed == math.inf:
        return math.inf
    return float(max(2 * BLOCK, 2 * m * ((needed / m) ** (0.5 / (slope + 0.5)) - 1)))


def share_outside(images: torch.Tensor) -> tuple[float, float]:
    """How much of |A| (Frobenius) lies outside the span of all rows but one, and with which power of their
    number that falls. The rows are products y_i of A with independent signs.

    The squared length of y_i outside the span of the others is 1 / (Gram⁻¹)_ii; its mean estimates
    |(I - Pi) A|², as that of |y_i|² estimates |A|².
    """

    def share(rows: torch.Tensor) -> float:
        gram = _C.krylov.products_of_rows(rows, rows).cpu() if rows.is_cuda else (rows @ rows.T).double()
        size = float(gram.diagonal().mean())
        if size == 0:
            return 0.0
        gram.diagonal().add_(len(rows) * torch.finfo(rows.dtype).eps * size)  # invertible after rounding
        outside = float((1 / torch.linalg.inv(gram).diagonal()).mean())
        return math.sqrt(min(1.0, max(0.0, outside) / size))

    early, late = share(images[: len(images) // 2]), share(images)
    return late, math.log2(early / late) if 0 < late < early else 0.0
