"""A source file holds one idea: fails on files of more than 400 lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 400
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu", ".cmake"}


def too_long(root: Path) -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    problems = []
    for name in listing.stdout.splitlines():
        path = root / name
        if path.suffix in SUFFIXES and path.exists():
            lines = len(path.read_text().splitlines())
            if lines > LIMIT:
                problems.append(f"{name}:{LIMIT + 1}: {lines} lines, the limit is {LIMIT}")
    return problems


if __name__ == "__main__":
    found = too_long(Path(__file__).parents[1])
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
