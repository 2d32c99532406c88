"""A long eigenvalue search on disk: written aside and renamed, so that there is always a whole one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from flatcore.krylov_basis import Basis

__all__ = ["Checkpoint"]

SECONDS = 60.0
SHARE = 0.1
_MAGIC = b"flatcore eigsh checkpoint 1\n"


class Checkpoint:
    """The state of a search at ``path``: a line that says what it is, its small part as a line of JSON, the rows of
    the basis as they are stored.

    ``identity``: what a search must have in common with the one that is taken up. It is written every SECONDS,
    or less often where that would cost more than a SHARE of the time.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        try:
            self.path = Path(path)
        except TypeError:
            raise TypeError(f"checkpoint: expected a path, got {type(path).__name__}") from None
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(
                f"checkpoint: expected a file in a folder that exists, got {str(self.path)!r}; make the folder"
            )
        self.identity = identity
        self._written, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._written >= max(SECONDS, self._cost / SHARE)

    def write(self, state: dict[str, Any], basis: Basis, rows: int, draft_products: int) -> None:
        began = time.monotonic()
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        head = {
            "identity": self.identity,
            "rows": rows,
            "draft_products": draft_products,
            "state": _plain(state),
        }
        try:
            with open(aside, "wb") as file:
                file.write(_MAGIC)
                file.write(json.dumps(head).encode() + b"\n")
                for row in basis.parts(rows):
                    file.write(_bytes_of(row))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
        self._written = time.monotonic()
        self._cost = self._written - began

    def read(self, basis: Basis) -> tuple[dict[str, Any], int] | None:
        """State and products of the draft, with the rows put into the basis; None where there is no checkpoint.

        Raises ValueError where it is none, is cut off, or is another search's.
        """
        if not self.path.exists():
            return None
        with open(self.path, "rb") as file:
            if file.readline() != _MAGIC:
                raise ValueError(
                    f"checkpoint: expected {str(self.path)!r} to be one of this version's eigsh, found another file; "
                    "give another path"
                )
            head = json.loads(file.readline())
            ours, theirs = json.loads(json.dumps(self.identity)), head["identity"]
            for name in ours:
                if ours[name] != theirs.get(name):
                    raise ValueError(
                        f"checkpoint: expected a search with {name} = {ours[name]}, found one with "
                        f"{theirs.get(name)} in {str(self.path)!r}; delete it or give another path"
                    )
            for row in basis.parts(head["rows"]):
                data = file.read(row.numel() * row.element_size())
                if len(data) != row.numel() * row.element_size():
                    raise ValueError(f"checkpoint: {str(self.path)!r} is cut off; delete it to start afresh")
                row.copy_(torch.frombuffer(bytearray(data), dtype=row.dtype))
        return _state_of(head["state"]), head["draft_products"]

    def refuse(self, defect: float) -> None:
        raise ValueError(
            f"checkpoint: the search in {str(self.path)!r} is of another operator, its basis is off by {defect:.1e} of "
            "the largest product; delete it or give another path"
        )

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _bytes_of(row: torch.Tensor) -> bytes:
    return bytes(row.cpu().contiguous().view(torch.uint8).numpy().data)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    # repr of a float is exact; JSON has no infinity.
    return {
        name: [None if isinstance(x, float) and math.isinf(x) else x for x in value]
        if isinstance(value, (list, tuple))
        else value
        for name, value in state.items()
    }


def _state_of(head: dict[str, Any]) -> dict[str, Any]:
    search = [math.inf if x is None else x for x in head["search"]]
    return {**head, "search": tuple(search), "injections": [tuple(pair) for pair in head["injections"]]}
