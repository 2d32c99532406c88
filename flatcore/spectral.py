"""Functions of eigenvalues, with what they demand of a spectrum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

__all__ = ["Function", "rounding"]

_ROUNDING = 32


def rounding(dtype: torch.dtype, scale: float) -> float:
    """Eigenvalues up to this size cannot be told from zero in products of precision ``dtype``, with ``scale`` the
    largest |eigenvalue|."""
    return _ROUNDING * torch.finfo(dtype).eps * scale


class Function:
    """An elementwise function of eigenvalues.

    pole: all eigenvalues must lie above it.
    bernstein: its derivative is completely monotone above the pole (log(x + d), x / (x + d)), so that all derivatives
        have alternating signs: Gauss rules give upper bounds, Gauss-Radau rules with the left end lower ones.
    nonnegative: meant for spectra without negative eigenvalues; ``lowest_negative`` is the lowest one met, or 0.
    argument: what the caller knows -pole as.
    """

    def __init__(
        self,
        f: Callable[[np.ndarray], np.ndarray],
        text: str,
        *,
        pole: float = -np.inf,
        bernstein: bool = False,
        nonnegative: bool = False,
        argument: str = "damping",
    ) -> None:
        if not callable(f):
            raise TypeError(f"{text}: expected a function of an array of eigenvalues, got {type(f).__name__}")
        self._f, self._text, self._nonnegative = f, text, nonnegative
        self.pole, self.bernstein, self._argument = pole, bernstein, argument
        self.lowest_negative = 0.0

    def __call__(self, eigenvalues: np.ndarray) -> np.ndarray:
        values = np.asarray(self._f(eigenvalues), dtype=np.float64)
        if values.shape != eigenvalues.shape:
            raise ValueError(
                f"{self._text}: expected the shape {eigenvalues.shape} of its argument, got {values.shape}; "
                "write it elementwise, e.g. lambda x: x**2"
            )
        if not np.isfinite(values).all():
            at = eigenvalues[~np.isfinite(values)][0]
            raise ValueError(
                f"{self._text}: expected a function that is finite on the spectrum, "
                f"got {values[~np.isfinite(values)][0]} at {at:.6g}; define it there"
            )
        return values

    def check(self, eigenvalues: np.ndarray, zero: float) -> None:
        """Refuses eigenvalues at the pole or below it, up to the rounding ``zero``."""
        least = float(eigenvalues.min())
        name = self._argument
        if least <= self.pole + zero:
            raise ValueError(
                f"{name}: expected A + {name} I to be positive definite beyond the rounding {zero:.2g} of A's "
                f"products, got {name} {-self.pole:g} with an eigenvalue of A at or below {least:.6g}; raise {name}"
                + (
                    ", or take fc.GGN, which has no negative eigenvalues for a convex loss"
                    if least < -zero
                    else ""
                )
            )
        if self._nonnegative and least < -zero:
            self.lowest_negative = min(self.lowest_negative, least)
