"""Types of the compiled extension. Tensors of directions are (K, P) with unit stride along P."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

class engine:
    Mode = Literal["hessian", "ggn", "covariance"]
    gpu: Literal["none", "cuda", "emulated"]

    @staticmethod
    def threads_used() -> int: ...
    @staticmethod
    def workspace_bytes() -> int: ...
    @staticmethod
    def fresh_rows(K: int, P: int, like: Tensor, most: int) -> Tensor: ...
    @staticmethod
    def spare_bytes() -> int: ...
    @staticmethod
    def contiguous_rows(rows: Tensor, most: int) -> Tensor: ...
    @staticmethod
    def op_kinds() -> list[str]: ...
    @staticmethod
    def set_gemm_policy(policy: str) -> None: ...
    @staticmethod
    def set_attention_policy(policy: str) -> None: ...
    @staticmethod
    def onednn_multiplies() -> bool: ...
    @staticmethod
    def gemm_choices() -> dict[str, bool]: ...
    @staticmethod
    def set_gemm_choices(choices: Mapping[str, bool]) -> None: ...
    @staticmethod
    def output_signs(
        like: Tensor, seed: int, first_probe: int, K: int, first_example: int, examples: int, count: int
    ) -> Tensor: ...
    @staticmethod
    def multiply(c: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None: ...
    @staticmethod
    def bf16_available() -> bool: ...
    @staticmethod
    def multiply_bf16(c: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None: ...

    class Float32Products:
        def __init__(self, device: str, precision: str = "full") -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    class Program:
        def __init__(
            self,
            values: Sequence[tuple[str, Sequence[int]]],
            ops: Sequence[tuple[str, Sequence[int], int, Mapping[str, Any], str]],
            offsets: Mapping[int, int],
            parameters: int,
            loss: int,
            cut: Sequence[int],
            device: str = "cpu",
            room: int = 0,
        ) -> None: ...
        def flops(self, mode: str, K: int) -> float: ...
        def op_flops(self, op: int, mode: str, K: int) -> float: ...
        def peak_bytes(self, mode: str, K: int, itemsize: int, precision: str = "full") -> int: ...
        def rounded_flops(self, mode: str, K: int) -> float: ...
        def has_remainder(self) -> bool: ...
        def state_bytes(self, itemsize: int) -> int: ...

    class Linearization:
        loss: float
        bytes: int
        def __init__(self, program: engine.Program, leaves: Mapping[int, Tensor], seed: float) -> None: ...
        def value(self, id: int) -> Tensor: ...
        def adjoint(self, id: int) -> Tensor: ...
        def saved(self, op: int) -> list[Tensor]: ...
        def example_pass(
            self,
            mode: str,
            sums: Tensor,
            seed: int,
            first_probe: int,
            first_example: int,
            relative: bool = False,
            diagonal: Tensor | None = None,
            variance: Tensor | None = None,
        ) -> None: ...
        def cut_curvature(self, directions: Tensor) -> Tensor: ...
        def output_pass(
            self, value: int, cotangents: Tensor, sums: Tensor, diagonal: Tensor | None = None
        ) -> None: ...
        def product(
            self,
            V: Tensor,
            Y: Tensor,
            mode: str,
            accumulate: bool,
            batch_examples: int,
            examples: float,
            precision: str = "full",
        ) -> None: ...
        def quadratic_form(
            self,
            V: Tensor,
            q: Tensor,
            mode: engine.Mode,
            batch_examples: int,
            examples: int,
            precision: str = "full",
        ) -> None: ...
        def gradient(self, y: Tensor, accumulate: bool) -> None: ...

class krylov:
    class OperatorError(ValueError): ...

    class EigenSolver:
        def __init__(
            self,
            *,
            product: Callable[[Tensor], Tensor],
            head: Tensor,
            tail: Tensor,
            scale: float,
            k: int,
            which: str,
            tol: float,
            block: int,
            max_products: int,
            asymmetry: float,
            verify: bool,
            seed: int,
            file: Tensor | None = None,
        ) -> None: ...
        def start(self, rows: Tensor) -> None: ...
        def step(self) -> bool: ...
        def look(self) -> dict[str, Any]: ...
        def result(self) -> dict[str, Any]: ...
        def state(self) -> dict[str, Any]: ...
        def restore(self, state: dict[str, Any]) -> None: ...
        def defect(self) -> tuple[float, float]: ...

    @staticmethod
    def factorise(
        product: Callable[[Tensor], Tensor],
        head: Tensor,
        tail: Tensor,
        scale: float,
        block: int,
        steps: int,
        keep: int,
        lock: int,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[float]]: ...
    @staticmethod
    def tridiagonalise(
        product: Callable[[Tensor], Tensor],
        start: Tensor,
        steps: int,
        enough: Callable[[Tensor, Tensor, list[int], int], bool] | None = None,
        looks: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, list[int], int]: ...
    @staticmethod
    def rademacher(seed: int, first: int, K: int, P: int, like: Tensor) -> Tensor: ...
    @staticmethod
    def products_of_rows(X: Tensor, Y: Tensor, way: str = "") -> Tensor: ...
    @staticmethod
    def fetches() -> int: ...

class estimators:
    class RangeBasis:
        rows: int
        vectors: Tensor
        def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, P: int, seed: int) -> None: ...
        def sketch(self, b: int) -> None: ...
        def extend(self, X: Tensor) -> None: ...
        def remainder(self, V: Tensor, Y: Tensor) -> Tensor: ...
        def known_diagonal(self) -> Tensor: ...

    class LeaveOneOut:
        probes: int
        def __init__(
            self,
            product: Callable[[Tensor], Tensor],
            like: Tensor,
            P: int,
            seed: int,
            slices: Sequence[tuple[int, int]],
        ) -> None: ...
        def extend(self, Y: Tensor) -> None: ...
        def estimates(self, of_slices: bool) -> Tensor: ...
        def diagonal(self) -> tuple[Tensor, Tensor]: ...
        def remainder(self, V: Tensor, Y: Tensor) -> Tensor: ...
        def known_diagonal(self) -> Tensor: ...

class solvers:
    @staticmethod
    def conjugate_gradients(
        product: Callable[[Tensor], Tensor], B: Tensor, damping: float, tol: float, max_products: int
    ) -> dict[str, Any]: ...
    @staticmethod
    def slice_pairs(
        product: Callable[[Tensor], Tensor],
        like: Tensor,
        P: int,
        slices: Sequence[tuple[int, int]],
        k: int,
        which: str,
        tol: float,
        width: int,
        steps: int,
        seed: int,
        on_step: Callable[[int, int], None],
    ) -> list[dict[str, Any]]: ...

class changes:
    @staticmethod
    def versions(tensors: Iterable[Tensor]) -> bytes: ...
    @staticmethod
    def of_modules(model: nn.Module, loss: nn.Module | None) -> tuple[bytes, bytes, bytes]: ...

    class Comparison:
        def __init__(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None: ...
        def equal(self) -> bool: ...
