"""Long searches: killed and taken up again, interrupted, fed with what is no number."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from flatcore import krylov_checkpoint
from flatcore.eigsh import eigsh
from flatcore.errors import FlatcoreWarning
from flatcore.results import Eigenpairs
from tests.spectra import Counting, wanted, with_spectrum

VALUES = np.linspace(-1, 1, 300) ** 3
ARGUMENTS = {"k": 5, "which": "LA", "tol": 1e-7, "block_size": 3, "memory": 300 * 8 * 58}


class Ending(Counting):
    """``at`` comes up in place of a product, once: an exception, or a number that is none."""

    def __init__(self, A: torch.Tensor, at: int, what: BaseException | float) -> None:
        super().__init__(A)
        self.at, self.what, self.calls = at, what, 0

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        W = super().__matmul__(V)
        if self.calls == self.at:
            if isinstance(self.what, BaseException):
                raise self.what
            W[11, 0] = self.what
        return W


SCRIPT = """
    import os, signal, sys
    import torch
    from flatcore import krylov_checkpoint
    from flatcore.eigsh import eigsh
    from tests.spectra import Counting, with_spectrum
    from tests.test_eigsh_long import ARGUMENTS, VALUES

    torch.set_num_threads(1)
    krylov_checkpoint.SECONDS, krylov_checkpoint.SHARE = 0.0, float("inf")

    class Dying(Counting):
        def __matmul__(self, V):
            if self.products > int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__matmul__(V)

    arguments = {**ARGUMENTS, "storage": sys.argv[3], "tol": float(sys.argv[4])}
    eigsh(Dying(with_spectrum(VALUES)), checkpoint=sys.argv[1], **arguments)
"""


@pytest.mark.parametrize(("storage", "tol"), [("full", 1e-7), ("file", 1e-7), ("float16", 1.2e-4)])
def test_killed_and_taken_up(tmp_path: Path, storage: str, tol: float) -> None:
    """A process killed in the middle of a product: the next one ends with the bits of a search that was left alone."""
    path = tmp_path / "search"
    A = with_spectrum(VALUES)
    arguments = {**ARGUMENTS, "storage": storage, "tol": tol}
    alone = eigsh(Counting(A), **arguments)
    assert alone.restarts > 1
    deaths = 2 if storage == "full" else 1
    for after in (alone.matvecs // 3, alone.matvecs // 4)[:deaths]:  # of the rest, the second time
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path), str(after), storage, str(tol)]
        died = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert path.exists()
    rest = Counting(A)
    found = eigsh(rest, checkpoint=path, **arguments)
    assert torch.equal(found.values, alone.values)
    assert torch.equal(found.vectors, alone.vectors)
    assert torch.equal(found.residuals, alone.residuals)
    assert found.restarts == alone.restarts
    # One product each time shows that the operator is the same.
    assert found.matvecs == alone.matvecs + deaths
    assert rest.products < 0.75 * alone.matvecs
    assert list(tmp_path.iterdir()) == []


def interrupted(at: int, **arguments: object) -> tuple[Eigenpairs, Ending]:
    A = Ending(with_spectrum(VALUES), at, KeyboardInterrupt())
    with pytest.warns(FlatcoreWarning, match="interrupted after"):
        return eigsh(A, **{**ARGUMENTS, **arguments}), A


@pytest.mark.parametrize("at", [2, 3, 9, 40])
def test_interrupt_gives_what_there_is(at: int) -> None:
    found, A = interrupted(at)
    n = len(found.values)
    assert n == min(5, 3 * (at - 1))
    assert found.status.startswith(
        f"interrupted after {found.matvecs} products with {int(found.converged.sum())} of 5"
    )
    assert ("exist so far" in found.status) == (n < 5)
    assert A.products - 3 == found.matvecs
    true = (A.A @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(true, found.residuals, rtol=1e-6, atol=1e-13)
    assert torch.equal(found.converged, true <= 1e-7 * found.scale)
    assert at < 40 or (0 < int(found.converged.sum()) < 5)
    again = eigsh(A, v0=found, **ARGUMENTS)
    np.testing.assert_allclose(again.values, wanted(VALUES, 5, "LA"), rtol=0, atol=1e-7)


def test_interrupt_before_anything() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(1)


def test_interrupt_writes_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "search"
    interrupted(12, checkpoint=path)
    A = Counting(with_spectrum(VALUES))
    alone, found = eigsh(A, **ARGUMENTS), eigsh(A, checkpoint=path, **ARGUMENTS)
    assert torch.equal(found.vectors, alone.vectors)
    assert not path.exists()


def test_out_of_products_goes_on_with_more(tmp_path: Path) -> None:
    path = tmp_path / "search"
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
        eigsh(with_spectrum(VALUES), checkpoint=path, max_matvecs=60, **ARGUMENTS)
    found = eigsh(with_spectrum(VALUES), checkpoint=path, **ARGUMENTS)
    assert found.status == "converged"
    np.testing.assert_allclose(found.values, wanted(VALUES, 5, "LA"), rtol=0, atol=1e-7)


def test_real_interrupt() -> None:
    """The signal itself, while C++ is at work: the product is a bound function of torch."""

    class Alarming(Counting):
        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            if self.products >= 30:  # again if it struck in a destructor, which swallows it
                os.kill(os.getpid(), signal.SIGINT)
            return super().__matmul__(V)

    # A process started in the background by a shell ignores the signal, and Python leaves that as it is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(FlatcoreWarning, match="interrupted after"):
            found = eigsh(Alarming(with_spectrum(VALUES)), **ARGUMENTS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(found.values) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "expected a search with k = 4, found one with 5"),
        ({"tol": 1e-6}, "with tol = 1e-06"),
        ({"which": "SA"}, "with which = SA"),
        ({"seed": 1}, "with seed = 1"),
        ({"block_size": 2}, "with block_size = 2"),
        ({"v0": torch.ones(300)}, "with v0 = "),
        ({"A": with_spectrum(VALUES, torch.float32)}, "with dtype = torch.float32"),
        ({"A": with_spectrum(VALUES, seed=1)}, "is of another operator"),
        ({"A": 1.001 * with_spectrum(VALUES)}, "is of another operator"),
        ({"storage": "file"}, "with storage = file"),
    ],
)
def test_checkpoint_of_another_search(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "search"
    interrupted(12, checkpoint=path)
    A = change.pop("A", with_spectrum(VALUES))
    with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
        eigsh(A, checkpoint=path, **{**ARGUMENTS, **change})


def test_no_checkpoint(tmp_path: Path) -> None:
    A = with_spectrum(VALUES)
    path = tmp_path / "search"
    for content in (b"", b"something else\n", path):
        if isinstance(content, bytes):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="found another file"):
                eigsh(A, checkpoint=path, **ARGUMENTS)
    path.unlink()
    interrupted(12, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is cut off"):
        eigsh(A, checkpoint=path, **ARGUMENTS)
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        eigsh(A, checkpoint=tmp_path / "nowhere" / "search", **ARGUMENTS)
    with pytest.raises(TypeError, match="checkpoint: expected a path, got int"):
        eigsh(A, checkpoint=3, **ARGUMENTS)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search"
    monkeypatch.setattr(krylov_checkpoint, "SECONDS", 0.0)
    interrupted(12, checkpoint=path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flatcore.krylov_checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        eigsh(with_spectrum(VALUES), checkpoint=path, **ARGUMENTS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_progress_shows_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr("flatcore.progress.Bar.update", lambda self, n, text="": texts.append(f"{n}: {text}"))
    found = eigsh(with_spectrum(VALUES), draft=with_spectrum(VALUES), **ARGUMENTS)
    drafted = [text for text in texts if ": draft: " in text]
    assert 0 < len(drafted) < len(texts)
    pattern = (
        r"(\d+): (draft: )?\1 products, ([0-5]) of 5 converged, residuals up to \d\.\de[+-]\d\d, wanted 1e-07"
    )
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert int(texts[-1].split(":")[0]) < found.matvecs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize(("at", "step", "products"), [(1, 1, 0), (4, 4, 9)])
def test_no_number_is_located(value: float, at: int, step: int, products: int) -> None:
    said = f"not finite.* in step {step}, after {products} products"
    if at == 1 and value == 1e200:
        said = "whose squares are lost in float64"
    with pytest.raises(ValueError, match=said):
        eigsh(Ending(with_spectrum(VALUES), at, value), **ARGUMENTS)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", ["random", "one block", "skew part"])
def test_missing_symmetry_is_noticed_at_once(kind: str, block: int) -> None:
    """Within the second step's products, also where it is slight and the rows are many."""
    P = 1000
    rng = np.random.default_rng(0)
    A = with_spectrum(rng.standard_normal(P))
    if kind == "random":
        A = torch.from_numpy(rng.standard_normal((P, P)))
    elif kind == "one block":
        A[:100, :100] = A[:100, :100].triu()
    else:
        skew = torch.from_numpy(rng.standard_normal((P, P)))
        A = A + 0.02 * (skew - skew.T) / P**0.5
    counting = Counting(A)
    with pytest.raises(ValueError, match=r"A is not symmetric.*It came up in step"):
        eigsh(counting, 3, block_size=block)
    assert counting.products <= 2 * block
