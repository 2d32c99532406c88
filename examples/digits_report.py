"""The demonstration, `make demo`: are a flat and a sharp minimum told apart, and what does it cost?

    python examples/digits_report.py [--out FOLDER]

The same code as `flatcore report examples/digits.py:factory --compare-autograd --json report.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from digits import factory

from flatcore.cli import write_report
from flatcore.cli_output import JsonTarget
from flatcore.factory import Subject
from flatcore.objective import Objective
from flatcore.progress import progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for report.html and report.json")
    out = parser.parse_args().out
    print(
        "Training two networks on 1 437 handwritten digits, one into a flat minimum and one into a sharp one."
    )
    with progress_bar("training", enabled=True) as bar:
        made = factory(lambda done: bar.update(done, f"{done} steps"))
    subjects = [
        Subject(name, Objective(model, loss, training), test)
        for name, (model, loss, training, test) in made.items()
    ]
    write_report(subjects, out, compare_autograd=True, json_file=JsonTarget(str(out / "report.json")))
    print(f"data: {out / 'report.json'}")


if __name__ == "__main__":
    main()
