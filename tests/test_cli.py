"""The command line: what it prints, what it writes, one sentence for each wrong input."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import flatcore as fc
from flatcore.cli import main
from flatcore.progress import Bar

MODULE = """
import torch
from torch import nn
import flatcore as fc

def one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(11, 4), torch.randint(3, (11,)))

def objective():
    return fc.Objective(*one())

def two():
    model, loss, data = one()
    return {"a": (model, loss, data, data), "b": objective()}

def oddly_named():
    return {"runs[/red]": one(), "a/b :100: $x": one(), "a%2Fb λ": one()}

def never():
    raise AssertionError("loaded before the options were checked")

def wrong():
    return 3

def raises():
    raise RuntimeError("no data today")

def empty():
    return {}

constant = 5
"""


@pytest.fixture
def interrupt_search(monkeypatch):
    """Ctrl-C in so manieth a search of eigenvalues, once it has pairs."""
    search, begun = sys.modules["flatcore.eigsh"]._Search, []
    run_search, show = search.run, search.show

    def at(number):
        def counted(self, *arguments):
            begun.append(self)
            return run_search(self, *arguments)

        def shown(self, seen, *arguments):
            show(self, seen, *arguments)
            if len(begun) == number and seen["residuals"]:
                raise KeyboardInterrupt

        monkeypatch.setattr(search, "run", counted)
        monkeypatch.setattr(search, "show", shown)

    return at


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(MODULE)
    return path


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result


def test_report(module, tmp_path):
    out = tmp_path / "out"
    result = run("report", f"{module}:two", "--out", out, "-k", 2, "--json", tmp_path / "numbers.json")
    assert "trace of H" in result.stdout
    assert (out / "report.html").exists()
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert [r["name"] for r in document["reports"]] == ["a", "b"]
    numbers = document["reports"][0]
    assert numbers["test"]["loss"] == pytest.approx(numbers["training"]["loss"])
    namespace = {}
    exec(MODULE, namespace)
    H = fc.Hessian(namespace["objective"]())
    exact = torch.linalg.eigvalsh(H.to_dense().double())
    top = numbers["curvature"]["top"]
    assert top["values"] == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-3)
    assert numbers["curvature"]["trace"]["value"] == pytest.approx(
        exact.sum().item(), rel=1e-4
    )  # exact below 64


def test_json_on_stdout_is_json_alone(module, tmp_path):
    result = run("report", f"{module}:one", "--out", tmp_path, "--json", "-")
    assert json.loads(result.stdout)["reports"][0]["parameters"] == 43
    result = run("plan", f"{module}:one", "--json", "-")
    assert json.loads(result.stdout)["Sequential"]["native_fraction"] == 1.0
    result = run("spectrum", f"{module}:one", "-k", 2, "--json", "-")
    assert len(json.loads(result.stdout)["Sequential"]["eigenpairs"]["values"]) == 2


@pytest.mark.parametrize("search", [1, 2, 3])
def test_report_ends_on_ctrl_c(module, tmp_path, interrupt_search, search):
    """In the largest eigenvalues, the smallest, and a measure."""
    interrupt_search(search)
    numbers = tmp_path / "numbers.json"
    options = ["--out", tmp_path, "--json", numbers, "--measures", "lambda_max"]
    result = run("report", f"{module}:two", *options, status=130)
    assert result.stderr == "flatcore: interrupted\n" and result.stdout == ""
    assert not numbers.exists() and not (tmp_path / "report.html").exists()


@pytest.mark.filterwarnings("default::flatcore.errors.FlatcoreWarning")
def test_spectrum_keeps_what_it_has_on_ctrl_c(module, tmp_path, interrupt_search):
    interrupt_search(2)
    numbers = tmp_path / "numbers.json"
    result = run("spectrum", f"{module}:two", "-k", 2, "--json", numbers, status=130)
    assert result.stderr.endswith("flatcore: interrupted\n")
    assert "a: hessian" in result.stdout and "b: hessian" in result.stdout
    found = json.loads(numbers.read_text())
    assert found["a"]["eigenpairs"]["status"] == "converged"
    assert found["b"]["eigenpairs"]["status"].startswith("interrupted") and found["b"]["eigenpairs"]["values"]


def test_ctrl_c_elsewhere(module, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flatcore.cli.load_subjects", interrupted)
    for command in ("report", "spectrum", "plan"):
        assert run(command, f"{module}:one", status=130).stderr == "flatcore: interrupted\n"


@pytest.mark.parametrize(
    ("command", "option", "given", "words"),
    [
        ("report", "--out", "/proc/x", "expected a place that can be written, got '/proc/x/report.html'"),
        ("report", "--out", "nets.py", "expected a folder, got the file 'nets.py'"),
        ("report", "--json", "/proc/x/r.json", "expected a place that can be written, got '/proc/x/r.json'"),
        ("report", "--json", "nets.py/r.json", "expected a place that can be written, got 'nets.py/r.json'"),
        ("spectrum", "--json", ".", "expected a file, got the folder '.'; name a file in it"),
        ("plan", "--json", ".", "expected a file, got the folder '.'; name a file in it"),
        ("spectrum", "--density", "d.xyz", "expected a file of the format .png, .pdf or .svg, got 'd.xyz'"),
        ("spectrum", "--density", "/proc/x/d.png", "expected a place that can be written"),
        ("bench", "--figure", "b.xyz", "expected a file of the format .png, .pdf or .svg, got 'b.xyz'"),
        ("bench", "--json", "/proc/x", "expected a place that can be written, got '/proc/x'"),
    ],
)
def test_output_paths_are_checked_before_any_work(module, monkeypatch, command, option, given, words):
    monkeypatch.chdir(module.parent)
    monkeypatch.setattr("flatcore.cli.run_bench", None)
    subject = [] if command == "bench" else [f"{module}:never"]
    result = run(command, *subject, option, given, status=2)
    assert result.stderr.startswith(f"flatcore: {option}: {words}")
    assert result.stderr.count("\n") == 1


def test_folders_are_made_when_there_is_something_to_write(module, tmp_path):
    files = [tmp_path / part for part in ("pages", "numbers/n.json", "pictures/deep/d.svg")]
    run("report", f"{module}:wrong", "--out", files[0], "--json", files[1], status=2)
    assert [p.name for p in tmp_path.iterdir()] == ["nets.py"]
    run("report", f"{module}:one", "--measures", "none", "--out", files[0], "--json", files[1])
    run("spectrum", f"{module}:one", "--density", files[2])
    assert (files[0] / "report.html").exists() and files[1].exists() and files[2].exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_does_not_cost_the_table(module, tmp_path):
    options = ["--measures", "none", "--out", tmp_path, "--json", "/dev/full"]
    result = run("report", f"{module}:one", *options, status=2)
    assert "trace of H" in result.stdout and "No space left" in result.stderr


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_console_without_the_characters(module, tmp_path, charset):
    for command in ("report", "spectrum"):
        options = ["--measures", "relative_flatness", "--out", tmp_path] if command == "report" else []
        arguments = [command, f"{module}:oddly_named", *map(str, options)]
        result = CliRunner(charset=charset).invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert ("+-" if charset == "ascii" else "±") in result.stdout and "a%2Fb lambda" in result.stdout
    assert (tmp_path / "report.html").exists()


def test_tables_stay_aligned_without_the_characters(module):
    result = CliRunner(charset="ascii").invoke(main, ["spectrum", f"{module}:one"])
    assert len({len(line) for line in result.stdout.splitlines()[1:]}) == 1


def test_names_are_no_markup(module, tmp_path):
    result = run("spectrum", f"{module}:oddly_named", "-k", 1, "--density", tmp_path / "d.svg")
    assert "runs[/red]: hessian" in result.stdout and "a/b :100: $x: hessian" in result.stdout
    names = {"d.svg", "d-a%2Fb :100: $x.svg", "d-a%252Fb λ.svg"}
    assert {p.name for p in tmp_path.glob("*.svg")} == names
    result = run("report", f"{module}:oddly_named", "--measures", "none", "--out", tmp_path / "p[/x]")
    assert "runs[/red]" in result.stdout and "a/b :100: $x" in result.stdout
    assert f"page: {tmp_path}/p[/x]/report.html" in result.stdout


def test_progress_bar_takes_any_name(monkeypatch):
    monkeypatch.setattr("flatcore.progress._QUIET_SECONDS", 0.0)
    bar = Bar("runs[/red]", 2, visible=True)
    bar.update(1, "one[/x]")
    bar.close()


def test_picture_is_named_as_written(module, tmp_path):
    result = run("spectrum", f"{module}:one", "--density", tmp_path / "d")
    assert f"density: {tmp_path / 'd.png'}, " in result.stdout and (tmp_path / "d.png").exists()


def test_title_of_a_spectrum_is_one_line(module):
    lines = run("spectrum", f"{module}:one").stdout.splitlines()
    assert re.fullmatch(r"Sequential: hessian, LM, \d+ products, converged", lines[0])


@pytest.mark.filterwarnings("default::flatcore.errors.FlatcoreWarning")
def test_warnings_name_the_subject_where_there_are_several(module):
    result = run("spectrum", f"{module}:two", "--tol", 1e-12)
    assert (
        "flatcore: warning: a: eigsh: " in result.stderr and "flatcore: warning: b: eigsh: " in result.stderr
    )
    assert "flatcore: warning: eigsh: " in run("spectrum", f"{module}:one", "--tol", 1e-12).stderr


def test_spectrum_draws_one_density_per_subject(module, tmp_path):
    result = run("spectrum", f"{module}:two", "-k", 2, "--which", "BE", "--density", tmp_path / "d.svg")
    assert (
        len(re.findall(r"band of 95 % at each point; eigenvalues .* ± .* % within .* of zero", result.stdout))
        == 2
    )
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["d-b.svg", "d.svg"]


@pytest.mark.parametrize("operator", ["hessian", "ggn", "covariance"])
def test_plan(module, operator):
    result = run("plan", f"{module}:objective", "--operator", operator)
    assert "100 % native" in result.stdout
    assert "linear" in result.stdout


def test_doctor():
    result = CliRunner().invoke(main, ["doctor"])
    assert "built for torch" in result.stdout
    facts = json.loads(CliRunner().invoke(main, ["doctor", "--json", "-"]).stdout)
    assert facts["torch"] == str(torch.__version__)
    assert result.exit_code == bool(facts["complaints"])


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("nets.py", "expected path/to/module.py:function"),
        ("missing.py:one", "there is no file"),
        ("{}:absent", "has no function absent; it has empty, never, objective, oddly_named, one"),
        ("{}:constant", "is a int, expected a function"),
        ("{}:wrong", "returned int, expected an Objective"),
        ("{}:raises", "raised RuntimeError: no data today"),
        ("{}:empty", "returned an empty dict"),
    ],
)
def test_wrong_subjects_get_one_sentence(module, subject, words):
    for command in ("report", "spectrum", "plan"):
        result = run(command, subject.format(module), status=2)
        assert words in result.stderr
        assert result.stderr.startswith("flatcore: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output


def test_module_that_does_not_load(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    assert "could not be loaded, ModuleNotFoundError" in run("plan", f"{path}:one", status=2).stderr


def test_wrong_options_name_the_option(module):
    assert "k: expected fewer than" in run("report", f"{module}:one", "-k", 99, status=2).stderr
    assert "tol: expected a positive number" in run("spectrum", f"{module}:one", "--tol", 0, status=2).stderr


def test_debug_shows_the_traceback(module):
    result = CliRunner().invoke(main, ["--debug", "plan", f"{module}:wrong"])
    assert isinstance(result.exception, ValueError)


def test_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", "flatcore", "plan", f"{module}:one"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "100 % native" in done.stdout


def test_help_of_every_command():
    for command in main.commands:
        assert "Usage" in run(command, "--help").stdout
