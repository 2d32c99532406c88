"""Eigenpairs of all diagonal blocks at once, against dense eigensolvers of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import flatcore as fc
from flatcore.block_spectra import block_spectra
from flatcore.errors import FlatcoreWarning

WHICH = ["LM", "LA", "SA", "BE"]
DTYPES = [torch.float64, torch.float32]


class WithSlices:
    def __init__(self, A: torch.Tensor, slices: dict[str, slice], bad: int = 10**9) -> None:
        self.A, self.parameter_slices, self.products, self.bad, self.calls = A, slices, 0, bad, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.products += V.shape[1]
        self.calls += 1
        Y = self.A @ V
        if self.calls >= self.bad:
            Y[0, 0] = float("nan")
        return Y


def wanted(values: np.ndarray, k: int, which: str) -> np.ndarray:
    values = np.sort(values)
    k = min(k, len(values))
    if which == "LM":
        return values[np.argsort(-np.abs(values), kind="stable")][:k]
    if which == "LA":
        return values[::-1][:k]
    if which == "SA":
        return values[:k]
    return np.concatenate([values[: k // 2], values[len(values) - (k - k // 2) :]])


def blocks(dtype: torch.dtype) -> WithSlices:
    """Blocks of all kinds, coupled by noise that no block may see."""
    rng = np.random.default_rng(0)
    spectra = {
        "single": np.array([-3.0]),
        "pair": np.array([2.0, -1.0]),
        "random": rng.standard_normal(40),
        "zero": np.zeros(12),
        "identity": np.ones(9),
        "rank 3": np.concatenate([[5.0, -4.0, 3.0], np.zeros(27)]),
        "copies": np.concatenate([[7.0, 7.0, 7.0], np.ones(17)]),
        "large": 1e4 * rng.standard_normal(30),
        "small": 1e-4 * rng.standard_normal(30),
    }
    P = sum(map(len, spectra.values()))
    A = rng.standard_normal((P, P))
    A, first, slices = A + A.T, 0, {}
    for name, values in spectra.items():
        n = len(values)
        Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        B = (Q * values) @ Q.T
        A[first : first + n, first : first + n] = (B + B.T) / 2
        slices[name] = slice(first, first + n)
        first += n
    return WithSlices(torch.from_numpy(A).to(dtype), slices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("k", "width"), [(1, 8), (3, 2), (5, 20)])
def test_every_block(k: int, width: int, which: str, dtype: torch.dtype) -> None:
    operator = blocks(dtype)
    tol = 1e-8 if dtype == torch.float64 else 1e-4
    found = block_spectra(operator, k, which=which, tol=tol, block_size=width)
    assert found.status == "converged"
    assert found.matvecs == operator.products
    assert list(found.by_parameter) == list(operator.parameter_slices)
    assert (
        sum(pairs.matvecs for pairs in found.by_parameter.values()) == found.matvecs - 2
    )  # the symmetry test
    for name, part in operator.parameter_slices.items():
        B, pairs = operator.A[part, part].double(), found[name]
        size = float(torch.linalg.matrix_norm(B, 2))
        n = len(B)
        allowed = max(tol, 8 * torch.finfo(dtype).eps * n**0.5) * size
        true = wanted(torch.linalg.eigvalsh(B).numpy(), k, which)
        got = pairs.values.numpy()
        if which == "LM":  # of equal size and opposite sign, either may come first
            true, got = np.abs(true), np.abs(got)
        np.testing.assert_allclose(got, true, rtol=0, atol=2 * allowed + 1e-300)
        V = pairs.vectors.double()
        rounding = 32 * torch.finfo(dtype).eps * n**0.5
        assert (V.T @ V - torch.eye(min(k, n), dtype=torch.float64)).abs().max() <= rounding
        residuals = (B @ V - V * pairs.values).norm(dim=0)
        # The products also have the noise of the other blocks' rounding: none, for these rows are zero there.
        assert (residuals - pairs.residuals).abs().max() <= rounding * size + 1e-300
        assert pairs.converged.all()


def test_against_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = (torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,)))
    H = fc.Hessian(fc.Objective(model, nn.functional.cross_entropy, data))
    dense = H.to_dense()
    found = block_spectra(H, 4, tol=1e-8)
    assert found.status == "converged"
    for name, part in H.parameter_slices.items():
        true = wanted(torch.linalg.eigvalsh(dense[part, part]).numpy(), 4, "LM")
        scale = np.abs(true).max()
        np.testing.assert_allclose(found[name].values.numpy(), true, rtol=0, atol=2e-8 * scale)


def test_products_stop_with_the_blocks() -> None:
    """A block that has converged costs nothing more."""
    rng = np.random.default_rng(0)
    easy = np.diag(np.concatenate([[100.0], np.full(99, 1.0)]))
    A = np.zeros((200, 200))
    A[:100, :100] = easy
    A[100:, 100:] = np.diag(np.linspace(-1, 1, 100) + 1e-3 * rng.standard_normal(100))
    found = block_spectra(
        WithSlices(torch.from_numpy(A), {"easy": slice(0, 100), "hard": slice(100, 200)}), 2, tol=1e-6
    )
    assert found["easy"].matvecs < found["hard"].matvecs / 2
    assert found.matvecs == found["easy"].matvecs + found["hard"].matvecs + 2


def test_not_converged_is_said() -> None:
    A = torch.diag(torch.linspace(-1, 1, 300, dtype=torch.float64))
    operator = WithSlices(A, {"first": slice(0, 2), "all the rest": slice(2, 300)})
    with pytest.warns(FlatcoreWarning, match="1 of 2 blocks .* 'all the rest'; raise max_steps or tol"):
        found = block_spectra(operator, 3, tol=1e-9, max_steps=12)
    assert found["first"].status == "converged"
    assert not found["all the rest"].converged.all()
    true = (
        A[2:, 2:] @ found["all the rest"].vectors
        - found["all the rest"].vectors * found["all the rest"].values
    )
    assert torch.allclose(true.norm(dim=0), found["all the rest"].residuals, atol=1e-13)


def test_same_seed_same_bits() -> None:
    one, two, other = (block_spectra(blocks(torch.float32), 2, seed=s) for s in (1, 1, 2))
    assert torch.equal(one["random"].vectors, two["random"].vectors)
    assert not torch.equal(one["random"].vectors, other["random"].vectors)


def test_not_symmetric_and_not_finite() -> None:
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 50)))
    slices = {"a": slice(0, 20), "b": slice(20, 50)}
    with pytest.raises(ValueError, match="A: expected a symmetric operator"):
        block_spectra(WithSlices(A, slices))
    with pytest.raises(ValueError, match=r"not finite .* in product 5;"):
        block_spectra(WithSlices(A + A.T, slices, bad=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected at least 1"),
        ({"which": "SM"}, "which: expected one of LM, LA, SA, BE, got 'SM'"),
        ({"tol": -1}, "tol: expected a positive"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"max_steps": 2, "k": 3}, "max_steps: expected at least k = 3"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_spectra(blocks(torch.float64), **arguments)


def test_needs_slices() -> None:
    with pytest.raises(ValueError, match=r"parameter_slices .* got Tensor without"):
        block_spectra(torch.eye(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_nothing_but_rounding(dtype: torch.dtype) -> None:
    """As of the keys' bias in attention: its own block is zero, its products with the rest are not."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((30, 30))
    A = torch.tensor(A + A.T).to(dtype)
    noise = torch.tensor(rng.standard_normal((12, 12))).to(dtype) * torch.finfo(dtype).eps
    A[:12, :12] = noise  # not symmetric
    slices = {"rounding": slice(0, 12), "other": slice(12, 30)}
    found = block_spectra(WithSlices(A, slices), k=2)
    assert found.status == "converged"
    assert found["rounding"].values.tolist() == [0.0, 0.0]
    expected = wanted(np.linalg.eigvalsh(A[12:, 12:].double().numpy()), 2, "LM")
    # An eigenvalue is as near as the residual, a thousandth of the largest.
    assert np.abs(found["other"].values.numpy() - expected).max() <= 1e-3 * abs(expected[0])
    assert list(found) == ["rounding", "other"] and len(found) == 2 and "bias" not in found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_block_stays(dtype: torch.dtype) -> None:
    """Far below the rounding of whole rows, but symmetric: of a layer that hardly counts, with all its digits."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((30, 30))
    sides = np.where(np.arange(30) < 12, 0.1 * torch.finfo(dtype).eps, 1.0)
    A = torch.tensor((A + A.T) * sides * sides[:, None]).to(dtype)
    found = block_spectra(WithSlices(A, {"small": slice(0, 12), "other": slice(12, 30)}), k=2)
    assert found.status == "converged"
    for pairs, block in zip(found.by_parameter.values(), (A[:12, :12], A[12:, 12:]), strict=True):
        expected = wanted(np.linalg.eigvalsh(block.double().numpy()), 2, "LM")
        # An eigenvalue is as near as the residual, a thousandth of the largest.
        assert np.abs(pairs.values.numpy() - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_block_that_is_not_symmetric_is_refused() -> None:
    rng = np.random.default_rng(0)
    A = torch.tensor(rng.standard_normal((30, 30)))
    A = A + A.T
    A[0, 5] += 1.0
    with pytest.raises(ValueError, match=r"^A.*symmetric"):
        block_spectra(WithSlices(A, {"one": slice(0, 12), "two": slice(12, 30)}))


def test_an_attention_with_a_bias_of_its_keys() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return y.mean(1)

    data = (torch.randn(5, 3, 4), torch.randint(4, (5,)))
    H = fc.Hessian(fc.Objective(Attention(), nn.CrossEntropyLoss(), data))
    found = fc.block_spectra(H, k=1)
    assert found.status == "converged"
    # What counts as rounding: 8 eps |A x|, x of length one.
    norm = float(torch.linalg.matrix_norm(H.to_dense(), 2))
    assert float(found["k.bias"].values.abs()) <= 8 * torch.finfo(torch.float32).eps * norm
