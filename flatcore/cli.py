"""The command line: flatcore report | spectrum | plan | bench | doctor."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

import flatcore as fc
from flatcore import doctor as doctor_module
from flatcore.bench.command import chosen
from flatcore.bench.command import run as run_bench
from flatcore.bench.setting import LARGEST_ERROR, PRECISIONS, Setting
from flatcore.bench.setting import OPERATORS as BENCH_OPERATORS
from flatcore.bench.workloads import WORKLOADS
from flatcore.cli_output import PICTURE, JsonTarget, JsonType, OutputFolder, printable, text_console
from flatcore.cli_spectrum import draw, eigenvalue_table, of_subject
from flatcore.errors import CaptureError, FlatcoreWarning
from flatcore.factory import Subject, load_subjects
from flatcore.measures.catalogue import chosen as chosen_measures
from flatcore.report import compare
from flatcore.report.document import density as density_document
from flatcore.report.document import dumps, eigenpairs

OPERATORS: dict[str, Callable[..., Any]] = {
    "hessian": fc.Hessian,
    "ggn": fc.GGN,
    "covariance": fc.GradientCovariance,
}


INTERRUPTED = 130  # exit status of a shell's command that Ctrl-C ended


class Friendly(click.Group):
    """Errors of the user's making are one sentence on stderr and exit status 2; --debug gives the traceback.

    Ctrl-C is one line and exit status 130.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, CaptureError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"flatcore: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("flatcore: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Friendly, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(fc.__version__, prog_name="flatcore")
def main(debug: bool) -> None:
    """How curved is the loss of a torch model?

    SUBJECT is path/to/module.py:function. The function takes no arguments and returns (model, loss, data),
    (model, loss, data, test data), a flatcore.Objective, or a dict of name -> one of these, which are compared.
    """
    printable(sys.stdout, sys.stderr)
    warnings.showwarning = partial(_show_warning, "")


def _show_warning(about: str, message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, FlatcoreWarning):
        click.echo(f"flatcore: warning: {about}{message}", err=True)


@contextmanager
def _warnings_about(s: Subject, subjects: list[Subject]) -> Iterator[None]:
    """Warnings name the subject, where there are several."""
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, f"{s.name}: " if len(subjects) > 1 else "")
        yield


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
    type=JsonType(),
    metavar="FILE",
    help="Write the numbers as JSON; - for stdout.",
)


@main.command()
@subject_argument
@click.option(
    "--out", type=OutputFolder("report.html"), default=".", show_default=True, help="Folder for report.html."
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
    json_file: JsonTarget | None,
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
    json_file: JsonTarget | None = None,
    measures: Any = "cheap",
) -> None:
    """What `flatcore report` does with what it has loaded. Ctrl-C: KeyboardInterrupt, and nothing is written."""
    found = []
    for s in subjects:
        with _warnings_about(s, subjects):
            found.append(
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
            )
    reports, page, console = compare(found), out / "report.html", text_console(json_file)
    # Files first: what a closed pipe does to printing costs none of them. A full disk does not cost the table.
    try:
        reports.save_html(page)
        if json_file is not None:
            json_file.write(reports.to_json())
    finally:
        console.print(reports.table())
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


@main.command()
@subject_argument
@click.option("--operator", type=click.Choice(list(OPERATORS)), default="hessian", show_default=True)
@click.option("-k", default=6, show_default=True, help="Number of eigenvalues.")
@click.option("--which", type=click.Choice(["LM", "LA", "SA", "BE"]), default="LM", show_default=True)
@click.option(
    "--tol", default=1e-3, show_default=True, help="Residual, relative to the largest |eigenvalue|."
)
@click.option(
    "--density",
    "picture",
    type=PICTURE,
    metavar="FILE",
    help="Draw the density to FILE: .png, .pdf or .svg.",
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
    json_file: JsonTarget | None,
) -> None:
    """A few eigenvalues with their residuals; with --density a picture of them all.

    Ctrl-C ends the search: what it has found is printed, and written to --json.
    """
    console = text_console(json_file)
    found: dict[str, Any] = {}
    subjects = load_subjects(subject, allow_train_mode)
    try:
        for s in subjects:
            with _warnings_about(s, subjects):
                A = OPERATORS[operator](s.objective)
                pairs = fc.eigsh(
                    A, k, which=which, tol=tol, seed=seed, return_eigenvectors=False, progress=True
                )
            found[s.name] = {"operator": operator, "eigenpairs": eigenpairs(pairs)}
            title = f"{s.name}: {operator}, {which}, {pairs.matvecs} products, {pairs.status}"
            console.print(title, markup=False, highlight=False, soft_wrap=True)
            console.print(eigenvalue_table(pairs))
            if pairs.status.startswith("interrupted"):
                raise KeyboardInterrupt
            if picture is not None:
                density = fc.spectral_density(A, seed=seed)
                path = picture if len(found) == 1 else of_subject(picture, s.name)
                draw(density, s.name, path)
                found[s.name]["density"] = density_document(density)
                text = f"density: {path}, band of 95 % at each point; eigenvalues {density.near_zero()}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
    finally:
        if json_file is not None and found:
            json_file.write(dumps(found))


@main.command()
@subject_argument
@click.option("--operator", type=click.Choice(list(OPERATORS)), default="hessian", show_default=True)
@train_mode_option
@json_option
def plan(subject: str, operator: str, allow_train_mode: bool, json_file: JsonTarget | None) -> None:
    """What a product will run: op by op, natively or through autograd, with flops and memory."""
    found, subjects = {}, load_subjects(subject, allow_train_mode)
    for s in subjects:
        with _warnings_about(s, subjects):
            planned = OPERATORS[operator](s.objective).plan()
        if json_file is None or json_file.name != "-":
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
@click.option("--quick", is_flag=True, help="Small workloads, nothing compiled, 3 rounds: some minutes.")
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
    "--rounds",
    type=click.IntRange(1),
    default=9,
    show_default=True,
    help="Timings of each way, interleaved; 3 at most when quick.",
)
@click.option(
    "--limit",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds after which a workload that has had 3 rounds begins no new one.",
)
@click.option(
    "--prepare-limit",
    type=click.FloatRange(0, min_open=True),
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
@click.option("--figure", type=PICTURE, metavar="FILE", help="Draw the timings to FILE: .png, .pdf or .svg.")
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
    json_file: JsonTarget | None,
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
        say=text_console(json_file).print,
        picture=figure,
    )
    if json_file is not None:
        json_file.write(dumps(document))


@main.command()
@json_option
def doctor(json_file: JsonTarget | None) -> None:
    """Build, torch, devices, linear algebra and threads in use; exit status 1 if something looks wrong."""
    facts = doctor_module.diagnose()
    if json_file is None or json_file.name != "-":
        click.echo("\n".join(doctor_module.lines(facts)))
    if json_file is not None:
        json_file.write(dumps(facts))
    sys.exit(bool(facts["complaints"]))
