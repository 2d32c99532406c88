"""A progress bar that appears on a terminal only, and only for what takes over two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Bar", "progress_bar"]

_QUIET_SECONDS = 2.0


class Bar:
    """What ``progress_bar`` yields: ``update(n, text)`` says how far the work is."""

    def __init__(self, title: str, total: int | None, visible: bool) -> None:
        self._title, self._total, self._visible = title, total, visible
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def update(self, n: int, text: str = "") -> None:
        """``n`` of ``total`` is done; ``text`` stands behind the bar."""
        if not self._visible:
            return
        if self._progress is None:
            if time.monotonic() - self._began < _QUIET_SECONDS:
                return
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task(self._title, total=self._total, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=n, text=text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def progress_bar(title: str, total: int | None = None, enabled: bool = True) -> Iterator[Bar]:
    """``with progress_bar("eigsh", enabled=progress) as bar: bar.update(n, text)``, written to stderr."""
    bar = Bar(title, total, enabled and sys.stderr.isatty())
    try:
        yield bar
    finally:
        bar.close()
