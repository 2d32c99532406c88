"""Types of the compiled extension. Tensors of directions are (K, P) with unit stride along P."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

class engine:
    Mode = Literal["hessian", "ggn", "covariance"]

    @staticmethod
    def threads_used() -> int: ...
    @staticmethod
    def op_kinds() -> list[str]: ...

    class Program:
        def __init__(
            self,
            values: Sequence[tuple[str, Sequence[int]]],
            ops: Sequence[tuple[str, Sequence[int], int, Mapping[str, Any], str]],
            offsets: Mapping[int, int],
            parameters: int,
            loss: int,
            cut: Sequence[int],
        ) -> None: ...
        def flops(self, mode: str, K: int) -> float: ...
        def op_flops(self, op: int, mode: str, K: int) -> float: ...
        def peak_bytes(self, mode: str, K: int, itemsize: int) -> int: ...
        def state_bytes(self, itemsize: int) -> int: ...

    class Linearization:
        loss: float
        bytes: int
        def __init__(self, program: engine.Program, leaves: Mapping[int, Tensor], seed: float) -> None: ...
        def value(self, id: int) -> Tensor: ...
        def adjoint(self, id: int) -> Tensor: ...
        def product(
            self, V: Tensor, Y: Tensor, mode: str, accumulate: bool, batch_examples: int, examples: float
        ) -> None: ...
        def gradient(self, y: Tensor, accumulate: bool) -> None: ...
