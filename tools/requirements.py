"""Prints what pyproject.toml asks for, one requirement per line: the dependencies and every extra.

The set-up installs these beside a pinned torch without building flatcore itself.
"""

from __future__ import annotations

from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for group in (project["dependencies"], *project["optional-dependencies"].values()):
    print(*group, sep="\n")
