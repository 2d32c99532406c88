"""Trace and diagonal with a part of the operator known from given vectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_trace_estimators import METHODS, WithSlices, spectra, with_spectrum

from flatcore.eigsh import eigsh
from flatcore.errors import FlatcoreWarning
from flatcore.trace import diagonal, trace


@pytest.mark.parametrize("method", METHODS)
def test_deflation(method: str) -> None:
    """The known part is exact whatever the pairs: 8 outliers deflated leave an easy rest, rough pairs and
    random vectors leave an unbiased estimate."""
    A = with_spectrum(spectra(300)["outliers"])
    truth = float(A.trace())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        rough = eigsh(A, 8, tol=0.3, max_matvecs=40)
    without = trace(A, method="hutchinson", rtol=0.02).matvecs
    for vectors in (rough, torch.linalg.eigh(A).eigenvectors[:, -8:]):
        operator = WithSlices(A, {"a": slice(0, 200), "b": slice(200, 300)})
        found = trace(operator, method=method, rtol=0.02, deflate=vectors)
        assert found.matvecs == operator.products < without / 4
        assert abs(found.value - truth) <= 4 * found.stderr
        assert abs(sum(p.value for p in found.by_parameter.values()) - found.value) <= 1e-9 * truth
        diag = diagonal(A, method=method, rtol=0.05, deflate=vectors)
        assert (diag.value - A.diag()).norm() <= 4 * diag.stderr.norm()
    arbitrary = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 4)))
    found = trace(A, method=method, rtol=0.05, deflate=arbitrary, max_matvecs=5000)
    assert abs(found.value - truth) <= 4 * found.stderr


def test_deflation_is_unbiased() -> None:
    A, truth = with_spectrum(spectra(200)["slow"]), spectra(200)["slow"].sum()
    wrong = torch.linalg.eigh(A).eigenvectors[:, -4:] + 0.05
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        for seed in range(200):
            one = trace(A, method="hutchinson", deflate=wrong, rtol=1e-9, max_matvecs=20, seed=seed)
            found.append(one)
    errors = np.array([f.value - truth for f in found])
    assert abs(errors.mean()) <= 4 * errors.std() / 200**0.5
    assert np.mean(np.abs(errors) <= [2 * f.stderr for f in found]) >= 0.9 - 0.042


def test_low_rank_deflated_is_exact() -> None:
    A = with_spectrum(spectra(300)["rank 5"])
    found = trace(A, method="hutchinson", deflate=eigsh(A, 5, tol=1e-10))
    assert found.matvecs == 5 + 16
    assert abs(found.value - 15) <= 1e-9
    assert found.stderr <= 1e-9


@pytest.mark.parametrize(
    ("deflate", "error", "message"),
    [
        ([1, 2], TypeError, "deflate: expected Eigenpairs or a tensor"),
        (
            torch.ones(99, 2),
            ValueError,
            r"deflate: expected vectors of shape \(300, k\) with 1 <= k <= 150, got",
        ),
        (torch.ones(300, 151), ValueError, "deflate: expected vectors of shape"),
        (torch.full((300, 1), float("inf")), ValueError, "deflate: expected finite vectors"),
        (torch.ones(300, 40), ValueError, "max_matvecs: expected more than the 40 products"),
    ],
)
def test_deflate_refused(deflate: object, error: type[Exception], message: str) -> None:
    A = with_spectrum(spectra(300)["slow"])
    with pytest.raises(error, match=message):
        trace(A, deflate=deflate, max_matvecs=40)
    with pytest.raises(ValueError, match="return_eigenvectors=True"):
        trace(A, deflate=eigsh(A, 2, return_eigenvectors=False))
