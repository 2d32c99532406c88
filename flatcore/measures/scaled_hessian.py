"""diag(c) H diag(c): curvature in coordinates of other units."""

from __future__ import annotations

import torch
from torch import Tensor

from flatcore.operators import Hessian

__all__ = ["ScaledHessian"]


class ScaledHessian:
    """diag(c) H diag(c), for the estimators."""

    def __init__(self, hessian: Hessian, c: Tensor) -> None:
        self._hessian, self._c = hessian, c[:, None]
        self.shape, self.dtype, self.device = hessian.shape, hessian.dtype, hessian.device
        self.parameter_slices = hessian.parameter_slices

    def __matmul__(self, V: Tensor) -> Tensor:
        product: torch.Tensor = self._hessian @ (self._c * V)
        return self._c * product
