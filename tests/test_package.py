"""The package refuses a torch it does not fit in one sentence, and its layers point one way."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flatcore
from flatcore import _build, _load

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def import_error(tmp_path: Path):
    """A copy of the start of the package under another torch or build: what `import flatcore` says there."""

    def run(torch: str | None, built: str | None) -> str:
        package = tmp_path / "flatcore"
        package.mkdir()
        (package / "__init__.py").write_text("from flatcore import _load as _load")
        (package / "_load.py").write_text((ROOT / "flatcore" / "_load.py").read_text())
        if torch:
            (tmp_path / "torch.py").write_text(f"__version__ = {torch!r}")
        if built:
            (package / "_build.py").write_text(f"TORCH_VERSION = {built!r}")
        # -I -S: neither this environment's torch nor its flatcore is on the path.
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import flatcore"
        result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
        assert result.returncode == 1
        return result.stderr.strip().splitlines()[-1]

    return run


def test_another_minor_version_of_torch_says_how_to_rebuild(import_error) -> None:
    assert import_error("2.11.0", "2.13.0+cpu") == (
        "ImportError: flatcore was built for torch 2.13.0+cpu, found 2.11.0: "
        "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


@pytest.mark.parametrize("version", ["2.10.2", "2.14.0+cu130", "3.0.0a0+git1"])
def test_a_torch_outside_the_range_is_refused(import_error, version: str) -> None:
    message = import_error(version, "2.13.0")
    assert message.startswith(
        f"ImportError: flatcore works with torch >=2.11,<2.14, found {version}: install"
    )


def test_a_tree_without_a_build_says_make_dev(import_error) -> None:
    assert "run `make dev`" in import_error("2.13.0", None)


def test_a_build_for_another_python_says_make_dev(import_error) -> None:
    assert "is not built for this Python" in import_error("2.13.1", "2.13.0")


def test_no_torch_says_so(import_error) -> None:
    assert import_error(None, "2.13.0").startswith("ImportError: flatcore needs torch, found none")


def test_a_binary_that_does_not_load_says_how_to_rebuild(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another build of the same torch version: the linker's complaint stays as the cause."""
    suffix = importlib.util.find_spec("flatcore._C").origin.split("_C", 1)[1]
    (tmp_path / f"_C{suffix}").write_text("not a shared library")
    monkeypatch.setattr(flatcore, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "flatcore._C")
    with pytest.raises(ImportError, match="rebuild with") as error:
        _load.load()
    assert isinstance(error.value.__cause__, ImportError)


def test_the_supported_range_is_the_one_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'"torch>=(\S+),<([^"]+)"', text)
    assert match
    assert _load.minor_version(match[1]) == _load.LOWEST_TORCH
    assert _load.minor_version(match[2]) == _load.FIRST_UNSUPPORTED_TORCH


def test_the_build_records_what_it_was_made_with() -> None:
    import torch

    assert _load.minor_version(_build.TORCH_VERSION) == _load.minor_version(torch.__version__)
    assert _build.COMPILER and _build.CUDA


def test_layers_hold() -> None:
    assert script("check_layers").violations(ROOT) == []


# path, text, where in it the violation stands, and what is said of it
VIOLATIONS = [
    ("csrc/kernels/a.cpp", "#include <cmath>\n#include <ATen/core/Tensor.h>\n", 2, "includes <ATen/core"),
    ("csrc/kernels/a.cu", "#  include <c10/cuda/CUDAStream.h>\n", 1, "kernels includes <c10"),
    ("csrc/kernels/a.h", '#include "engine/rule.h"\n', 1, "of engine"),
    ("csrc/kernels/a.inl", '#include "../engine/rule.h"\n', 1, "of engine"),
    ("csrc/krylov/a.h", "#include <torch/csrc/utils/pybind.h>\n", 1, "krylov includes <torch"),
    ("csrc/krylov/a.h", '#include "kernels/gather.h"\n', 1, "of kernels"),
    ("csrc/engine/a.cpp", "\n#include <pybind11/pybind11.h>\n", 2, "engine includes <pybind11"),
    ("csrc/engine/rules/a.cpp", '#include "../../bindings/module.h"\n', 1, "of bindings"),
    ("csrc/other/a.h", "", 1, "other is no layer"),
    ("flatcore/errors.py", "import torch\nfrom flatcore import objective\n", 2, "imports flatcore.objective"),
    ("flatcore/capture/a.py", "from ..objective import Objective\n", 1, "imports flatcore.objective"),
    ("flatcore/capture/b/a.py", "from ... import operators\n", 1, "imports flatcore.operators"),
    (
        "flatcore/trace.py",
        "def f():\n    from flatcore.objective import Objective\n",
        2,
        "estimators imports",
    ),
    ("flatcore/objective.py", "import flatcore._C\n", 1, "imports flatcore._C"),
    ("flatcore/operators.py", "import flatcore\n", 1, "imports flatcore.__init__"),
    ("flatcore/unheard_of.py", "", 1, "unheard_of is in no layer"),
]


@pytest.mark.parametrize(("path", "text", "line", "message"), VIOLATIONS)
def test_a_violated_layer_is_found(tmp_path: Path, path: str, text: str, line: int, message: str) -> None:
    for folder in ("csrc", "flatcore"):
        (tmp_path / folder).mkdir()
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    (found,) = script("check_layers").violations(tmp_path)
    assert found.startswith(f"{path}:{line}: ")
    assert message in found


def test_permitted_dependencies_pass(tmp_path: Path) -> None:
    files = {
        "csrc/kernels/a.cpp": '#include "a.h"\n#include <cmath>\n',
        "csrc/kernels/a.h": "",
        "csrc/engine/a.cpp": '#include <ATen/core/Tensor.h>\n#include "../kernels/a.h"\n',
        "csrc/bindings/a.cpp": '#include <torch/csrc/utils/pybind.h>\n#include "engine/a.h"\n',
        "flatcore/trace.py": "from flatcore import _C\nfrom .errors import FlatcoreWarning\n",
        "flatcore/cli.py": "import flatcore\nfrom flatcore.trace import trace\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert script("check_layers").violations(tmp_path) == []
