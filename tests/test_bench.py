"""The microbenchmark: what it counts and says, on workloads small enough for a test. No time is asserted."""

import contextlib
import importlib.util
import io
import json
import time

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from flatcore._C import engine
from flatcore.bench import (
    WORKLOADS,
    Ceilings,
    Comparison,
    Setting,
    Timing,
    Workload,
    bare_jax,
    command,
    compare,
    measure,
    peers,
    show,
    timeout,
    workloads,
)
from flatcore.bench.bare_torch import joined, split
from flatcore.bench.candidates import torch_ways
from flatcore.bench.compare import math_attention
from flatcore.bench.memory import peak_bytes
from flatcore.cli import main
from tests.reference import Reference

CEILINGS = Ceilings(gemm=1e11, gemm_library="BLAS", bandwidth=1e10)
# The workloads' models at a size whose dense Hessian is cheap.
SMALL = {
    "mlp": lambda: workloads.mlp(5, 6, 4, 3),
    "resnet": lambda: workloads.resnet(2, width=2, size=8),
    "decoder": lambda: workloads.decoder(2, vocabulary=7, tokens=5, width=8, heads=2, depth=1),
    "vit": lambda: workloads.vision_transformer(2, size=8, patch=4, width=8, heads=2, depth=1),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.func.linearize
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("name", SMALL)
def test_every_way_computes_the_operator(name, operator):
    built = Workload(name, name, SMALL[name]).at(torch.float64, torch.device("cpu"), 0)
    reference = Reference(*built, "output_target")
    dense = reference.ggn() if operator == "ggn" else reference.hessian()
    parameters = tuple(built[0].parameters())
    V = torch.randn(3, dense.shape[0], dtype=torch.float64)
    with math_attention():
        for way, prepare in torch_ways(built, operator, compiled=False).items():
            error = (joined(prepare()(split(V, parameters))) - V @ dense).norm() / (V @ dense).norm()
            # torch 2.13: forward-mode differentiation of attention under vmap(grad(jvp)) is wrong.
            assert error < 1e-10 or way == "vmap(grad(jvp))", way


@pytest.mark.parametrize("name", SMALL)
def test_comparison_is_complete(name):
    workload = Workload(name, f"small {name}", SMALL[name])
    result = compare(workload, 2, CEILINGS, rounds=3, limit=0.0, compiled=False)
    assert [t.median for t in result.timings] == sorted(t.median for t in result.timings)
    ours = result.timing("flatcore")
    assert ours.kind == "flatcore" and ours.error < 1e-5 and len(ours.seconds) == 3
    known = {t.way for t in result.timings} | result.left_out.keys()
    assert {"retained double backward", "vmap(jvp(grad))", "linearize"} <= known
    assert set(peers.installed("hessian")) <= known
    # Directions and result are within the peak: 2 K P floats.
    assert ours.peak_bytes >= 4 * 2 * 2 * result.parameters / 2
    assert result.floor > result.flops / CEILINGS.gemm


def test_float64_is_held_to_its_own_error():
    workload = Workload("mlp", "MLP", SMALL["mlp"])
    result = compare(workload, 2, CEILINGS, setting=Setting("float64"), rounds=3, limit=0.0, compiled=False)
    assert result.setting == Setting("float64", "cpu")
    assert len(result.timings) > 1 and all(t.error < 1e-12 for t in result.timings)
    # Twice as wide: the same counts of flops and numbers.
    assert result.floor == pytest.approx(
        result.flops / CEILINGS.gemm + 8 * result.parameters * (2 + 1 / 2) / CEILINGS.bandwidth
    )


def test_workload_is_the_same_in_every_dtype():
    narrow, wide = (
        WORKLOADS["mlp-tiny"].at(dtype, torch.device("cpu"), 3) for dtype in (torch.float32, torch.float64)
    )
    for a, b in zip(narrow[0].parameters(), wide[0].parameters(), strict=True):
        assert b.dtype == torch.float64 and torch.equal(a.double(), b)
    assert wide[2][0].dtype == torch.float64
    assert torch.equal(narrow[2][0].double(), wide[2][0]) and torch.equal(narrow[2][1], wide[2][1])


def test_ceilings_of_both_dtypes():
    for dtype in (torch.float32, torch.float64):
        found = measure(dtype, repeats=1)
        assert found.gemm > 0 and found.bandwidth > 0
    assert found.gemm_library == "BLAS"


@pytest.mark.skipif(not engine.bf16_available(), reason="the processor has no instructions for bfloat16")
def test_precision_is_flatcores_alone():
    """The other ways stay in full; flatcore's error is that of some roundings to 8 bits."""
    workload = Workload("mlp", "MLP", lambda: workloads.mlp(64, 70, 96, 80))
    setting = Setting(precision="bf16")
    result = compare(
        workload, 2, CEILINGS, setting=setting, rounds=3, limit=0.0, compiled=False, only=["linearize"]
    )
    assert 2.0**-11 < result.timing("flatcore").error < 8 * 2.0**-8
    assert result.timing("linearize").error < 1e-5
    shown = Console(width=120, record=True, file=io.StringIO())
    shown.print(show.table(result, CEILINGS))
    assert "K = 2, flatcore in bf16" in shown.export_text()
    assert measure(repeats=1, precision="bf16").gemm > 0


def test_precision_that_does_not_fit():
    with pytest.raises(ValueError, match='precision: expected "full" with float64, got "bf16"'):
        Setting("float64", precision="bf16")
    with pytest.raises(ValueError, match='precision: expected "full" or "bf16" on the CPU, got "tf32"'):
        Setting(precision="tf32")
    with pytest.raises(ValueError, match="precision: expected one of full, tf32, bf16, got 'fp8'"):
        Setting(precision="fp8")


def test_device_that_is_not_there():
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=rf"device: expected .* \(cpu.*\), got '{device}'"):
            Setting(device=device)
    with pytest.raises(ValueError, match="dtype: expected one of float32, float64, got 'int8'"):
        Setting("int8")
    ran = CliRunner().invoke(main, ["bench", "--device", "cuda:99"])
    assert ran.exit_code == 2 and ran.output.count("\n") == 1 and "got 'cuda:99'" in ran.output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_comparison_on_cuda():
    workload = Workload("mlp", "MLP", SMALL["mlp"])
    result = compare(
        workload, 2, CEILINGS, setting=Setting(device="cuda"), rounds=3, limit=0.0, compiled=False
    )
    assert result.timing("flatcore").peak_bytes >= 4 * 2 * 2 * result.parameters / 2
    assert measure(device=torch.device("cuda"), repeats=1).gemm_library == "cuBLAS"


def test_gauss_newton_comparison():
    workload = Workload("decoder", "decoder", SMALL["decoder"])
    setting = Setting(operator="ggn")
    result = compare(workload, 2, CEILINGS, setting=setting, rounds=3, limit=0.0, compiled=False)
    known = {t.way for t in result.timings} | result.left_out.keys()
    assert {"flatcore", "double backward", "jvp + vjp", "linearize + vjp"} <= known
    assert set(peers.installed("ggn")) <= known and "pyhessian" not in known
    hessian = compare(workload, 2, CEILINGS, rounds=3, limit=0.0, compiled=False, only=["linearize"])
    assert 0 < result.flops < hessian.flops


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_jax_computes_the_operator(operator, dtype):
    workload = Workload("mlp", "MLP", SMALL["mlp"])
    setting = Setting(dtype, operator=operator)
    result = compare(workload, 3, CEILINGS, setting=setting, rounds=3, limit=0.0, compiled=False)
    found = [t for t in result.timings if t.kind == "jax"]
    assert len(found) == 2 and all(t.way.startswith("jax (jit) ") for t in found)
    assert all(t.error < (1e-5 if dtype == "float32" else 1e-12) and t.peak_bytes is None for t in found)
    assert all(t.error > 1e-9 for t in found) or dtype == "float64"
    assert any("the best jax way" in line for line in show.summary([result]))


def test_jax_is_for_fully_connected_nets():
    built = Workload("resnet", "resnet", SMALL["resnet"]).at(torch.float32, torch.device("cpu"), 0)
    assert not bare_jax.fits(built)


def test_way_that_is_never_ready_is_left_out():
    workload = Workload("mlp", "MLP", SMALL["mlp"])
    result = compare(
        workload,
        1,
        CEILINGS,
        rounds=3,
        limit=0.0,
        compiled=False,
        prepare_limit=1e-4,
        only=["vmap(jvp(grad))"],
    )
    assert result.left_out == {"vmap(jvp(grad))": "TimeoutError: not ready after 0.0001 s"}


def test_peak_counts_what_is_held_at_once():
    def run():
        a = torch.empty(1000, dtype=torch.float64)
        b = torch.empty(2000, dtype=torch.float64)
        del a
        return torch.empty(500, dtype=torch.float64), b

    assert peak_bytes(run, torch.device("cpu")) == 8 * 3000


def test_floor_counts_arithmetic_and_bytes():
    workload = Workload("mlp", "MLP", lambda: workloads.mlp(5, 6, 4, 3))
    result = compare(workload, 4, CEILINGS, rounds=3, limit=0.0, compiled=False)
    P = 6 * 4 + 4 + 4 * 3 + 3
    assert result.parameters == P
    assert result.floor == pytest.approx(result.flops / 1e11 + 4 * P * (2 + 1 / 4) / 1e10)


def test_summary_is_the_geometric_mean():
    def comparison(ours: float, theirs: float) -> Comparison:
        timings = (
            Timing("flatcore", "flatcore", (ours,), 0.0, 0),
            Timing("linearize", "torch", (theirs,), 0.0, 0),
            Timing("double", "torch", (2 * theirs,), 0.0, 0),
        )
        return Comparison("w", "w", 8, 10, timings, 1.0, 1.0, ours / 2, {})

    lines = show.summary([comparison(1.0, 2.0), comparison(1.0, 8.0)])
    assert lines == [
        "K = 8: against the best bare-torch way 4.00x (geometric mean of 2; least 2.00x)",
        "K = 8: 2.00x the floor",
    ]


def test_workload_that_needs_a_missing_package_says_so():
    workload = Workload("w", "w", lambda: workloads.mlp(1, 1, 1), needs="no_such_package")
    assert workload.missing() == "w needs the package no_such_package, which is not installed"
    assert WORKLOADS["mlp-tiny"].missing() == ""


def test_only_the_ways_asked_for():
    arguments = ["bench", "--workload", "mlp-tiny", "-k", "1", "--limit", "0", "--quick"]
    ran = CliRunner().invoke(main, [*arguments, "--way", "linearize"])
    assert ran.exit_code == 0 and "linearize" in ran.output and "retained" not in ran.output
    ran = CliRunner().invoke(main, [*arguments, "--way", "magic"])
    assert ran.exit_code == 2 and "way: expected some of flatcore, retained double backward" in ran.output


@pytest.mark.parametrize("option", [("--rounds", "0"), ("--limit", "-1"), ("--prepare-limit", "0")])
def test_ranges_of_options(option):
    ran = CliRunner().invoke(main, ["bench", "--quick", "--workload", "mlp-tiny", *option])
    assert ran.exit_code == 2 and f"Invalid value for '{option[0]}'" in ran.output


def test_reasons_are_no_markup():
    missing = Workload("w", "w", SMALL["mlp"], needs="no_such_package[/x]")
    shown = Console(width=120, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(WORKLOADS, "w", missing)
        patched.setattr(command, "measure", lambda *_, **__: CEILINGS)
        options = {"quick": True, "ways": (), "rounds": 3, "limit": 0.0, "prepare_limit": 1.0}
        command.run(["w"], [1], setting=Setting(), say=shown.print, **options)
    assert "left out: w needs the package no_such_package[/x]" in shown.export_text()


def test_command_writes_table_figure_and_json(tmp_path):
    picture, numbers = tmp_path / "b.png", tmp_path / "b.json"
    arguments = [
        "bench",
        "--quick",
        "--workload",
        "mlp-tiny",
        "-k",
        "2",
        "--limit",
        "0",
        "--dtype",
        "float64",
    ]
    ran = CliRunner().invoke(main, [*arguments, "--figure", str(picture), "--json", str(numbers)])
    assert ran.exit_code == 0, ran.output
    assert "cpu" in ran.output.splitlines()[0] and "float64" in ran.output.splitlines()[0]
    assert "MLP 64-32-10" in ran.output and "retained double backward" in ran.output and "floor" in ran.output
    document = json.loads(numbers.read_text())
    assert document["schema"] == "flatcore-bench/1"
    assert document["setting"] == {
        "dtype": "float64",
        "device": "cpu",
        "operator": "hessian",
        "precision": "full",
    }
    assert document["comparisons"][0]["K"] == 2 and document["machine"]["torch"] == str(torch.__version__)
    assert picture.stat().st_size > 1000


def test_a_limit_that_something_swallows_is_told_again(monkeypatch):
    monkeypatch.setattr(timeout, "_AGAIN", 0.05)

    def swallows() -> None:
        with timeout.at_most(0.05):
            with contextlib.suppress(TimeoutError):
                time.sleep(10)
            time.sleep(10)

    with pytest.raises(TimeoutError, match="not ready after"):
        swallows()
