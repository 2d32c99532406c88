"""The least of sum_ij h_ij r_i c_j + w_ij / (r_i c_j) over positive row scales r and column scales c."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scaled", "least_over_scales"]

TOLERANCE = 1e-13  # a tenth of what is promised: the rate of convergence is still falling off
ROUNDING = 1e-28  # a relative gain of the square of a few dozen units in the last place
MAX_SWEEPS = 10_000


@dataclass(frozen=True)
class Scaled:
    """``value``: the least sum. ``scales``: r_i c_j, 0 for an entry that the infimum leaves out. ``attained``: whether
    finite positive scales reach it. ``converged``: to a relative 1e-12."""

    value: float
    scales: Tensor
    attained: bool
    converged: bool
    sweeps: int


def least_over_scales(h: Tensor, w: Tensor) -> Scaled:
    """h, w (d, m), both float64 and not negative.

    In the logarithms of the scales the sum is convex, and for fixed columns the rows have the closed form
    r_i² = sum_j (w_ij / c_j) / sum_j h_ij c_j. Rows and columns in turn descend to the minimum, wherever there is one;
    `_attainable` leaves out the entries whose terms vanish along the way to an infimum that no scales attain.

    A sweep lowers the sum by sum_j (sqrt(A_j) - sqrt(B_j))², with A_j and B_j the two parts of column j, which is
    exact where the difference of two sums is rounding. What is left to gain is the rest of a geometric series.
    """
    kept = _attainable(h > 0, w > 0)
    attained = not bool(((h > 0) | (w > 0))[~kept].any())
    scales = torch.zeros_like(h)
    rows, columns = kept.any(1), kept.any(0)
    if not bool(rows.any()):
        return Scaled(0.0, scales, attained, True, 0)
    inside = kept[rows][:, columns]
    H, W = h[rows][:, columns] * inside, w[rows][:, columns] * inside
    h_sum, w_sum = H.sum(), W.sum()
    H, W = H / h_sum, W / w_sum
    c = torch.ones_like(H[0])
    gain, value, converged, sweep = torch.inf, 0.0, False, 0
    while not converged and sweep < MAX_SWEEPS:
        sweep += 1
        A, B = H @ c, W @ (1 / c)
        value = 2 * float((A * B).sqrt().sum())
        r = (B / A).sqrt()
        A, B = H.T @ r, W.T @ (1 / r)
        gain, before = float(((c * A).sqrt() - (B / c).sqrt()).square().sum()), gain
        value -= gain
        c = (B / A).sqrt()
        rate = min(gain / before, 1.0) if 0 < before < torch.inf else 1.0
        left = gain * rate / (1 - rate) if rate < 1 else torch.inf
        converged = gain <= ROUNDING * value or max(gain, left) <= TOLERANCE * value
    unit = (w_sum / h_sum).sqrt()
    scales[rows.nonzero(), columns.nonzero().T] = r[:, None] * c * unit * inside
    return Scaled(value * float((h_sum * w_sum).sqrt()), scales, attained, converged, sweep)


def _attainable(h: Tensor, w: Tensor) -> Tensor:
    """Which entries keep a positive term at the infimum; h and w tell where the entries are positive.

    Let log r_i grow as x_i and log c_j as -y_j. Terms stay bounded if x_i <= y_j wherever h_ij > 0 and x_i >= y_j
    wherever w_ij > 0: along the edges i -> j and j -> i of a directed graph the numbers do not fall. They can be made
    to rise along every edge between two strongly connected components, so the terms of these edges vanish, no others.
    A dead row has edges of one direction only: a component of its own.
    """
    component = torch.zeros(sum(h.shape), dtype=torch.long, device=h.device)
    d = h.shape[0]
    alive_rows, alive_columns = h.any(1) & w.any(1), h.any(0) & w.any(0)
    component[:d][alive_rows] = -1
    component[d:][alive_columns] = -1
    number = 0
    while bool((component < 0).any()):
        number += 1
        start = int((component < 0).nonzero()[0])
        both = _reached(h, w, start, component < 0) & _reached(w, h, start, component < 0)
        component[both] = number
    rows, columns = component[:d, None], component[None, d:]
    return (rows == columns) & (rows > 0) & (h | w)


def _reached(to_columns: Tensor, to_rows: Tensor, start: int, allowed: Tensor) -> Tensor:
    """The nodes, rows before columns, that paths from ``start`` through allowed nodes reach."""
    d = to_columns.shape[0]
    reached = torch.zeros_like(allowed)
    reached[start] = True
    while True:
        before = int(reached.sum())
        reached[d:] |= to_columns[reached[:d]].any(0) & allowed[d:]
        reached[:d] |= to_rows[:, reached[d:]].any(1) & allowed[:d]
        if int(reached.sum()) == before:
            return reached
