"""Ctrl-C ends a report, whatever it meets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from flatcore.errors import FlatcoreWarning

_TOLD = "eigsh: interrupted"


@contextmanager
def interrupts_end_it() -> Iterator[None]:
    """KeyboardInterrupt on Ctrl-C also where `eigsh` catches it, gives the pairs it has and says so in a warning.

    A report has no use for those, and a measure may hand on their values without the status.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", _TOLD, FlatcoreWarning)
        try:
            yield
        except FlatcoreWarning as warning:
            if str(warning).startswith(_TOLD):
                raise KeyboardInterrupt from None
            raise


@contextmanager
def silent_but_for_interrupts() -> Iterator[None]:
    """No FlatcoreWarning, inside of `interrupts_end_it`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        warnings.filterwarnings("error", _TOLD, FlatcoreWarning)
        yield
