"""Which parameters of a model the curvature is taken with respect to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Selection = str | Iterable[str] | Callable[[str, Tensor], bool] | None


def select(model: nn.Module, params: Selection) -> dict[str, Tensor]:
    """The selected parameters by name, in the order of `model.named_parameters()`.

    None selects every parameter that requires a gradient. Names and globs select what they match, whether
    it requires a gradient or not. A parameter shared by several modules has one name, the first; its other
    names are understood too.

    Raises:
        ValueError: nothing selected, an unknown name, a glob that matches nothing, parameters of several
            dtypes or
            devices, a dtype other than float32 and float64.
        TypeError: `params` is of another kind.
    """
    canonical = dict(model.named_parameters())
    if params is None:
        chosen = {name for name, parameter in canonical.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError(
                f"model: expected at least one parameter with requires_grad, got none of {len(canonical)}; "
                "name the parameters to look at with params="
            )
    elif callable(params):
        chosen = {name for name, parameter in canonical.items() if params(name, parameter)}
        if not chosen:
            raise ValueError(
                "params: expected the callable to accept at least one parameter, got none of "
                f"{len(canonical)}"
            )
    else:
        chosen = _matching(model, canonical, params)
    selected: dict[str, Tensor] = {name: parameter for name, parameter in canonical.items() if name in chosen}
    _check_kinds(selected)
    return selected


def _matching(model: nn.Module, canonical: dict[str, nn.Parameter], params: str | Iterable[str]) -> set[str]:
    patterns = [params] if isinstance(params, str) else params
    if not isinstance(patterns, Iterable):
        raise TypeError(
            f"params: expected names, globs or a callable(name, tensor), got {type(params).__name__}"
        )
    first_name = {id(parameter): name for name, parameter in canonical.items()}
    aliases = {n: first_name[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"params: expected names or globs as strings, got {type(pattern).__name__}")
        found = {pattern} & aliases.keys() or {name for name in aliases if fnmatchcase(name, pattern)}
        if not found:
            kind = (
                "glob that matches a parameter"
                if any(c in pattern for c in "*?[")
                else "parameter of the model"
            )
            raise ValueError(f"params: expected a {kind}, got {pattern!r}{did_you_mean(pattern, aliases)}")
        chosen |= {aliases[name] for name in found}
    if not chosen:
        raise ValueError("params: expected at least one name or glob, got none")
    return chosen


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing clause that names up to three close matches, or some of the known names."""
    names = list(known)
    inside = [n for n in names if n.startswith(name + ".")]
    if inside:
        return f"; did you mean {name + '.*'!r}"
    close = difflib.get_close_matches(name, names, n=3) or [n for n in names if name.strip("*.?") in n][:3]
    if close:
        return "; did you mean " + " or ".join(map(repr, close))
    return "; known are " + ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")


def _check_kinds(selected: dict[str, Tensor]) -> None:
    for name, parameter in selected.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"model: parameter {name!r} is not initialised yet; run the model once on a batch first"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model: expected float32 or float64 parameters, got {parameter.dtype} for {name!r}; "
                "convert the model with .float() or .double(), or leave the parameter out with params="
            )
    first_name, first = next(iter(selected.items()))
    for name, parameter in selected.items():
        for what in ("dtype", "device"):
            if getattr(parameter, what) != getattr(first, what):
                raise ValueError(
                    f"model: expected all selected parameters of one {what}, got {getattr(first, what)} "
                    f"for {first_name!r} and {getattr(parameter, what)} for {name!r}"
                )
