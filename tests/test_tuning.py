"""Which library multiplies: the same numbers from each, and what is remembered between processes."""

import atexit
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatcore import tuning
from flatcore._C import engine
from flatcore.errors import FlatcoreWarning

# More threads than any machine has: no product of these tests is of this class.
CLASS = "1 64 64 64 0 1 100000"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    yield
    engine.set_gemm_policy("blas")


# --- products ---


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


# How an operand of a shape may lie in memory.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "dense": random,
    "transposed": lambda *s, dtype: random(*s[:-2], s[-1], s[-2], dtype=dtype).mT,
    "rows apart": lambda *s, dtype: random(*s[:-1], s[-1] + 3, dtype=dtype)[..., 1:-2],
    "columns apart": lambda *s, dtype: random(*s[:-2], s[-1], s[-2] + 3, dtype=dtype)[..., 1:-2].mT,
    "every second": lambda *s, dtype: random(*s[:-1], 2 * s[-1], dtype=dtype)[..., ::2],
    "one row": lambda *s, dtype: random(1, s[-1], dtype=dtype).expand(s),
    "one column": lambda *s, dtype: random(s[-2], 1, dtype=dtype).expand(s),
    "one element": lambda *s, dtype: random(1, 1, dtype=dtype).expand(s),
    "one matrix": lambda *s, dtype: random(*s[-2:], dtype=dtype).expand(s),
    "overlapping": lambda *s, dtype: random(s[-1] + s[-2] - 1, dtype=dtype).unfold(0, s[-1], 1).expand(s),
}
RESULTS = ("dense", "rows apart")
# From 2^20 multiply-adds on there is a choice.
SIZES = {
    "large": (128, 96, 160),
    "one row": (1, 1030, 1030),
    "one column": (1030, 1, 1030),
    "outer": (1030, 1030, 1),
    "small": (5, 3, 4),
    "no inner": (5, 3, 0),
    "no rows": (0, 3, 4),
    "no columns": (5, 0, 4),
}


def check(a: Tensor, b: Tensor, result: str, accumulate: bool) -> None:
    """The bound of a sum of n products: n eps times the sum of their sizes."""
    shape = (*a.shape[:-1], b.shape[-1])
    c = LAYOUTS[result](*shape, dtype=a.dtype)
    start = c.clone() if accumulate else torch.zeros(shape, dtype=a.dtype)
    if not accumulate:
        c.fill_(torch.nan)  # what was there must not be read
    engine.multiply(c, a, b, accumulate)
    exact = start.double() + a.double() @ b.double()
    sizes = start.double().abs() + a.double().abs() @ b.double().abs()
    # In float64 the reference rounds too.
    bound = 2 * (a.shape[-1] + 2) * torch.finfo(a.dtype).eps * sizes
    assert bool(((c.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("policy", tuning.POLICIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batch"])
def test_products_of_any_layout(policy: str, layout: str, batch: tuple[int, ...]) -> None:
    engine.set_gemm_policy(policy)
    m, n, k = SIZES["large"]
    for dtype in (torch.float32, torch.float64):
        for left, right in ((layout, "dense"), ("dense", layout), (layout, layout)):
            a, b = LAYOUTS[left](*batch, m, k, dtype=dtype), LAYOUTS[right](*batch, k, n, dtype=dtype)
            for result in RESULTS:
                for accumulate in (False, True):
                    check(a, b, result, accumulate)


@pytest.mark.parametrize("policy", tuning.POLICIES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,)], ids=str)
def test_products_of_any_size(policy: str, size: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    engine.set_gemm_policy(policy)
    m, n, k = size
    for layout in ("dense", "transposed"):
        a = LAYOUTS[layout](*batch, m, k, dtype=torch.float32)
        b = LAYOUTS[layout](*batch, k, n, dtype=torch.float32)
        for accumulate in (False, True):
            check(a, b, "dense", accumulate)


def test_one_row_times_a_transposed_matrix() -> None:
    """Added to what is there. torch 2.13's call of oneDNN writes past the end of c: a process of its own."""
    run = """
import torch, flatcore
from flatcore._C import engine
engine.set_gemm_policy("onednn")
c, a, b = torch.zeros(1, 1030), torch.ones(1, 1030), torch.ones(1030, 1030)
for _ in range(100):
    engine.multiply(c, a, b.T, True)
assert (c == 100 * 1030).all()
"""
    subprocess.run([sys.executable, "-c", run], check=True, capture_output=True)


def test_measuring_leaves_a_choice_that_holds() -> None:
    engine.set_gemm_policy("measure")
    a, b, c = (random(256, 256, dtype=torch.float32) for _ in range(3))
    engine.multiply(c, a, b, False)
    measured = engine.gemm_choices()
    assert bool(measured) == engine.onednn_multiplies()
    first = c.clone()
    for _ in range(3):
        engine.multiply(c, a, b, False)
        assert torch.equal(c, first)
    assert engine.gemm_choices() == measured


# --- what is remembered ---


def test_choices_return_from_a_file(tmp_path: Path) -> None:
    engine.set_gemm_choices({CLASS: True})
    path = tmp_path / "a" / "b" / "gemm.json"
    tuning.save(path, engine.gemm_choices())
    assert tuning.load(path) == engine.gemm_choices()
    assert engine.gemm_choices()[CLASS] is True
    engine.set_gemm_choices({CLASS: False})
    assert engine.gemm_choices()[CLASS] is False
    assert [p.name for p in path.parent.iterdir()] == ["gemm.json"]


DAMAGED = {
    "empty": b"",
    "cut off": b'{"machine": "',
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "nothing": b"null",
    "no choices": b"{}",
    "very deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_counts_for_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "gemm.json"
    path.write_bytes(content)
    assert tuning.load(path) == {}
    tuning.save(path, {CLASS: True})
    assert tuning.load(path) == {CLASS: True}


FOREIGN = {
    "a list": [CLASS],
    "no class": {"large": True},
    "too few sizes": {"1 64 64": True},
    "too many sizes": {CLASS + " 7": True},
    "beyond any integer": {"1 64 64 64 0 1 99999999999999999999": True},
    "no boolean": {CLASS: "no"},
}


@pytest.mark.parametrize("choices", FOREIGN.values(), ids=FOREIGN)
def test_choices_of_another_form_count_for_nothing(choices: object, tmp_path: Path) -> None:
    """Nor do they keep the package from being imported."""
    path = tuning.cache_file()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": tuning.machine(), "choices": choices}))
    assert tuning.load(path) == {}
    run = "import os; os.environ.pop('FLATCORE_GEMM', 0); import flatcore"
    subprocess.run([sys.executable, "-c", run], check=True)


def test_choices_of_another_machine_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gemm.json"
    path.write_text(json.dumps({"machine": "another", "choices": {CLASS: True}}))
    assert tuning.load(path) == {}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "flatcore" / "gemm.json"
    tuning.save(path, {CLASS: True})
    assert tuning.load(path) == {}


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv(tuning.VARIABLE, "measure")
    tuning.start()


# --- the environment variable ---


def test_a_wrong_variable_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "mkl")
    with pytest.warns(FlatcoreWarning) as said:
        tuning.start()
    (warning,) = said
    assert str(warning.message) == (
        "FLATCORE_GEMM: expected one of measure, blas, onednn, got 'mkl'; measuring"
    )


@pytest.mark.parametrize("policy", tuning.POLICIES)
def test_a_right_variable_is_taken_in_silence(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setenv(tuning.VARIABLE, policy)
    monkeypatch.setattr(engine, "set_gemm_policy", taken.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.start()
    assert taken == [policy]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="policy: expected measure, blas or onednn, got 'mkl'"):
        engine.set_gemm_policy("mkl")
