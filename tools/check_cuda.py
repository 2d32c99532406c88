"""Checks the CUDA side where there is no GPU.

1. Host: tests/cuda, the kernels as emulated threads (csrc/kernels/cuda_shim.h) under the sanitizers.
2. The engine: the extension whose kernel calls all take the CUDA path, emulated (tests/emulated), held to the table of
   cases by the engine's own tests.
3. Where nvcc is found: every csrc/kernels/*.cu compiles for all architectures without a warning and without
   a spilled register; so do the programs of tests/cuda; the C++ that differs in a CUDA build compiles against the
   installed torch's headers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda-check"
ARCHITECTURES = (80, 90, 100)
# What a CUDA build compiles otherwise stands in engine/on_device.h; any file that calls kernels will do. That all calls
# match their kernels shows in the emulated build.
HOST_CODE = ("engine/rules/unary.cpp", "engine/float32_products.cpp", "bindings/tall_rows.cpp")
# In float64, where an index that is wrong cannot hide behind rounding, but for what rounds.
ENGINE_TESTS = (
    "tests/test_engine.py::test_hessian",
    "tests/test_engine.py::test_ggn",
    "tests/test_engine.py::test_gradient_covariance",
    "tests/test_parts.py",
    "tests/test_gpu_convolution.py",
    "tests/test_changes.py",
    "tests/test_gpu_attention.py",
    "tests/test_gpu_rounding.py",
    "--tb=short",
    "-rs",
    "-p",
    "no:cacheprovider",
)
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Output of a command run at the root; ends the check with that output where the command fails."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\ncheck-cuda: failed: {' '.join(map(str, command))}")
    return result.stdout


def check_host() -> None:
    build = BUILD / "host"
    run("cmake", "-S", "tests/cuda", "-B", build, "-G", "Ninja")
    run("cmake", "--build", build)
    run("ctest", "--test-dir", build, "--output-on-failure", "--parallel", str(os.cpu_count() or 1))
    tests = len(list((ROOT / "tests" / "cuda").glob("*_test.cpp")))
    print(f"check-cuda: {tests} test programs pass with emulated threads, forward and backward")


def check_engine() -> None:
    build = ROOT / "build" / "dev"
    if not (build / "CMakeCache.txt").exists():
        sys.exit("check-cuda: no build in build/dev: run `make dev` first")
    run("cmake", "--build", build, "--target", "emulated")
    package = build / "tests" / "emulated" / "package"
    path = os.pathsep.join([str(package), str(ROOT)])
    command: list[str | Path] = [
        Path(sys.executable).with_name("pytest"),
        *ENGINE_TESTS,
        "-n",
        "auto",
        "--maxprocesses",
        "8",
    ]
    print(run(*command, environment={"PYTHONPATH": path}).strip().splitlines()[-1])
    print("check-cuda: the engine is right on the CUDA path, emulated")


def compile_kernels(source: Path) -> str:
    """Compiles one file for every architecture; returns the report line, or ends the check at a spill."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", "-Icsrc", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    target = BUILD / f"{source.name}.o"
    output = run("nvcc", *flags, *codes, "--threads=0", "-c", source, "-o", target)
    kernels = [match.groupdict() for match in KERNEL.finditer(output)]
    if len(kernels) != output.count("Compiling entry function") or not kernels:
        sys.exit(f"{output}\ncheck-cuda: {source.name}: the report of ptxas is not understood")
    spilled = [k for k in kernels if int(k["stores"]) or int(k["loads"])]
    if spilled:
        lines = [f"  {k['name']} on sm_{k['arch']}: {k['stores']} bytes stored" for k in spilled]
        sys.exit("\n".join([f"check-cuda: {source.name}: registers are spilled", *lines]))
    per_arch = ", ".join(
        f"sm_{arch} {max(int(k['registers']) for k in kernels if k['arch'] == str(arch))}"
        for arch in ARCHITECTURES
    )
    count = len(kernels) // len(ARCHITECTURES)
    return f"check-cuda: {source.relative_to(ROOT)}: {count} kernels, no spill, registers at most {per_arch}"


def compile_host_code(source: Path, cuda_include: Path) -> None:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("check-cuda: no torch in this Python: run `make dev` first")
    torch = Path(spec.origin).parent / "include"
    python = sysconfig.get_path("include")
    system = [torch, torch / "torch/csrc/api/include", cuda_include, python]
    flags = ["-std=c++20", "-fsyntax-only", "-Icsrc", "-Wall", "-Wextra", "-Werror", "-fopenmp"]
    defines = ["-DFLATCORE_WITH_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    run(os.environ.get("CXX", "g++"), *flags, *defines, *(f"-isystem{path}" for path in system), source)


def compile_program(source: Path) -> None:
    """A test program as tools/gpu_check builds it, for one architecture."""
    flags = ["-std=c++20", "-Icsrc", "-DFLATCORE_SYNCHRONOUS", "--Werror=all-warnings", "-arch=sm_90"]
    host = "-Xcompiler=-Wall,-Wextra,-fopenmp"
    run("nvcc", "-x", "cu", *flags, host, "-c", source, "-o", BUILD / f"{source.name}.o")


def check_device(nvcc: str) -> None:
    # "#$ TOP=..." of a dry run is the toolkit's folder, also where nvcc is reached through a wrapper script.
    dry_run = run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.M)
    if not top:
        sys.exit(f"{dry_run}\ncheck-cuda: {nvcc} does not say where its toolkit is")
    kernels = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(compile_kernels, kernels):
            print(line)
        programs = [
            path for path in (ROOT / "tests" / "cuda").glob("*_test.cpp") if path.name != "shim_test.cpp"
        ]
        list(pool.map(compile_program, programs))
        print(f"check-cuda: {len(programs)} test programs compile for a GPU")
        include = Path(top[1].strip()) / "include"
        list(pool.map(lambda name: compile_host_code(ROOT / "csrc" / name, include), HOST_CODE))
    print(f"check-cuda: {len(HOST_CODE)} C++ files compile as in a CUDA build")


if __name__ == "__main__":
    BUILD.mkdir(parents=True, exist_ok=True)
    check_host()
    check_engine()
    if nvcc := shutil.which("nvcc"):
        check_device(nvcc)
    else:
        print("check-cuda: no nvcc here: the kernels are not compiled for a GPU")
