"""Where the command line writes: files that are checked before any work begins, and text in the console's encoding."""

from __future__ import annotations

import codecs
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

__all__ = ["PICTURE", "JsonTarget", "JsonType", "OutputFile", "OutputFolder", "printable", "text_console"]

_IN_ASCII = {"±": "+-", "λ": "lambda", "σ": "sigma", "×": "x", "²": "^2", "–": "-", "−": "-", "’": "'"}


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(character, "?") for character in lacking), error.end


_ERRORS = "flatcore"
codecs.register_error(_ERRORS, _replacement)


def printable(*streams: Any) -> None:
    """Printing to these never fails for want of a character."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        # Before widths are counted, since some replacements are longer.
        return super().render_str(text.encode(self.encoding, _ERRORS).decode(self.encoding), **options)


def text_console(json_file: Any) -> Console:
    """Where tables go: stdout, unless JSON was asked for there."""
    to_stderr = json_file is not None and json_file.name in ("-", "<stdout>")
    printable(sys.stderr if to_stderr else sys.stdout)
    return _Console(stderr=to_stderr, emoji=False)


@dataclass(frozen=True)
class JsonTarget:
    """What --json names: a file, or stdout."""

    name: str

    def write(self, text: str) -> None:
        """In place of what is there, so once."""
        if self.name == "-":
            click.echo(text, nl=False)
            return
        path = Path(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:  # not generic in older versions
    _Type = click.ParamType


class OutputFile(_Type):
    """A file that can be written; ``formats``: the suffixes it may have, the first of which it gets if it has none."""

    name = "file"

    def __init__(self, formats: Iterable[str] = ()) -> None:
        self.formats = tuple(formats)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if self.formats and not path.suffix and path.name:
            path = path.with_name(path.name + self.formats[0])
        if self.formats and path.suffix.lower() not in self.formats:
            known = f"{', '.join(self.formats[:-1])} or {self.formats[-1]}"
            raise ValueError(f"{_option(param)}: expected a file of the format {known}, got {value!r}")
        _check_file(_option(param), path)
        return path


class JsonType(_Type):
    """A JsonTarget that can be written."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value != "-":
            _check_file(_option(param), Path(value))
        return JsonTarget(value)


class OutputFolder(_Type):
    """A folder in which the file ``holds`` can be written."""

    name = "directory"

    def __init__(self, holds: str) -> None:
        self.holds = holds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{_option(param)}: expected a folder, got the file {value!r}; name a folder")
        _check_file(_option(param), path / self.holds)
        return path


PICTURE = OutputFile((".png", ".pdf", ".svg"))


def _option(param: click.Parameter | None) -> str:
    return "" if param is None else max(param.opts, key=len)


def _check_file(option: str, path: Path) -> None:
    """Raises ValueError where the file could not be written; leaves nothing behind."""
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got the folder {str(path)!r}; name a file in it")
    try:
        if not path.exists():
            _try_writing(path.parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise ValueError(
            f"{option}: expected a place that can be written, got {str(path)!r} ({error.strerror}); name another"
        ) from error


def _try_writing(folder: Path) -> None:
    """By doing it: rights alone do not tell on every file system."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for part in missing:
            with suppress(OSError):
                part.rmdir()
