"""How often the Krylov methods wait for the device that the vectors are on, counted on the CPU, where the same calls
fetch small matrices; and inner products of long rows, whichever way they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatcore import _C
from flatcore.krylov_basis import allocate_basis
from flatcore.linear import as_operator
from tests.spectra import eps, with_spectrum


class Counted:
    """A symmetric operator that notes how often was fetched until each of its products."""

    def __init__(self) -> None:
        self.A = with_spectrum(np.linspace(0.1, 1, 400))
        self.shape, self.dtype, self.device = self.A.shape, self.A.dtype, self.A.device
        self.parameter_slices = {"a": slice(0, 90), "b": slice(90, 130), "c": slice(130, 400)}
        self.at_products: list[int] = []

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.at_products.append(_C.krylov.fetches())
        return self.A @ V

    def between_products(self) -> list[int]:
        return [int(n) for n in np.diff(self.at_products)]


@pytest.mark.parametrize("storage", ["full", "file", "float16", "bf16"])
@pytest.mark.parametrize("block", [1, 3])
def test_a_lanczos_step(storage: str, block: int) -> None:
    """One: what both projections found, and the errors of rows that were rounded."""
    counted = Counted()
    operator = as_operator(counted)
    basis = allocate_basis(operator, 4, block, 0, 1e-2, None, storage)
    solver = _C.krylov.EigenSolver(
        product=operator.apply,
        head=basis.head,
        tail=basis.tail,
        scale=basis.scale,
        k=4,
        which="LA",
        tol=1e-9,
        block=block,
        max_products=10**6,
        asymmetry=0.25,
        verify=True,
        seed=0,
        file=basis.file,
    )
    solver.start(torch.empty(0, 400, dtype=torch.float64))
    for _ in range(12):
        before = _C.krylov.fetches()
        assert solver.step()
        solver.look()
        assert _C.krylov.fetches() - before == 1


def test_a_step_of_probes() -> None:
    counted = Counted()
    start = _C.krylov.rademacher(0, 0, 5, 400, torch.empty(0, dtype=torch.float64))
    _C.krylov.tridiagonalise(as_operator(counted).apply, start, 20)
    assert counted.between_products() == [1] * 19


def test_a_step_in_slices() -> None:
    """One for all recurrences, however many there are."""
    counted = Counted()
    like = torch.empty(0, dtype=torch.float64)
    slices = [(s.start, s.stop - s.start) for s in counted.parameter_slices.values()]
    _C.solvers.slice_pairs(
        as_operator(counted).apply, like, 400, slices, 1, "LM", 1e-6, 8, 100, 0, lambda products, done: None
    )
    between = counted.between_products()
    assert between.count(1) == len(between)
    assert len(between) > 20


def test_a_step_of_conjugate_gradients() -> None:
    """The matrices of the step, and two for the orthonormalisation of what comes next."""
    counted = Counted()
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    B /= B.norm(dim=1, keepdim=True)
    found = _C.solvers.conjugate_gradients(as_operator(counted).apply, B, 0.0, 1e-6, 1000)
    assert found["iterations"] > 5
    assert set(counted.between_products()) == {3}


def test_estimates_of_slices() -> None:
    """The sums over all parameters come together."""
    counted = Counted()
    view = as_operator(counted)
    slices = [(s.start, s.stop - s.start) for s in counted.parameter_slices.values()]
    estimator = _C.estimators.LeaveOneOut(view.apply, torch.empty(0, dtype=torch.float64), 400, 0, slices)
    for first in (0, 8):
        probes = _C.krylov.rademacher(0, first, 8, 400, torch.empty(0, dtype=torch.float64))
        estimator.extend(view.apply(probes))
    for action in (lambda: estimator.estimates(True), estimator.diagonal):
        before = _C.krylov.fetches()
        action()
        assert _C.krylov.fetches() - before <= 2
    before = _C.krylov.fetches()
    estimator.remainder(probes, view.apply(probes))
    assert _C.krylov.fetches() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", ["piece by piece", "kernel", "batches", ""])
@pytest.mark.parametrize(
    ("p", "m", "P"), [(1, 1, 1), (2, 9, 1000), (3, 3, 2**15), (5, 70, 2**15 + 77), (9, 2, 40000)]
)
def test_inner_products(way: str, dtype: torch.dtype, p: int, m: int, P: int) -> None:
    """Against float64, within the rounding of a sum of 2^14 terms in the rows' precision."""
    generator = torch.Generator().manual_seed(p + m + P)
    X, Y = (torch.randn(rows, P, generator=generator, dtype=dtype) for rows in (p, m))
    found = _C.krylov.products_of_rows(X, Y, way)
    assert found.dtype == torch.float64
    size = X.double().abs() @ Y.double().abs().T
    assert ((found - X.double() @ Y.double().T).abs() <= (2**14 + 1) * eps(dtype) * size).all()


def test_float32_sums_are_short() -> None:
    """Of a million equal terms a float32 sum in order is off by far more than one of pieces."""
    X = torch.full((1, 2**20 + 3), 0.1, dtype=torch.float32)
    exact = X.double() @ X.double().T
    for way in ("piece by piece", "kernel", "batches"):
        found = _C.krylov.products_of_rows(X, X, way)
        assert abs(float(found / exact) - 1) <= 2**14 * eps(torch.float32)
