"""Quadrature rules of Jacobi matrices: what a Lanczos recurrence knows of the spectrum its start vector sees.

Golub and Meurant, "Matrices, Moments and Quadrature with Applications" (2010), chapters 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Jacobi", "joined"]


@dataclass(frozen=True)
class Jacobi:
    """The tridiagonal matrices of n probes, one row each.

    ``diagonal``, ``coupling`` (n, steps): ``coupling[i, j]`` couples rows j and j + 1, the last one is the norm of
    what the recurrence left over. ``lengths`` (n,): rows in use; fewer than steps where a Krylov space was
    exhausted. Every rule comes as (nodes, weights), (n, m) arrays with rows of weights that sum to 1; unused places
    have weight 0 and repeat another node.
    """

    diagonal: np.ndarray
    coupling: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def of(alpha: torch.Tensor, beta: torch.Tensor, lengths: Sequence[int], steps: int) -> Jacobi:
        """From the recurrence after ``steps`` steps."""
        return Jacobi(alpha[:, :steps].numpy(), beta[:, :steps].numpy(), np.minimum(lengths, steps))

    @property
    def probes(self) -> int:
        return len(self.diagonal)

    @property
    def steps(self) -> int:
        return int(self.diagonal.shape[1])

    @property
    def going(self) -> np.ndarray:
        """Which probes have not exhausted their Krylov space."""
        return np.asarray((self.lengths == self.steps) & (self.coupling[:, -1] > 0))

    def after(self, steps: int) -> Jacobi:
        """What was known after fewer steps."""
        return Jacobi(self.diagonal[:, :steps], self.coupling[:, :steps], np.minimum(self.lengths, steps))

    def gauss(self) -> tuple[np.ndarray, np.ndarray]:
        """Gauss rules: the nodes are eigenvalues, the weights squared first entries of eigenvectors (Golub and
        Welsch, Math. Comp. 23 (1969) 221-230). Exact for polynomials of degree 2 steps - 1."""
        return self._rule(self.diagonal, self.lengths)

    def gauss_error(self, sums: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Per probe an estimate of what its Gauss rule is off by, for ``sums`` of (nodes, weights).

        The step from the rule of half as many steps, and what a geometric sequence of such steps would add, its ratio
        taken from the rule of a quarter: slow convergence shows as a ratio near one, where the factor ends at 10.
        Zero for an exhausted probe, infinite after a single step, which nothing can be compared with.
        """
        if self.steps == 1:
            return np.where(self.going, np.inf, 0.0)
        half = (self.steps + 1) // 2
        finest, middle, coarse = (
            sums(*self.after(steps).gauss()) for steps in (self.steps, half, (half + 1) // 2)
        )
        last = np.abs(finest - middle)
        now, before = (float(x[self.going].sum()) for x in (last, np.abs(middle - coarse)))
        ratio = min(now / before, 0.9) if before > 0 else 0.9
        return np.where(self.going, last / (1 - ratio), 0.0)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nodes, weights and, for each node, the distance within which there is an eigenvalue (Parlett, "The symmetric
        eigenvalue problem" (1998), theorem 13.2.1); infinite in unused places."""
        nodes, vectors = np.linalg.eigh(self._matrices(self.diagonal, self.lengths))
        ends = np.take_along_axis(vectors, (self.lengths - 1)[:, None, None], axis=1)[:, 0]
        left = np.take_along_axis(self.coupling, (self.lengths - 1)[:, None], axis=1)
        weights = vectors[:, 0] ** 2
        return nodes, weights, np.where(weights < np.finfo(float).tiny, np.inf, np.abs(ends * left))

    def radau(self, point: float) -> tuple[np.ndarray, np.ndarray]:
        """Gauss-Radau rules with one more node, which is ``point`` (Golub, SIAM Review 15 (1973) 318-334).

        Exact for polynomials of degree 2 steps. Exhausted probes keep their Gauss rule, which is exact already.
        """
        steps = self.steps
        going = np.flatnonzero(self.going)
        diagonal = np.column_stack([self.diagonal, self.diagonal[:, 0]])
        lengths = self.lengths.copy()
        if len(going):
            last = self.coupling[going, -1]
            shifted = self._matrices(self.diagonal, self.lengths)[going] - point * np.eye(steps)
            unit = np.zeros((len(going), steps, 1))
            unit[:, -1] = 1
            # A point that is a node already: moved by rounding, the rule is the same.
            try:
                corner = np.linalg.solve(shifted, unit)[:, -1, 0]
            except np.linalg.LinAlgError:
                return self.radau(point + 4 * np.spacing(max(abs(point), float(np.abs(self.diagonal).max()))))
            diagonal[going, -1] = point + last**2 * corner
            lengths[going] = steps + 1
        return self._rule(diagonal, lengths)

    def share_bounds(self, point: float) -> tuple[np.ndarray, np.ndarray]:
        """Per probe: the least share of the spectrum below ``point`` and the largest share not above it.

        The inequalities of Chebyshev, Markov and Stieltjes: no measure with the known moments has less, or more
        (Szegő, "Orthogonal polynomials", section 3.41).
        """
        nodes, weights = self.radau(point)
        away = np.abs(nodes - point)
        # Of an exhausted probe every node is an eigenvalue and counts where it is.
        exhausted = ~self.going[:, None]
        scale = np.maximum(np.abs(nodes).max(axis=1, keepdims=True), abs(point))
        own = away == away.min(axis=1, keepdims=True)
        at = np.where(exhausted, away <= 8 * np.finfo(float).eps * scale, own)
        below = np.where(at, 0.0, weights * (nodes < point)).sum(axis=1)
        return below, below + np.where(at, weights, 0.0).sum(axis=1)

    def _matrices(self, diagonal: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(n, m, m); rows past the length stand alone, with a diagonal entry inside the spectrum."""
        probes, size = diagonal.shape
        rows = np.arange(size)
        used = rows < lengths[:, None]
        T = np.zeros((probes, size, size))
        T[:, rows, rows] = np.where(used, diagonal, diagonal[:, :1])
        off = np.where(used[:, 1:], self.coupling[:, : size - 1], 0.0)
        T[:, rows[1:], rows[:-1]] = off
        T[:, rows[:-1], rows[1:]] = off
        return T

    def _rule(self, diagonal: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nodes, vectors = np.linalg.eigh(self._matrices(diagonal, lengths))
        weights = vectors[:, 0] ** 2
        # A function need not be defined where only an unused row puts a node.
        heaviest = np.take_along_axis(nodes, weights.argmax(axis=1)[:, None], axis=1)
        return np.where(weights < np.finfo(float).tiny, heaviest, nodes), weights


def joined(parts: Sequence[Jacobi]) -> Jacobi:
    """The probes of all parts, of equally many steps, in one."""
    return Jacobi(
        np.concatenate([part.diagonal for part in parts]),
        np.concatenate([part.coupling for part in parts]),
        np.concatenate([part.lengths for part in parts]),
    )
