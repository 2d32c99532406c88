"""Imports torch and then the compiled extension, or says in one sentence what does not fit and what to do.

A binary built on torch's C++ libraries works only under the torch minor version it was built with, so the
build writes that version into `flatcore/_build.py`.
"""

from __future__ import annotations

import sys

LOWEST_TORCH = (2, 11)
FIRST_UNSUPPORTED_TORCH = (2, 14)
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def minor_version(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_supported(found: str) -> None:
    """Raises ImportError where the torch version `found` is outside the supported range."""
    if not LOWEST_TORCH <= minor_version(found) < FIRST_UNSUPPORTED_TORCH:
        lowest, above = (".".join(map(str, bound)) for bound in (LOWEST_TORCH, FIRST_UNSUPPORTED_TORCH))
        raise ImportError(
            f"flatcore works with torch >={lowest},<{above}, found {found}: install a torch of that range, "
            f"then rebuild flatcore with `{REBUILD}`"
        )


def mismatch(built: str, found: str) -> str:
    return f"flatcore was built for torch {built}, found {found}: rebuild with `{REBUILD}`"


def load() -> None:
    """Leaves torch and `flatcore._C` imported.

    Raises:
        ImportError: torch is absent, outside the supported range, not the one of the build; or no build.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            "flatcore needs torch, found none: install it first, for example `pip install torch==2.13.0`"
        ) from None
    found = str(torch.__version__)
    check_supported(found)

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    not_built = (
        f"flatcore's extension is not built for this Python ({python}): "
        "in a source tree run `make dev`, else reinstall flatcore"
    )
    try:
        from flatcore._build import TORCH_VERSION
    except ModuleNotFoundError:
        raise ImportError(not_built) from None
    if minor_version(TORCH_VERSION) != minor_version(found):
        raise ImportError(mismatch(TORCH_VERSION, found))
    try:
        import flatcore._C  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError(not_built) from None
    except ImportError as error:  # the same minor version, yet another build of torch, or a build cut short
        raise ImportError(f"{mismatch(TORCH_VERSION, found)} (the loader says: {error})") from error


load()
