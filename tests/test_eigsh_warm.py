"""Warm starts and drafts: they decide how many products a search needs, never what it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flatcore.eigsh import eigsh
from flatcore.errors import FlatcoreWarning
from flatcore.results import Eigenpairs
from tests.spectra import Counting, spread, wanted, with_spectrum

OUTLIERS = np.concatenate([np.linspace(4, 12, 12), -np.linspace(5, 9, 8), spread(380)])
# Products to look for what a warm start misses, where the wanted values stand apart: two random vectors, 3 to 12 steps.
LOOK = 24


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "block"), [(1, None), (6, None), (8, 2)])
def test_from_the_answer(which: str, dtype: torch.dtype, k: int, block: int | None) -> None:
    """Each start vector once, the look, each answer once."""
    A = Counting(with_spectrum(OUTLIERS, dtype))
    cold = eigsh(A, k, which=which, tol=1e-4, block_size=block)
    before = A.products
    warm = eigsh(A, k, which=which, tol=1e-4, block_size=block, v0=cold)
    assert A.products - before == warm.matvecs
    assert 2 * k + 6 <= warm.matvecs <= 2 * k + LOOK
    assert warm.status == "converged"
    np.testing.assert_allclose(warm.values, wanted(OUTLIERS, k, which), rtol=0, atol=1e-4 * 12)


FORMS: dict[str, Callable[[Eigenpairs, torch.Tensor], object]] = {
    "vector": lambda pairs, basis: pairs.vectors[:, 0],
    "few": lambda pairs, basis: pairs.vectors[:, :3],
    "pairs": lambda pairs, basis: pairs,
    "numpy": lambda pairs, basis: pairs.vectors.numpy(),
    "more than wanted": lambda pairs, basis: torch.cat([basis[:, 50:80], pairs.vectors], dim=1),
    "most of the space": lambda pairs, basis: basis[:, :390],
    "mixed": lambda pairs, basis: pairs.vectors @ torch.randn(6, 6, dtype=torch.float64).add(torch.eye(6)),
    "dependent": lambda pairs, basis: torch.cat([pairs.vectors, pairs.vectors[:, :2]], dim=1),
    "tiny": lambda pairs, basis: 1e-200 * pairs.vectors,
    "zero": lambda pairs, basis: torch.zeros(400, 3, dtype=torch.float64),
    "noise": lambda pairs, basis: torch.randn(400, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [2, None])
def test_any_start_gives_the_same_answer(form: str, block: int | None) -> None:
    torch.manual_seed(0)
    A = with_spectrum(OUTLIERS)
    cold = eigsh(A, 6, tol=1e-7)
    start = FORMS[form](cold, torch.linalg.eigh(A).eigenvectors)
    found = eigsh(A, 6, tol=1e-7, v0=start, block_size=block)  # type: ignore[arg-type]
    assert found.status == "converged"
    np.testing.assert_allclose(found.values, wanted(OUTLIERS, 6, "LM"), rtol=0, atol=1e-6)
    if form in ("pairs", "numpy", "mixed", "dependent", "tiny"):
        assert found.matvecs <= 14 + LOOK


SPECTRA = {
    "outliers": OUTLIERS,
    "even": np.linspace(-1, 1, 400),
    "cubic": np.linspace(-1, 1, 400) ** 3,
    "copies": np.concatenate([np.full(5, 3.0), np.full(3, -2.5), spread(392)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_what_the_start_misses_is_found(name: str, which: str, missing: int) -> None:
    """A start of true eigenvectors, each converged, but one that is wanted is not among them."""
    values = SPECTRA[name]
    A = with_spectrum(values)
    exact, vectors = torch.linalg.eigh(A)
    order = exact.argsort(descending=True)
    start = vectors[:, [int(i) for j, i in enumerate(order[:7]) if j != missing]]
    found = eigsh(A, 4, which=which, tol=1e-6, v0=start)
    np.testing.assert_allclose(
        found.values, wanted(values, 4, which), rtol=0, atol=2e-6 * np.abs(values).max()
    )


def test_follows_a_changing_operator() -> None:
    """Pairs of a nearby matrix: the new answer, with fewer products unless k is far above the block: each residual is a
    direction of its own then, where a search from nothing has one Krylov space for all. So in narrow
    blocks a search from nothing is hard to beat."""
    A = with_spectrum(OUTLIERS)
    change = with_spectrum(0.02 * spread(400), seed=3)
    for k, block, tol in [(6, 8, 1e-5), (16, 4, 1e-6)]:
        before = eigsh(A, k, tol=tol, block_size=block)
        cold, warm = (eigsh(A + change, k, tol=tol, block_size=block, v0=v0) for v0 in (None, before))
        assert warm.matvecs < 0.8 * cold.matvecs or k == 16
        np.testing.assert_allclose(warm.values, cold.values, rtol=0, atol=2 * tol * 12)


def test_draft() -> None:
    """The matrix in bfloat16 first: its products are counted apart, A in blocks of eight needs fewer, and finishes
    at its own tol."""
    A = with_spectrum(OUTLIERS, torch.float32)
    exact, draft = Counting(A), Counting(A.bfloat16().float())
    cold = eigsh(A, 6, tol=1e-5, block_size=8)
    found = eigsh(exact, 6, tol=1e-5, draft=draft, block_size=8)
    assert found.status == "converged"
    assert (found.matvecs, found.draft_matvecs) == (exact.products, draft.products)
    assert found.matvecs < 0.8 * cold.matvecs
    true = (A.double() @ found.vectors.double() - found.vectors.double() * found.values).norm(dim=0)
    assert (true <= 1.1e-5 * 12).all()
    same = eigsh(A, 6, tol=1e-4, draft=A.double())
    assert same.matvecs <= 12 + LOOK
    assert same.vectors.dtype == torch.float32


@pytest.mark.parametrize("kind", ["other", "zero", "identity", "negative", "not symmetric", "nan"])
def test_useless_draft(kind: str) -> None:
    """The answer does not depend on it; what cannot be searched is said and left out."""
    A = with_spectrum(OUTLIERS)
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((400, 400)))
    draft = {
        "other": with_spectrum(spread(400, 5), seed=9),
        "zero": torch.zeros_like(A),
        "identity": torch.eye(400, dtype=torch.float64),
        "negative": -A,
        "not symmetric": noise,
        "nan": A * torch.nan,
    }[kind]
    if kind in ("not symmetric", "nan"):
        with pytest.warns(FlatcoreWarning, match="the draft is of no use: .*step [12]"):
            found = eigsh(A, 6, which="LA", tol=1e-7, draft=draft)
    else:
        found = eigsh(A, 6, which="LA", tol=1e-7, draft=draft)
    np.testing.assert_allclose(found.values, wanted(OUTLIERS, 6, "LA"), rtol=0, atol=2e-6)
    assert found.status == "converged"


class Failing(Counting):
    """Its third product fails."""

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        if self.products >= 4:
            raise RuntimeError("out of luck\nand of words")
        return super().__matmul__(V)


class Widening(Counting):
    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().__matmul__(V)] * 2)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Failing, "RuntimeError: out of luck$"),
        (Widening, r"ValueError: draft: expected draft @ V of shape \(400"),
    ],
)
def test_a_draft_that_raises_is_left_out(kind: type[Counting], said: str) -> None:
    A = with_spectrum(OUTLIERS)
    alone = eigsh(A, 6, which="LA", tol=1e-7)
    with pytest.warns(FlatcoreWarning, match=f"eigsh: the draft is of no use: its product raised {said}"):
        found = eigsh(A, 6, which="LA", tol=1e-7, draft=kind(A))
    assert torch.equal(found.values, alone.values)
    # What is wrong with A is an error still.
    with pytest.raises(ValueError if kind is Widening else RuntimeError):
        eigsh(kind(A), 6, draft=A, v0=None)


def test_refused() -> None:
    A = with_spectrum(OUTLIERS)
    pairs = dataclasses.replace(eigsh(A, 2), vectors=None)
    with pytest.raises(ValueError, match="v0: expected Eigenpairs with vectors"):
        eigsh(A, 2, v0=pairs)
    with pytest.raises(ValueError, match=r"draft: expected an operator of shape \(400, 400\)"):
        eigsh(A, 2, draft=A[:5, :5])
    with pytest.raises(TypeError, match=r"draft: expected an operator with .shape"):
        eigsh(A, 2, draft="bf16")
    with pytest.raises(TypeError, match=r"draft: expected dtype float32 or float64"):
        eigsh(A, 2, draft=A.half())
    with pytest.raises(ValueError, match=r"max_matvecs: expected at least .* from 3 start vectors"):
        eigsh(A, 2, v0=torch.randn(400, 3), max_matvecs=6)
