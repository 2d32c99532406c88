"""Where the rows of a Krylov basis are kept, and how many: chosen from a budget of memory."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass

import torch

from flatcore.linear import LinearView

__all__ = ["STORAGES", "Basis", "allocate_basis", "checked_storage"]

STORAGES = ("full", "float16", "bf16", "host", "file")
# Of the machine's memory, for the Krylov basis; not of what is free now, so that a run can be repeated exactly.
_MEMORY_SHARE = 0.25
_SHORT = {"float16": torch.float16, "bf16": torch.bfloat16}
# Stored in 16 bits a row is rounded by u in random directions, so that its product with another is off by about
# u / sqrt(P): eigenpairs cannot be told apart more finely. With some room:
_ROOM = 4.0


@dataclass(frozen=True)
class Basis:
    """``head`` (h, P) in A's dtype beside A, ``tail`` the rows behind it; ``scale`` is what stored rows were
    multiplied by. ``file``: the mapped file whose first rows are the tail, with room for two blocks of Ritz vectors."""

    storage: str
    head: torch.Tensor
    tail: torch.Tensor
    scale: float
    file: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.head) + len(self.tail)

    def parts(self, rows: int) -> list[torch.Tensor]:
        """The first ``rows`` rows, one by one, as they are stored."""
        return [*self.head[:rows], *self.tail[: max(rows - len(self.head), 0)]]


@dataclass(frozen=True)
class _Need:
    """Rows of P numbers: of a basis that restarts seldom, of one that is just large enough, of a step's work."""

    comfortable: int
    enough: int
    least: int
    work: int

    @staticmethod
    def of(P: int, k: int, block: int, given: int) -> _Need:
        kept = max(k, given)
        least = min(P, kept + 6 * max(block, 2))
        return _Need(
            comfortable=min(P, max(64, 4 * k + 6 * block, least)),
            enough=min(P, max(k + 8 * block, least)),
            least=least,
            work=2 * kept + given + 4 * block,
        )


def _finest(storage: str, P: int) -> float:
    """The least tol that a storage can serve."""
    return _ROOM * torch.finfo(_SHORT[storage]).eps / 2 / math.sqrt(P) if storage in _SHORT else 0.0


def checked_storage(storage: str | None, operator: LinearView, tol: float) -> str | None:
    if storage is None:
        return None
    if storage not in STORAGES:
        raise ValueError(
            f"storage: expected one of {', '.join(STORAGES)}, or None to choose, got {storage!r}"
        )
    if storage == "host" and operator.device.type == "cpu":
        raise ValueError(
            "storage: expected an operator on another device for 'host', got one on the CPU; give 'full'"
        )
    if tol < _finest(storage, operator.P):
        raise ValueError(
            f"storage: expected tol of {_finest(storage, operator.P):.1e} or more for {storage!r} with "
            f"P = {operator.P}, whose rounding hides smaller residuals, got tol = {tol:g}; give 'full' or 'file'"
        )
    return storage


def allocate_basis(
    operator: LinearView,
    k: int,
    block: int,
    given: int,
    tol: float,
    memory: int | None,
    storage: str | None,
) -> Basis:
    """A basis for k pairs in blocks, from ``given`` start rows, within ``memory`` bytes on A's device.

    Of several kinds of storage the first is taken that has rows enough: "full" (A's dtype), for a CUDA operator
    "host" (pinned memory), "float16", and what is left: "full" with the fewest rows that do, or a "file".
    Raises ValueError where the memory cannot hold what is needed.
    """
    P, itemsize = operator.P, operator.dtype.itemsize
    need = _Need.of(P, k, block, given)
    budget = int(_MEMORY_SHARE * _installed(operator.device)) if memory is None else memory
    left = budget // P - need.work * itemsize

    def rows(kind: str) -> int:
        """As many as are useful and fit."""
        if kind == "file":
            return need.comfortable if left >= 0 else 0
        if kind == "host":  # torch rounds pinned memory up to a power of two, and keeps it
            fits = int(_MEMORY_SHARE * _installed(torch.device("cpu"))) // 2 // (P * itemsize)
            return min(need.comfortable, fits) if left >= 0 else 0
        if kind in _SHORT:
            head = min(k, need.comfortable)
            return min(need.comfortable, max(head + (left - head * itemsize) // 2, 0))
        return min(need.comfortable, max(left // itemsize, 0))

    # Rows in 16 bits that nearly fill the space are no longer independent.
    roomy = 4 * need.comfortable <= P
    if storage in _SHORT and not roomy:
        raise ValueError(
            f"storage: expected P >= {4 * need.comfortable}, four times the basis, for {storage!r}, got P = {P}; "
            "give 'full'"
        )
    if storage is None:
        able = {
            "full": True,
            "host": operator.device.type == "cuda",
            "float16": roomy and tol >= _finest("float16", P),
        }
        choice = next((kind for kind in able if able[kind] and rows(kind) >= need.enough), None)
        storage = choice or ("full" if rows("full") >= need.least else "file")
    if rows(storage) < need.least:
        if memory is not None:
            raise ValueError(
                f"memory: expected at least {_least_bytes(P, itemsize, need, storage, k):,} bytes for k = {k} in "
                f"blocks of {block} with P = {P} and storage {storage!r}, got {memory:,}; allow more, ask for fewer "
                "pairs or take a smaller block_size"
            )
        return _made(operator, need.least, storage, k, max(k, given))
    return _made(operator, rows(storage), storage, k, max(k, given))


def _least_bytes(P: int, itemsize: int, need: _Need, storage: str, k: int) -> int:
    per_column = need.work * itemsize
    if storage in _SHORT:
        head = min(k, need.least)
        per_column += head * itemsize + (need.least - head) * 2
    elif storage == "full":
        per_column += need.least * itemsize
    return P * per_column


def _made(operator: LinearView, rows: int, storage: str, k: int, kept: int) -> Basis:
    P, dtype, device = operator.P, operator.dtype, operator.device
    scale = 1.0
    head = torch.empty(0, P, dtype=dtype, device=device)
    if storage == "full":
        head = torch.empty(rows, P, dtype=dtype, device=device)
        tail = torch.empty(0, P, dtype=dtype, device=device)
    elif storage in _SHORT:
        # The wanted pairs stay in full precision. No entry of a unit row times sqrt(P) exceeds what float16 holds
        # below P = 65504^2.
        head = torch.empty(min(k, rows), P, dtype=dtype, device=device)
        tail = torch.empty(rows - len(head), P, dtype=_SHORT[storage], device=device)
        scale = math.sqrt(P) if storage == "float16" else 1.0
    elif storage == "host":
        tail = torch.empty(rows, P, dtype=dtype, pin_memory=True, device="cpu")
    else:
        file = _in_file(rows + 2 * kept, P, dtype)
        return Basis(storage, head, file[:rows], scale, file)
    return Basis(storage, head, tail, scale)


def _in_file(rows: int, P: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows in a file without a name, which is gone when the process is, however it ends."""
    folder = tempfile.gettempdir()
    size = rows * P * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"storage: expected {size:,} bytes free in {folder} for a basis of {rows} vectors, found {free:,}; "
            "name another folder by the environment variable TMPDIR"
        )
    with tempfile.NamedTemporaryFile(prefix="flatcore-basis-", dir=folder) as file:
        # Space that is not there later would end the process by a signal.
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(file.name, shared=True, size=rows * P, dtype=dtype, device="cpu").view(rows, P)


def _installed(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
