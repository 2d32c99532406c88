"""What `flatcore bench` runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from flatcore.bench import show
from flatcore.bench.ceilings import measure
from flatcore.bench.compare import Comparison, compare
from flatcore.bench.setting import Setting
from flatcore.bench.workloads import WORKLOADS


def chosen(names: Iterable[str], quick: bool) -> list[str]:
    """The workloads asked for; without names all, or the small ones when quick."""
    return list(names) or [w.name for w in WORKLOADS.values() if not (quick and w.large)]


def run(
    names: list[str],
    vectors: Iterable[int],
    *,
    setting: Setting,
    quick: bool,
    ways: Collection[str],
    rounds: int,
    limit: float,
    prepare_limit: float,
    say: Callable[[Any], None],
    picture: Path | None = None,
) -> dict[str, Any]:
    """Run the workloads, `say` each table as it is ready, and give the JSON document."""
    ceilings = measure(setting.torch_dtype, setting.torch_device, precision=setting.precision)
    say(
        f"{setting.operator}, {_numbers(setting)}, {_place(setting)}: GEMM {ceilings.gemm / 1e9:.0f} Gflop/s "
        f"({ceilings.gemm_library}), copy {ceilings.bandwidth / 1e9:.0f} GB/s"
    )
    results: list[Comparison] = []
    for name in names:
        missing = WORKLOADS[name].missing()
        if missing:
            say(escape(f"left out: {missing}"))
            continue
        for K in vectors:
            result = compare(
                WORKLOADS[name],
                K,
                ceilings,
                setting=setting,
                rounds=rounds,
                limit=limit,
                prepare_limit=prepare_limit,
                compiled=not quick,
                only=ways,
            )
            results.append(result)
            say(show.table(result, ceilings))
            for way, reason in result.left_out.items():
                say(escape(f"left out: {way}: {reason}"))
    for line in show.summary(results):
        say(line)
    if picture is not None and results:
        picture.parent.mkdir(parents=True, exist_ok=True)
        show.figure(results, picture)
    return show.document(results, setting, ceilings)


def _numbers(setting: Setting) -> str:
    rounded = "" if setting.precision == "full" else f", flatcore's products in {setting.precision}"
    return setting.dtype + rounded


def _place(setting: Setting) -> str:
    if setting.torch_device.type == "cuda":
        return f"{setting.device} ({torch.cuda.get_device_name(setting.torch_device)})"
    threads = torch.get_num_threads()
    return f"{setting.device}, {threads} {'thread' if threads == 1 else 'threads'}"
