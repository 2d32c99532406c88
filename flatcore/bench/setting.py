"""What a benchmark is run for: which matrix, in which floating-point type and precision, on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

import flatcore as fc
from flatcore.operators import Operator
from flatcore.precision import Precision

OPERATORS = {"hessian": fc.Hessian, "ggn": fc.GGN}
# The largest error of a product, relative to float64: an honest one is far below, a wrong one far above.
LARGEST_ERROR = {"float32": 1e-3, "float64": 1e-9}
# Of flatcore's, with rounded operands. A rounding is off by half of 2^-10 (TF32) or of 2^-7 (bfloat16); some tens of
# them add up in a deep net, in no one direction.
LARGEST_ROUNDED_ERROR = {"tf32": 2e-2, "bf16": 0.1}
PRECISIONS = ("full", *LARGEST_ROUNDED_ERROR)


@dataclass(frozen=True)
class Setting:
    """dtype: "float32" or "float64". device: "cpu", "cuda" or "cuda:N". operator: "hessian" or "ggn".

    precision: of flatcore's products: "full", or with float32 "bf16" and, on a GPU, "tf32". Everything else is in full.

    Raises ValueError for anything else, and where torch does not find the device.
    """

    dtype: str = "float32"
    device: str = "cpu"
    operator: str = "hessian"
    precision: str = "full"

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
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.precision != "full" and self.dtype != "float32":
            raise ValueError(
                f'precision: expected "full" with {self.dtype}, got "{self.precision}", which rounds float32'
            )
        if self.precision == "tf32" and wanted == "cpu":
            raise ValueError(
                'precision: expected "full" or "bf16" on the CPU, got "tf32", which is for a GPU'
            )

    @property
    def largest_error(self) -> float:
        """Of flatcore's product, relative to float64."""
        return LARGEST_ROUNDED_ERROR.get(self.precision, LARGEST_ERROR[self.dtype])

    def product_operator(self, *built: Any) -> Operator:
        """flatcore's operator, in this precision."""
        return OPERATORS[self.operator](fc.Objective(*built), precision=cast("Precision", self.precision))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


DEFAULT = Setting()
