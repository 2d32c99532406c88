"""torch's settings for float32 on a GPU: set while a product runs, then as they were. Settings need no GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flatcore._C import engine
from flatcore.environment import ONE_AT_A_TIME
from flatcore.operators import _full_precision_on

MATMUL, CONV, RNN = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def settings() -> dict[str, Any]:
    return {
        "matmul": MATMUL.fp32_precision,
        "convolution": CONV.fp32_precision,
        "recurrent": RNN.fp32_precision,
        "matmul, by its old name": torch.backends.cuda.matmul.allow_tf32,
        "old name": torch.get_float32_matmul_precision(),
        "cudnn, by its old name": torch.backends.cudnn.allow_tf32,
    }


def leave(name: str) -> None:
    if name in ("high", "medium"):
        torch.set_float32_matmul_precision(name)
    elif name == "exact convolutions":
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("precision", ["full", "tf32", "bf16"])
@pytest.mark.parametrize("user", ["default", "high", "medium", "exact convolutions"])
def test_set_and_put_back(user: str, precision: str) -> None:
    leave(user)
    before = settings()
    rounds = precision != "full"
    with engine.Float32Products("cuda:0", precision):
        inside = settings()  # torch's getters throw where its old and new settings differ
        assert (inside["matmul"] == "tf32") == rounds == inside["matmul, by its old name"]
        assert (inside["convolution"] == "tf32") == rounds == inside["cudnn, by its old name"]
        with engine.Float32Products("cuda:0", "full"):
            assert settings()["convolution"] != "tf32"
        assert settings() == inside
        with torch.backends.cudnn.flags(enabled=True):
            pass
    assert settings() == before


def test_nothing_on_the_cpu() -> None:
    before = settings()
    with engine.Float32Products("cpu", "tf32"):
        assert settings() == before


def test_a_product_and_a_measure_do_not_wait_for_each_other() -> None:
    """A product asks for the settings and then for its states, a measure the other way round."""
    done = []

    def product() -> None:
        with _full_precision_on(torch.device("cuda")):
            began.set()
            with ONE_AT_A_TIME:
                done.append("product")

    def measure() -> None:
        with ONE_AT_A_TIME:
            threads[1].start()
            began.wait(0.5)  # until it has the settings, if it takes them first
            with engine.Float32Products("cuda"):
                done.append("measure")

    began = threading.Event()
    threads = [threading.Thread(target=work, daemon=True) for work in (measure, product)]
    threads[0].start()
    threads[0].join(10)
    threads[1].join(10)
    assert done == ["measure", "product"]
