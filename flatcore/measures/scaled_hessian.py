"""diag(c) (H + diag(shift)) diag(c): curvature in coordinates of other units."""

from __future__ import annotations

from torch import Tensor

from flatcore.operators import Hessian

__all__ = ["ScaledHessian"]


class ScaledHessian:
    """diag(c) (H + diag(shift)) diag(c), for the estimators."""

    def __init__(self, hessian: Hessian, c: Tensor, shift: Tensor | None = None) -> None:
        self._hessian, self._c = hessian, c[:, None]
        self._shift = None if shift is None else shift[:, None]
        self.shape, self.dtype, self.device = hessian.shape, hessian.dtype, hessian.device
        self.parameter_slices = hessian.parameter_slices

    def __matmul__(self, V: Tensor) -> Tensor:
        scaled = self._c * V
        product: Tensor = self._hessian @ scaled
        return self._c * (product if self._shift is None else product + self._shift * scaled)
