"""pytest under a simulated GPU: a test fails on a complaint of the runtime, whatever it finds itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.simulated import numerics

CUDA = ctypes.CDLL(None)
CUDA.simulated_complaints.restype = ctypes.c_char_p

# Where memory of a real device runs out. test_fewer_directions_of_a_small_net shows it here.
FOR_A_DEVICE = {
    "test_fewer_directions_where_memory_runs_out": "1 GiB of tangents for every layer",
    "test_not_even_one_direction": "131072 examples",
}


def complaints() -> list[str]:
    """Those of the runtime since the last call, each once."""
    return sorted(set(CUDA.simulated_complaints().decode().splitlines()))


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        pytest.exit("torch does not see the simulated devices", returncode=1)
    torch.backends.cudnn.enabled = False  # it would speak to the driver by itself
    numerics.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = FOR_A_DEVICE.get(item.name)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"sizes meant for a real device: {reason}"))


@pytest.fixture(autouse=True)
def _no_complaints() -> Iterator[None]:
    complaints()
    yield
    found = complaints()
    assert not found, "the simulated runtime: " + "; ".join(found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = (ctypes.c_long * 4)()
    CUDA.simulated_counts(counts)
    launches, recorded, graphs, replays = counts
    terminalreporter.write_line(
        f"simulated CUDA: {launches} launches and copies, {recorded} of them recorded into {graphs} graphs, "
        f"{replays} replays"
    )
