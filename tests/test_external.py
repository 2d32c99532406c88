"""Operations without a rule: run one by one through torch autograd inside the native program, right and said."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from external_models import ROWWISE, TOGETHER, Around, Dense, Once, Square, built
from torch import Tensor, nn

import flatcore as fc
from flatcore.capture.external import External
from flatcore.errors import FlatcoreWarning

TOLERANCE = 1e-9
Function = Callable[[Tensor, Tensor], Tensor]


def operator_of(kind: type, model: nn.Module, loss: Callable[..., Tensor], batch: object, **options: object) -> fc.Hessian:
    """The operator with its program made, and what it said of it left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        A = kind(fc.Objective(model, loss, batch), **options)
        A.plan()
    return A


def assert_equals(A: fc.Hessian, dense: Tensor, tolerance: float = TOLERANCE) -> None:
    assert dense.norm() > 1e-6
    for K in (1, 3):
        V = torch.randn(A.shape[0], K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
        expected = dense @ V
        assert ((A @ V.to(A.dtype)).double() - expected).norm() <= tolerance * expected.norm()


def is_partly_native(A: fc.Hessian) -> bool:
    plan = A.plan()
    return plan.backend == "native" and 0 < plan.native_fraction < 1


@pytest.mark.parametrize("name", [*ROWWISE, *TOGETHER])
def test_hessian(name: str) -> None:
    model, batch = built({**ROWWISE, **TOGETHER}[name])
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert is_partly_native(H) or name in ("bilinear", "cosine_similarity")
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())


@pytest.mark.parametrize("name", [*ROWWISE, *TOGETHER])
def test_ggn(name: str) -> None:
    model, batch = built({**ROWWISE, **TOGETHER}[name])
    G = operator_of(fc.GGN, model, F.cross_entropy, batch)
    assert is_partly_native(G) or name in ("bilinear", "cosine_similarity")
    assert_equals(G, Dense(model, F.cross_entropy, batch).ggn())


@pytest.mark.parametrize("name", ROWWISE)
def test_gradient_covariance(name: str) -> None:
    model, batch = built(ROWWISE[name])
    C = operator_of(fc.GradientCovariance, model, F.cross_entropy, batch, centered=False)
    assert is_partly_native(C) or name in ("bilinear", "cosine_similarity")
    assert_equals(C, Dense(model, F.cross_entropy, batch).covariance())
