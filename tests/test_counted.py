"""Work in pieces where a library's call counts in 32 bits: with a small limit, on any device, every call keeps to it
and the results stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_tuning import LAYOUTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flatcore as fc
from flatcore import _C
from flatcore._C import engine


@contextmanager
def counted(most: int) -> Iterator[None]:
    engine.set_most_counted(most)
    try:
        yield
    finally:
        engine.set_most_counted(0)


class Calls(TorchDispatchMode):
    """The tensors of each call of some operations."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names, self.tensors = names.split(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.names:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.tensors.append((func, tensors))
        return func(*args, **(kwargs or {}))


def longest(t: Tensor) -> int:
    """Entries along an axis, or elements between two of them."""
    return max((max(n, step) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1), default=1)


MULTIPLY: dict[str, Callable[..., None]] = {"blas": engine.multiply}
if engine.gpu == "emulated" and engine.bf16_available():
    MULTIPLY["bf16"] = engine.multiply_bf16


@pytest.mark.parametrize("multiply", MULTIPLY)
@pytest.mark.parametrize("most", [1, 2, 5, 1000])
@pytest.mark.parametrize("batch", [(), (3,), (14,), (0,)], ids=str)
@pytest.mark.parametrize(
    "layouts", [("dense", "dense"), ("transposed", "rows apart"), ("one matrix", "columns apart")]
)
def test_matrix_products(multiply: str, most: int, batch: tuple[int, ...], layouts: tuple[str, str]) -> None:
    m, n, k = 6, 4, 5
    dtype = torch.float32 if multiply == "bf16" else torch.float64
    a, b = LAYOUTS[layouts[0]](*batch, m, k, dtype=dtype), LAYOUTS[layouts[1]](*batch, k, n, dtype=dtype)
    for result in ("dense", "rows apart"):
        for accumulate in (False, True):
            c = LAYOUTS[result](*batch, m, n, dtype=dtype)
            start = c.double().clone() if accumulate else torch.zeros(c.shape, dtype=torch.float64)
            if not accumulate:
                c.fill_(torch.nan)
            with counted(most), Calls("mm addmm bmm baddbmm") as calls:
                MULTIPLY[multiply](c, a, b, accumulate)
            left, right = (t.bfloat16() if multiply == "bf16" else t for t in (a, b))
            exact = start + left.double() @ right.double()
            sizes = start.abs() + left.double().abs() @ right.double().abs()
            assert bool(((c.double() - exact).abs() <= 2 * (k + 2) * torch.finfo(dtype).eps * sizes).all())
            assert calls.tensors or batch == (0,)
            assert all(longest(t) <= most for _, tensors in calls.tensors for t in tensors)


def test_matrix_products_stay_whole() -> None:
    a, b, c = torch.ones(40, 13, 9), torch.ones(40, 9, 7), torch.empty(40, 13, 7)
    with Calls("bmm") as calls:
        engine.multiply(c, a, b, False)
    assert len(calls.tensors) == 1


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "average": lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "convolution": lambda: nn.Conv2d(4, 3, 3, stride=2),
    "a channel each": lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
}
POOLS = (
    "max_pool2d_with_indices avg_pool2d avg_pool2d_backward adaptive_avg_pool2d _adaptive_avg_pool2d "
    "_adaptive_avg_pool2d_backward"
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_images(layer: str, images: int) -> None:
    """So many of the larger side at once; one where not even that is counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), LAYERS[layer](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    if "Pool" in str(model):  # which is seen where directions come from below
        model.insert(0, nn.Conv2d(4, 4, 1))
    data = (torch.randn(5, 4, 6, 7, dtype=torch.float64), torch.randint(3, (5,)))
    model.double()(data[0])
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(sum(p.numel() for p in model.parameters()), 4, generator=generator, dtype=torch.float64)
    expected = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), data)) @ V
    image = 4 * 6 * 7
    for most in (images * image, images * image + image - 1):
        with counted(most):
            H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), data))
            H @ V  # what captures and checks the program is not counted
            with torch.no_grad():
                next(model.parameters()).add_(0.0)  # a state anew
            with Calls(f"{POOLS} convolution convolution_backward") as calls:
                product = H @ V
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-14)
        for _, tensors in calls.tensors:
            assert max(t.numel() for t in tensors) <= images * image
        # The state's 5 images, and 4 directions of these or of their cotangents.
        assert len(calls.tensors) >= -(-5 // images) + -(-4 * 5 // images)


@pytest.mark.skipif(engine.gpu != "emulated", reason="for the emulated build: rows by kernels are a GPU's")
@pytest.mark.parametrize(("p", "m"), [(9, 12), (3, 140), (12, 130)])
def test_rows_too_long_for_the_library(p: int, m: int) -> None:
    """Their products go through kernels, which sum in another order."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(rows, 40000, generator=generator) for rows in (p, m))
    by_kernel = _C.krylov.products_of_rows(X, Y, "kernel")
    assert torch.equal(_C.krylov.products_of_rows(X, Y, ""), by_kernel) == (p <= 8)
    with counted(39999):
        assert torch.equal(_C.krylov.products_of_rows(X, Y, ""), by_kernel)
    with counted(40000):
        assert torch.equal(_C.krylov.products_of_rows(X, Y, ""), by_kernel) == (p <= 8)
