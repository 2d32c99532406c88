"""Interpolation of sequences and images: along each axis a constant matrix."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..lower import Lowering, lowers

_MODES = {
    "upsample_nearest1d": "nearest",
    "upsample_nearest2d": "nearest",
    "_upsample_nearest_exact1d": "nearest-exact",
    "_upsample_nearest_exact2d": "nearest-exact",
    "upsample_linear1d": "bilinear",
    "upsample_bilinear2d": "bilinear",
    "upsample_bicubic2d": "bicubic",
}


@lowers(*(f"{name}.{overload}" for name in _MODES for overload in ("default", "vec")))
def _upsample(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    name = str(node.target).split(".")[1]
    x = lower.operand(getattr(a, "input", None) or a.self)
    sizes = node.meta["val"].shape[2:]
    factors = _factors(a, len(sizes))
    for axis, size, factor in zip(range(2, 4), sizes, factors, strict=False):
        matrix = lower.prelude.call(
            _matrix,
            lower.shape(x)[axis],
            int(size),
            factor,
            _MODES[name],
            getattr(a, "align_corners", None),
            lower.dtype,
            lower.device,
        )
        rows = lower.to_last(x, axis)
        x = lower.from_last(lower.emit("linear", rows, lower.constant(matrix), None, transposed=False), axis)
    return x


def _factors(a: SimpleNamespace, axes: int) -> list[float | None]:
    """The factors that were asked for; the overloads write them in different ways."""
    if getattr(a, "scale_factors", None):
        return [float(f) for f in a.scale_factors]
    given = [getattr(a, name, None) for name in (("scales",) if axes == 1 else ("scales_h", "scales_w"))]
    return [None if f is None else float(f) for f in given]


def _matrix(
    length: int,
    size: int,
    factor: float | None,
    mode: str,
    align_corners: bool | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(size, length): what the interpolation makes of each unit vector."""
    units = torch.eye(length, dtype=dtype, device=device)[None, :, :, None]
    where = {"size": (size, 1)} if factor is None else {"scale_factor": (factor, 1.0)}
    return F.interpolate(units, mode=mode, align_corners=align_corners, **where)[0, :, :, 0].T
