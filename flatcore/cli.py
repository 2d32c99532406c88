"""The command line: flatcore report | spectrum | plan | bench | doctor."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click
import torch
from rich.console import Console
from rich.table import Table

import flatcore as fc
from flatcore import doctor as doctor_module
from flatcore.bench.command import chosen
from flatcore.bench.command import run as run_bench
from flatcore.bench.setting import LARGEST_ERROR, PRECISIONS, Setting
from flatcore.bench.setting import OPERATORS as BENCH_OPERATORS
from flatcore.bench.workloads import WORKLOADS
from flatcore.errors import CaptureError, FlatcoreWarning
from flatcore.factory import Subject, load_subjects
from flatcore.measures.catalogue import chosen as chosen_measures
from flatcore.report import compare
from flatcore.report.document import density as density_document
from flatcore.report.document import dumps, eigenpairs
from flatcore.report.numbers import with_error

OPERATORS: dict[str, Callable[..., Any]] = {
    "hessian": fc.Hessian,
    "ggn": fc.GGN,
    "covariance": fc.GradientCovariance,
}


class Friendly(click.Group):
    """Errors of the user's making are one sentence on stderr and exit status 2; --debug gives the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, CaptureError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"flatcore: {error}", err=True)
            ctx.exit(2)


@click.group(cls=Friendly, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(fc.__version__, prog_name="flatcore")
def main(debug: bool) -> None:
    """How curved is the loss of a torch model?

    SUBJECT is path/to/module.py:function. The function takes no arguments and returns (model, loss, data),
    (model, loss, data, test data), a flatcore.Objective, or a dict of name -> one of these, which are compared.
    """
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, FlatcoreWarning):
        click.echo(f"flatcore: warning: {message}", err=True)


subject_argument = click.argument("subject")
train_mode_option = click.option(
    "--allow-train-mode",
    is_flag=True,
    help="Normalisation layers in train mode use each batch's own statistics.",
)
seed_option = click.option("--seed", default=0, show_default=True, help="Of the random probes.")
json_option = click.option(
    "--json",
    "json_file",
    type=click.File("w"),
    metavar="FILE",
    help="Write the numbers as JSON; - for stdout.",
)


def _text(json_file: TextIO | None) -> Console:
    """Where tables go: stdout, unless JSON was asked for there."""
    return Console(stderr=json_file is not None and json_file.name in ("-", "<stdout>"))


@main.command()
@subject_argument
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=".", help="Folder for report.html."
)
@click.option("-k", default=5, show_default=True, help="Number of largest eigenvalues.")
@click.option("--rtol", default=0.01, show_default=True, help="Relative standard error of the trace.")
@click.option(
    "--measures",
    default="cheap",
    show_default=True,
    metavar="NAMES",
    help='Measures of flatness: "cheap", "all", "none", or names with commas between.',
)
@click.option("--compare-autograd", is_flag=True, help="Compute all a second time through an autograd loop.")
@train_mode_option
@seed_option
@json_option
def report(
    subject: str,
    out: Path,
    k: int,
    rtol: float,
    measures: str,
    compare_autograd: bool,
    allow_train_mode: bool,
    seed: int,
    json_file: TextIO | None,
) -> None:
    """Trace, eigenvalues, spectral density and measures of flatness, as tables, report.html and JSON."""
    # Before the subjects are loaded, which may train them.
    names = chosen_measures("measures", measures.split(",") if "," in measures else measures)
    subjects = load_subjects(subject, allow_train_mode)
    write_report(subjects, out, k, rtol, compare_autograd, seed, json_file, names)


def write_report(
    subjects: list[Subject],
    out: Path,
    k: int = 5,
    rtol: float = 0.01,
    compare_autograd: bool = False,
    seed: int = 0,
    json_file: TextIO | None = None,
    measures: Any = "cheap",
) -> None:
    """What `flatcore report` does with what it has loaded."""
    reports = compare(
        [
            fc.report(
                s.objective,
                name=s.name,
                k=k,
                rtol=rtol,
                seed=seed,
                test=s.test,
                measures=measures,
                compare_autograd=compare_autograd,
                progress=True,
            )
            for s in subjects
        ]
    )
    console = _text(json_file)
    console.print(reports.table())
    out.mkdir(parents=True, exist_ok=True)
    reports.save_html(out / "report.html")
    console.print(f"page: {out / 'report.html'}", highlight=False, soft_wrap=True)
    if json_file is not None:
        json_file.write(reports.to_json())


@main.command()
@subject_argument
@click.option("--operator", type=click.Choice(list(OPERATORS)), default="hessian", show_default=True)
@click.option("-k", default=6, show_default=True, help="Number of eigenvalues.")
@click.option("--which", type=click.Choice(["LM", "LA", "SA", "BE"]), default="LM", show_default=True)
@click.option(
    "--tol", default=1e-3, show_default=True, help="Residual, relative to the largest |eigenvalue|."
)
@click.option(
    "--density", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the density to FILE."
)
@train_mode_option
@seed_option
@json_option
def spectrum(
    subject: str,
    operator: str,
    k: int,
    which: str,
    tol: float,
    picture: Path | None,
    allow_train_mode: bool,
    seed: int,
    json_file: TextIO | None,
) -> None:
    """A few eigenvalues with their residuals; with --density a picture of them all (.png, .pdf or .svg)."""
    console, found = _text(json_file), {}
    for s in load_subjects(subject, allow_train_mode):
        A = OPERATORS[operator](s.objective)
        pairs = fc.eigsh(A, k, which=which, tol=tol, seed=seed, return_eigenvectors=False, progress=True)
        table = Table(title=f"{s.name}: {operator}, {which}, {pairs.matvecs} products, {pairs.status}")
        for column in ("eigenvalue ± residual", "converged"):
            table.add_column(column, justify="right")
        for value, residual, converged in zip(pairs.values, pairs.residuals, pairs.converged, strict=True):
            table.add_row(with_error(float(value), float(residual)), "yes" if converged else "no")
        console.print(table)
        found[s.name] = {"operator": operator, "eigenpairs": eigenpairs(pairs)}
        if picture is not None:
            density = fc.spectral_density(A, seed=seed)
            path = picture.with_stem(f"{picture.stem}-{s.name}") if len(found) > 1 else picture
            _draw(density, s.name, path)
            text = f"density: {path}, band of 95 % at each point; eigenvalues {density.near_zero()}"
            console.print(text, highlight=False, soft_wrap=True)
            found[s.name]["density"] = density_document(density)
    if json_file is not None:
        json_file.write(dumps(found))


def _draw(density: Any, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    density.plot(figure.subplots()).set_title(title)
    figure.savefig(path)


@main.command()
@subject_argument
@click.option("--operator", type=click.Choice(list(OPERATORS)), default="hessian", show_default=True)
@train_mode_option
@json_option
def plan(subject: str, operator: str, allow_train_mode: bool, json_file: TextIO | None) -> None:
    """What a product will run: op by op, natively or through autograd, with flops and memory."""
    found = {}
    for s in load_subjects(subject, allow_train_mode):
        planned = OPERATORS[operator](s.objective).plan()
        if json_file is None or json_file.name not in ("-", "<stdout>"):
            click.echo(f"{s.name}\n{planned}")
        found[s.name] = {
            "operator": operator,
            "native_fraction": planned.native_fraction,
            "parameters": planned.parameters,
            "examples": planned.examples,
            "batches": planned.batches,
            "state_bytes": planned.state_bytes,
            "peak_bytes": {K: planned.peak_bytes(K) for K in (1, 4, 8)},
            "flops": {K: planned.flops(K) for K in (1, 4, 8)},
            "ops": [
                {"kind": r.kind, "path": r.path, "native": r.native, "flops": r.flops} for r in planned.rows
            ],
        }
    if json_file is not None:
        json_file.write(dumps(found))


@main.command()
@click.option("--quick", is_flag=True, help="Small workloads, nothing compiled, few rounds: under a minute.")
@click.option("--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="Only these.")
@click.option(
    "--way",
    "ways",
    multiple=True,
    metavar="NAME",
    help="Only these beside flatcore, as the table names them.",
)
@click.option("-k", "vectors", multiple=True, type=click.IntRange(1), help="Directions at once.  [1 and 8]")
@click.option(
    "--rounds", default=9, show_default=True, help="Timings of each way, interleaved; 3 when quick."
)
@click.option(
    "--limit", default=60.0, show_default=True, help="Seconds after which a workload begins no new round."
)
@click.option(
    "--prepare-limit",
    default=300.0,
    show_default=True,
    help="Seconds after which a way still being prepared or compiled is left out.",
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where: cpu, cuda or cuda:N."
)
@click.option(
    "--dtype",
    type=click.Choice(list(LARGEST_ERROR)),
    default="float32",
    show_default=True,
    help="Of the weights, data and products.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="full",
    show_default=True,
    help="Of flatcore's float32 products; everything else is in full.",
)
@click.option(
    "--operator",
    type=click.Choice(list(BENCH_OPERATORS)),
    default="hessian",
    show_default=True,
    help="Whose products.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.  [as torch chooses]")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timings to FILE.")
@json_option
def bench(
    quick: bool,
    names: tuple[str, ...],
    ways: tuple[str, ...],
    vectors: tuple[int, ...],
    rounds: int,
    limit: float,
    prepare_limit: float,
    device: str,
    dtype: str,
    precision: str,
    operator: str,
    threads: int | None,
    figure: Path | None,
    json_file: TextIO | None,
) -> None:
    """Curvature-vector products by flatcore, bare torch and the other packages installed.

    The fully connected nets also by jax, where it is installed, on the CPU; XLA gets as many threads as torch.

    Every way is checked against float64 before it is timed, and all are timed in turn. Medians per vector; the
    floor is what the arithmetic alone would take at the measured rate of this machine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    document = run_bench(
        chosen(names, quick),
        vectors or (1, 8),
        setting=Setting(dtype, device, operator, precision),
        quick=quick,
        ways=ways,
        rounds=min(rounds, 3) if quick else rounds,
        limit=limit,
        prepare_limit=prepare_limit,
        say=_text(json_file).print,
        picture=figure,
    )
    if json_file is not None:
        json_file.write(dumps(document))


@main.command()
@json_option
def doctor(json_file: TextIO | None) -> None:
    """Build, torch, devices, linear algebra and threads in use; exit status 1 if something looks wrong."""
    facts = doctor_module.diagnose()
    if json_file is None or json_file.name not in ("-", "<stdout>"):
        click.echo("\n".join(doctor_module.lines(facts)))
    if json_file is not None:
        json_file.write(dumps(facts))
    sys.exit(bool(facts["complaints"]))
