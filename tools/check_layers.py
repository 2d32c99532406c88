"""Proves that dependencies point one way (docs/design.md, "Layers"): C++ includes and Python imports.

    kernels <- engine;  engine, krylov <- bindings <- flatcore
    foundation <- capture <- objective <- operators <- surface;  foundation <- estimators <- surface
    operators, estimators <- measures <- optim <- surface

Prints each violation as file:line and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CPP_LAYERS = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "krylov": {"krylov"},
    "bindings": {"bindings", "engine", "krylov", "kernels"},
}
TORCH = ("torch/", "ATen/", "c10/", "caffe2/")
PYTHON = ("pybind11/", "Python.h")
CPP_FORBIDDEN = {
    "kernels": TORCH + PYTHON,
    "krylov": TORCH + PYTHON,
    "engine": ("torch/", *PYTHON),
    "bindings": (),
}

# Layer -> its modules of the package (a folder stands for all in it), and the layers it may import from.
PYTHON_LAYERS = {
    "extension": "_C _build",
    "start": "_load",
    "foundation": "errors results progress memory environment changes parameters vectors plan linear quadrature "
    "means spectral",
    "capture": "capture",
    "objective": "data evaluate checks objective",
    "operators": "tuning precision directions graphs compiled cut_rows autograd_maps kept_maps autograd native "
    "backend example_outputs example_sweeps output_rows operators",
    "estimators": "eigsh block_choice krylov_basis krylov_checkpoint warm_start trace sampling projected automatic "
    "by_example solve block_spectra density density_plot adaptive gram functionals",
    "measures": "measures",
    "optim": "optim",
    "surface": "machine bench report track track_views track_callback factory doctor cli cli_output cli_spectrum "
    "__main__ __init__",
}
PYTHON_ALLOWED = {
    "extension": set(),
    "start": {"extension"},
    "foundation": {"foundation", "extension"},
    "capture": {"capture", "foundation"},
    "objective": {"objective", "capture", "foundation"},
    "operators": {"operators", "objective", "capture", "foundation", "extension"},
    "estimators": {"estimators", "foundation", "extension"},
    "measures": {"measures", "estimators", "operators", "objective", "capture", "foundation"},
    "optim": {"optim", "measures", "estimators", "operators", "objective", "capture", "foundation"},
    "surface": set(PYTHON_LAYERS),
}
LAYER_OF = {module: layer for layer, modules in PYTHON_LAYERS.items() for module in modules.split()}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')


def cpp_violations(root: Path) -> Iterator[str]:
    source = root / "csrc"
    for path in sorted(source.rglob("*")):
        if path.suffix not in {".h", ".cpp", ".inl", ".cu"}:
            continue
        layer = path.relative_to(source).parts[0]
        if layer not in CPP_LAYERS:
            yield f"{path.relative_to(root)}:1: {layer} is no layer: name it in tools/check_layers.py"
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not (match := INCLUDE.match(line)):
                continue
            where, header = f"{path.relative_to(root)}:{number}", match[2]
            if header.startswith(CPP_FORBIDDEN[layer]):
                yield f"{where}: {layer} includes <{header}>"
            elif match[1] == '"':
                beside = header.startswith(".") or (path.parent / header).exists()
                folder = path.parent if beside else source
                target = (folder / header).resolve()
                if not target.is_relative_to(source.resolve()):
                    yield f'{where}: {layer} includes "{header}" from outside csrc'
                elif (used := target.relative_to(source.resolve()).parts[0]) not in CPP_LAYERS[layer]:
                    yield f'{where}: {layer} includes "{header}" of {used}'


def imported_modules(tree: ast.AST, package: Path, parents: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, first name below `flatcore`) of each import; `parents` holds the importing module's folders."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "flatcore":
                    yield node.lineno, rest[0] if rest else "__init__"
        elif isinstance(node, ast.ImportFrom):
            names = node.module.split(".") if node.module else []
            if node.level:
                names = [*("flatcore", *parents)[: len(parents) + 2 - node.level], *names]
            if names[:1] != ["flatcore"]:
                continue
            if len(names) > 1:
                yield node.lineno, names[1]
            else:
                for alias in node.names:
                    known = alias.name in LAYER_OF or any(package.glob(f"{alias.name}*"))
                    yield node.lineno, alias.name if known else "__init__"


def python_violations(root: Path) -> Iterator[str]:
    package = root / "flatcore"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        layer = LAYER_OF.get(parts[0])
        if layer is None:
            yield f"{path.relative_to(root)}:1: {parts[0]} is in no layer: name it in tools/check_layers.py"
            continue
        for number, module in imported_modules(ast.parse(path.read_text()), package, parts[:-1]):
            used = LAYER_OF.get(module)
            if used not in PYTHON_ALLOWED[layer]:
                where = f"{path.relative_to(root)}:{number}"
                yield f"{where}: {layer} imports flatcore.{module} ({used or 'no layer'})"


def violations(root: Path) -> list[str]:
    return [*cpp_violations(root), *python_violations(root)]


if __name__ == "__main__":
    found = violations(Path(__file__).parents[1])
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
