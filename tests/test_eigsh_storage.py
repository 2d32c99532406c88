"""Where the basis is kept, how much of it, and what is locked: none of it changes the answer."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flatcore import _C, krylov_basis
from flatcore.eigsh import eigsh
from flatcore.krylov_basis import allocate_basis
from flatcore.linear import as_operator
from tests.spectra import Counting, eps, spread, wanted, with_spectrum

OUTLIERS = np.concatenate([np.linspace(4, 12, 12), -np.linspace(5, 9, 8), spread(380)])
HARD = np.linspace(-1, 1, 400) ** 3
STORAGES = ["full", "float16", "bf16", "file"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("values", [OUTLIERS, HARD], ids=["outliers", "hard"])
@pytest.mark.parametrize(
    ("which", "k", "block"), [("LM", 6, None), ("SA", 7, 3), ("BE", 4, 1), ("LA", 12, 4)]
)
def test_same_answer(
    storage: str, dtype: torch.dtype, values: np.ndarray, which: str, k: int, block: int | None
) -> None:
    """True residuals as asked, orthonormal vectors, every value, in a basis small enough to restart."""
    A = with_spectrum(values, dtype)
    tol = {"bf16": 8e-4, "float16": 1e-4}.get(storage, 2e-5)  # 16 bits hold no less for 400 rows
    counting = Counting(A)
    found = eigsh(
        counting,
        k,
        which=which,
        tol=tol,
        block_size=block,
        storage=storage,
        memory=300 * 400 * dtype.itemsize,
    )
    assert found.status == "converged"
    assert found.storage == storage
    assert counting.products == found.matvecs
    V, norm = found.vectors.double(), float(np.abs(values).max())
    true = (A.double() @ V - V * found.values).norm(dim=0)
    assert (true <= tol * found.scale + 32 * eps(dtype) * 20 * norm).all()
    assert (V.T @ V - torch.eye(k, dtype=torch.float64)).abs().max() <= 32 * eps(dtype) * 20
    found_values, true_values = found.values.numpy(), wanted(values, k, which)
    if which == "LM":  # values of both signs tie in the hard spectrum
        found_values, true_values = np.abs(found_values), np.abs(true_values)
    np.testing.assert_allclose(found_values, true_values, rtol=0, atol=2 * tol * norm)


@pytest.mark.parametrize("seed", [1, 5, 11, 36, 55, 83, 90])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_residuals_hardly_small_enough(dtype: torch.dtype, seed: int) -> None:
    """Pairs just below tol go on with the others: a rotation among them would lift one of them above it again."""
    A = with_spectrum(OUTLIERS, dtype)
    found = eigsh(A, 4, which="BE", tol=1e-4, block_size=1, storage="float16", seed=seed)
    assert found.status == "converged"


def test_full_and_file_agree_to_rounding() -> None:
    A = with_spectrum(OUTLIERS)
    full, file = (eigsh(A, 6, tol=1e-9, storage=storage) for storage in ("full", "file"))
    assert (full.matvecs, full.restarts) == (file.matvecs, file.restarts)
    assert torch.allclose(full.values, file.values, rtol=0, atol=1e-13)


class Watched:
    """A diagonal matrix that notes the resident size of the process at each product, in vectors."""

    def __init__(self, P: int) -> None:
        self.shape, self.dtype, self.device = (P, P), torch.float32, torch.device("cpu")
        self.d = torch.linspace(-0.9, 0.9, P)
        self.d[:5] = torch.arange(5) + 2.0
        self.sizes: list[float] = []

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        Y = (V.T * self.d).T
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / (4 * len(self.d)))
        return Y


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_pages_of_the_file_leave_the_process() -> None:
    """During a product there are its block and its result, of another such block at most what the allocator keeps, and
    nothing of the basis; at the true residuals nothing of the Ritz vectors either."""
    A = Watched(1_000_000)
    found = eigsh(A, 5, block_size=2, tol=1e-5, storage="file")
    assert found.status == "converged"
    assert found.matvecs > 25  # as many rows of a basis
    assert max(A.sizes) - A.sizes[0] <= 4
    np.testing.assert_allclose(found.values, [6, 5, 4, 3, 2], rtol=1e-5)


@pytest.mark.parametrize("storage", ["float16", "bf16"])
def test_rounded_rows_leave_what_slack_says(storage: str) -> None:
    """V A = T V + C Q + E, |E_i| about slack_i: rows of V and Q are those that are stored."""
    P, steps, block = 3000, 9, 3
    d = torch.from_numpy(spread(P))
    basis = allocate_basis(as_operator(torch.diag(d).float()), 4, block, 0, 1e-3, None, storage)
    for keep in (0, 8):
        V, T, C, Q, slack = _C.krylov.factorise(
            lambda X: X * d.float(), basis.head, basis.tail, basis.scale, block, steps, keep, 0, 0
        )
        V, Q = V.double(), Q.double()
        left_out = (V * d - T @ V - C @ Q).norm(dim=1)
        # The rows are orthogonal to about u / sqrt(P) only, which T does not know.
        u = 2.0**-11 if storage == "float16" else 2.0**-8
        unknown = float(d.abs().max()) * (len(V) / P) ** 0.5 * u
        stated = torch.tensor(slack)
        assert (left_out <= 2.5 * stated + unknown).all()
        assert (left_out >= 0.5 * stated).all()


def test_locked_rows() -> None:
    """Across a restart with locked rows: what is left out is at most what slack says, here nothing, since the residuals
    of the locked rows have joined the basis and T knows them."""
    values = np.concatenate([[9.0, 8.0], spread(198)])
    A = with_spectrum(values)
    head, tail = A.new_empty(80, 200), A.new_empty(0, 200)
    V, T, C, Q, slack = _C.krylov.factorise(lambda X: X @ A, head, tail, 1.0, 4, 12, 10, 3, 0)
    everything = torch.cat([V, Q])
    assert (everything @ everything.T - torch.eye(len(everything))).abs().max() <= 1e-13
    left_out = (V @ A - T @ V - C @ Q).norm(dim=1)
    assert (left_out <= 1e-12).all()
    coupling = T[:3, 3:].norm(dim=1)
    assert (coupling > 1e-6).all()
    np.testing.assert_allclose(slack, [*coupling, *[0] * (len(V) - 3)], rtol=1e-9)
    assert (V @ A @ V.T - T).abs().max() <= 1e-12


@pytest.mark.parametrize("which", ["LM", "LA", "BE"])
def test_many_pairs_in_little_memory(which: str) -> None:
    """More pairs than the basis has room for beside them: restarts lock, residuals stay true."""
    values = np.concatenate([4 + 1.05 ** np.arange(40), -4 - 1.05 ** np.arange(20), spread(440)])
    A = with_spectrum(values)
    k, block = 48, 2
    least = k + 6 * block
    memory = 500 * 8 * (least + 2 * k + 4 * block)
    with pytest.raises(ValueError, match=re.escape(f"memory: expected at least {memory:,} bytes for k = 48")):
        eigsh(A, k, block_size=block, memory=memory - 4000, storage="full")
    found = eigsh(
        A, k, which=which, block_size=block, memory=memory, storage="full", tol=1e-7, max_matvecs=20000
    )
    assert found.status == "converged"
    assert found.basis_rows == least
    assert found.restarts > 10
    true = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (true <= 1e-7 * found.scale * (1 + 1e-6)).all()
    np.testing.assert_allclose(
        np.sort(found.values.abs()), np.sort(np.abs(wanted(values, k, which))), atol=1e-6
    )


def test_choice() -> None:
    """Full precision where it has room, then 16 bits where they hold tol, else a file."""
    P, k, block = 10_000, 4, 4
    operator = as_operator(torch.zeros(1, 1).expand(P, P))
    work, row = 2 * k + 4 * block, 4 * P

    def chosen(rows: float, tol: float = 1e-3) -> tuple[str, int]:
        basis = allocate_basis(operator, k, block, 0, tol, int((work + rows) * row), None)
        return basis.storage, basis.rows

    assert chosen(100) == ("full", 64)
    assert chosen(40) == ("full", 40)
    assert chosen(30) == ("float16", 4 + 2 * 26)
    assert chosen(30, tol=1e-6) == ("full", 30)
    assert chosen(10) == ("file", 64)
    assert chosen(0) == ("file", 64)
    with pytest.raises(ValueError, match=r"memory: expected at least .* and storage 'file', got"):
        chosen(-1)


def test_the_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    basis = allocate_basis(as_operator(torch.eye(50)), 3, 3, 0, 1e-3, None, "file")
    assert basis.tail.shape == (50, 50)
    basis.tail.fill_(1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(krylov_basis.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9999))
    with pytest.raises(ValueError, match=r"storage: expected 11,200 bytes free in .*, found 9,999.*TMPDIR"):
        eigsh(torch.eye(50), 3, storage="file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "disk"}, "storage: expected one of full, float16, bf16, host, file"),
        ({"storage": "host"}, "storage: expected an operator on another device"),
        (
            {"storage": "bf16", "tol": 1e-5},
            "storage: expected tol of 7.8e-04 or more for 'bf16' with P = 400",
        ),
        (
            {"storage": "float16", "k": 30},
            "storage: expected P >= 528, four times the basis, for 'float16', got P = 400",
        ),
        ({"memory": 0}, "memory: expected at least 1"),
        ({"memory": 1000}, "memory: expected at least .* bytes for k = 6 in blocks of 2 with P = 400"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eigsh(with_spectrum(OUTLIERS), **arguments)
