"""The README's example runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_example_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:flatcore", "-c", blocks[0]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"trace \S+ \+- \S+ from \d+ products", done.stdout)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_commands_named_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    assert all((ROOT / path).exists() for path in re.findall(r"python (examples/\S+\.py)", text))
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((docs/[^)]+)\)", text))
