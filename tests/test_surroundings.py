"""What surrounds a call must not matter: torch's default device; copies of operators."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import flatcore as fc
from flatcore.autograd import AutogradBackend
from flatcore.kept_maps import KeptMaps


def objective(dtype: torch.dtype = torch.float32) -> fc.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    data = [(torch.randn(n, 5, dtype=dtype), torch.randint(3, (n,))) for n in (6, 4)]
    return fc.Objective(model, nn.CrossEntropyLoss(), data)


def vectors(A: Any) -> torch.Tensor:
    return torch.ones(A.shape[0], 2, dtype=A.dtype, device="cpu")


# Each takes an operator that nothing was computed with before, and gives numbers.
CALLS: dict[str, Callable[[Any], Any]] = {
    "product": lambda A: A @ vectors(A),
    "quadratic form": lambda A: A.quadratic_form(vectors(A)),
    "dense": lambda A: A.to_dense(),
    "scipy": lambda A: A.to_scipy() @ vectors(A).numpy(),
    "precision error": lambda A: A.precision_error().errors,
    "loss": lambda A: A.objective.loss(),
    "eigsh": lambda A: fc.eigsh(A, 2, tol=1e-2).values,
    "eigsh both ends": lambda A: fc.eigsh(A, 2, which="BE", tol=1e-2, block_size="measured").values.sign(),
    "eigsh from a file": lambda A: fc.eigsh(A, 2, storage="file", tol=1e-2, v0=vectors(A)).values,
    "eigsh with a draft": lambda A: fc.eigsh(A, 2, tol=1e-2, draft=A).values,
    "warm start": lambda A: fc.eigsh(A, 2, tol=1e-2, v0=fc.eigsh(A, 2, tol=1e-2)).values,
    "block_spectra": lambda A: fc.block_spectra(A, 2)["0.weight"].values,
    "trace": lambda A: fc.trace(A, rtol=0.1).value,
    "hutch++": lambda A: fc.trace(A, rtol=0.3, method="hutch++").value,
    "xtrace": lambda A: fc.trace(A, rtol=0.3, method="xtrace").value,
    "trace, deflated": lambda A: fc.trace(A, rtol=0.3, deflate=fc.eigsh(A, 2, tol=1e-2)).value,
    "diagonal": lambda A: fc.diagonal(A, rtol=0.5).value,
    "solve": lambda A: fc.solve(A, vectors(A), damping=1.0).value,
    "spectral_density": lambda A: fc.spectral_density(A, probes=2, steps=8).cdf([0.0, 1.0])[0],
    "logdet": lambda A: fc.logdet(A, 1.0, method="lanczos", rtol=0.1).value,
    "soft_rank": lambda A: fc.soft_rank(A, 1.0, method="exact").value,
    "effective_dimension": lambda A: fc.effective_dimension(A, 1.0, rtol=0.1).value,
    "functional": lambda A: fc.functional(A, abs, method="lanczos", rtol=0.5).value,
    "schatten": lambda A: fc.schatten(A, 1, method="exact").value,
    "frobenius": lambda A: fc.frobenius(A, method="hutchinson", rtol=0.5).value,
    "participation_ratio": lambda A: fc.participation_ratio(A, method="hutchinson", rtol=0.5).value,
}


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    """Tensors are made there where nothing else is said."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="module")
def shared() -> fc.Objective:
    return objective()


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
@pytest.mark.parametrize("name", CALLS)
def test_default_device(name: str, shared: fc.Objective) -> None:
    """Results lie where the parameters do, and are the same numbers."""
    expected = torch.as_tensor(CALLS[name](fc.GGN(shared)))
    with default_device("meta"):
        found = CALLS[name](fc.GGN(shared))
    found = torch.as_tensor(found)
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [fc.Hessian, fc.GGN, fc.GradientCovariance])
def test_made_under_a_default_device(kind: type[fc.Hessian], shared: fc.Objective) -> None:
    expected = kind(shared).to_dense()
    model, data = copy.deepcopy(shared.model), copy.deepcopy(list(shared.data))
    with default_device("meta"):
        A = kind(fc.Objective(model, nn.CrossEntropyLoss(), data))
        assert torch.equal(A.to_dense(), expected)
        assert fc.trace(A, method="exact").value == pytest.approx(float(expected.trace()), rel=1e-5)
        if kind is fc.GGN:
            estimate = fc.frobenius(A, method="gram")
            assert estimate.value == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_default_device_without_a_program(shared: fc.Objective) -> None:
    """Through autograd: products agree with the engine's to rounding."""
    expected = fc.Hessian(shared).to_dense()
    backend = AutogradBackend(shared, "asked for by this test", KeptMaps(0))
    V = torch.eye(expected.shape[0])
    with default_device("meta"):
        Y = torch.empty_like(V)
        backend.product("hessian", V, Y, shared.snapshot())
    assert (Y - expected).abs().max() <= 100 * torch.finfo(V.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))])
@pytest.mark.parametrize("kind", [fc.Hessian, fc.GGN, fc.GradientCovariance])
def test_copies(kind: type[fc.Hessian], copied: Callable[[Any], Any], shared: fc.Objective) -> None:
    """After a product too. A deep copy has a model of its own."""
    A = kind(shared)
    V = vectors(A)
    expected = A @ V
    B = copied(A)
    assert torch.equal(B @ V, expected)
    if copied is not copy.copy:
        with torch.no_grad():
            B.objective.model[0].weight.mul_(2)
        assert not torch.equal(B @ V, expected)
        assert torch.equal(A @ V, expected)
