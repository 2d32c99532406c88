"""What a benchmark is run for: which matrix, in which floating-point type, on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import flatcore as fc

OPERATORS = {"hessian": fc.Hessian, "ggn": fc.GGN}
# The largest error of a product, relative to float64: an honest one is far below, a wrong one far above.
LARGEST_ERROR = {"float32": 1e-3, "float64": 1e-9}


@dataclass(frozen=True)
class Setting:
    """dtype: "float32" or "float64". device: "cpu", "cuda" or "cuda:N". operator: "hessian" or "ggn".

    Raises ValueError for anything else, and where torch does not find the device.
    """

    dtype: str = "float32"
    device: str = "cpu"
    operator: str = "hessian"

    def __post_init__(self) -> None:
        if self.dtype not in LARGEST_ERROR:
            raise ValueError(f"dtype: expected one of {', '.join(LARGEST_ERROR)}, got {self.dtype!r}")
        if self.operator not in OPERATORS:
            raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {self.operator!r}")
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        wanted = "cuda:0" if self.device == "cuda" else self.device
        if wanted not in found:
            raise ValueError(
                f"device: expected one that torch finds here ({', '.join(found)}), got {self.device!r}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


DEFAULT = Setting()
