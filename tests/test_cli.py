"""The command line: what it prints, what it writes, one sentence for each wrong input."""

import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import flatcore as fc
from flatcore.cli import main

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

def wrong():
    return 3

def raises():
    raise RuntimeError("no data today")

def empty():
    return {}

constant = 5
"""


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
        ("{}:absent", "has no function absent; it has empty, objective, one, raises, two, wrong"),
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
