"""Loading a user's model: path/to/module.py:factory."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcore.objective import Objective

__all__ = ["FactoryError", "Subject", "load_subjects"]

_EXPECTED = (
    "an Objective, (model, loss, data), (model, loss, data, test data), or a dict of name -> one of these"
)


class FactoryError(ValueError):
    """What a user's factory did wrong, in one sentence; the original exception is chained where there is one."""


@dataclass(frozen=True)
class Subject:
    """What a command works on: an objective by a name, and held-out data where the factory gave some."""

    name: str
    objective: Objective
    test: Any = None


def load_subjects(reference: str, allow_train_mode: bool = False) -> list[Subject]:
    """Calls the function that `reference`, "path/to/module.py:function", names.

    The module runs as a script's own imports would see it: its folder comes first on the search path while it loads
    and while the function runs. `allow_train_mode` is for the objectives made here. Raises FactoryError.
    """
    function = _load(reference)
    folder = str(Path(reference.rpartition(":")[0]).resolve().parent)
    sys.path.insert(0, folder)
    try:
        made = function()
    except Exception as error:
        raise FactoryError(f"{reference} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if isinstance(made, dict):
        if not made:
            raise FactoryError(f"{reference} returned an empty dict, expected {_EXPECTED}")
        return [_subject(reference, str(name), part, allow_train_mode) for name, part in made.items()]
    return [_subject(reference, None, made, allow_train_mode)]


def _load(reference: str) -> Callable[[], Any]:
    path_text, colon, name = reference.rpartition(":")
    if not (colon and path_text and name.isidentifier()):
        raise FactoryError(f"expected path/to/module.py:function, got {reference!r}")
    path = Path(path_text)
    if not path.is_file():
        raise FactoryError(f"there is no file {path_text}; expected path/to/module.py:function")
    spec = importlib.util.spec_from_file_location(f"flatcore_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{path_text} is not a Python file; expected path/to/module.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise FactoryError(f"{path_text} could not be loaded, {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    function = getattr(module, name, None)
    if function is None:
        own = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == spec.name
        ]
        raise FactoryError(f"{path_text} has no function {name}; it has {', '.join(sorted(own)) or 'none'}")
    if not callable(function):
        raise FactoryError(
            f"{name} in {path_text} is a {type(function).__name__}, expected a function of no arguments"
        )
    return function  # type: ignore[no-any-return]


def _subject(reference: str, name: str | None, made: Any, allow_train_mode: bool) -> Subject:
    if isinstance(made, Objective):
        return Subject(name or type(made.model).__name__, made)
    if isinstance(made, tuple) and len(made) in (3, 4):
        model, loss, data, *test = made
        objective = Objective(model, loss, data, allow_train_mode=allow_train_mode)
        return Subject(name or type(model).__name__, objective, *test)
    what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
    where = f" under {name!r}" if name else ""
    raise FactoryError(f"{reference} returned {what}{where}, expected {_EXPECTED}")
