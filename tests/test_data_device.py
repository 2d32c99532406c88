"""Batches on the CPU where the parameters are not: to the device, as a whole, and again where they change.

The device is torch's "meta", whose tensors have no numbers: what lies where shows without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import flatcore as fc
from flatcore.capture.batch import batch_leaves
from flatcore.data import Data, count_examples
from flatcore.evaluate import takes_apart

AWAY = torch.device("meta")
X, Y = torch.randn(6, 3), torch.arange(6)
LISTED = [{"x": X[:4], "of": "a", "y": Y[:4]}, {"x": X[4:], "of": "b", "y": Y[4:]}]
LOADED = DataLoader(TensorDataset(X, Y), batch_size=4)


def data(source: object, budget: int = 1 << 20, device: torch.device = AWAY) -> Data:
    return Data(source, budget, count_examples, device)


def places(batch: object) -> set[str]:
    return {leaf.device.type for leaf in batch_leaves(batch)}


@pytest.mark.parametrize("source", [(X, Y), LISTED, LOADED], ids=["batch", "list", "loader"])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_goes_to_the_device(source: object, budget: int) -> None:
    moved, kept = data(source, budget), data(source, budget, torch.device("cpu"))
    for _ in range(2):
        assert [places(batch) for batch in moved] == [{"meta"}] * len(moved)
        assert [places(batch) for batch in kept] == [{"cpu"}] * len(kept)
    shapes = [[leaf.shape for leaf in batch_leaves(batch)] for batch in moved]
    assert shapes == [[leaf.shape for leaf in batch_leaves(batch)] for batch in kept]
    assert moved.examples == kept.examples


def test_what_is_no_tensor_stays() -> None:
    assert [batch["of"] for batch in data(LISTED)] == ["a", "b"]


def test_a_batch_with_a_tensor_elsewhere_is_left_alone() -> None:
    batch = (X.to(AWAY), Y)
    (seen,) = data(batch)
    assert seen is batch


@pytest.mark.parametrize("device", [AWAY, torch.device("cpu")])
def test_a_change_in_place_is_seen(device: torch.device) -> None:
    """Only the batch that changed is taken again; no copy is made where it lies on the device already."""
    source = [(X.clone(), Y), (X + 1, Y)]
    held = data(source, device=device)
    before, versions = list(held), held.versions()
    assert all(a is b for a, b in zip(held, before, strict=True))
    source[1][0].zero_()
    assert held.versions() != versions
    first, second = held
    assert first is before[0]
    assert (second is before[1]) == (device.type == "cpu")


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("before", [True, False], ids=["changed before", "changed after"])
@pytest.mark.parametrize("device", [AWAY, torch.device("cpu")])
def test_a_derived_objective_sees_the_same_changes(budget: int, before: bool, device: torch.device) -> None:
    """It shares the list and the copies, and neither serves what was there before a change."""
    source = [(X.clone(), Y), (X + 1, Y)]
    outer = data(source, budget, device)
    if before:
        old = list(outer)
        source[1][0].zero_()
    inner = data(outer.again, 1 << 20, torch.device("cpu"))
    assert inner.examples == outer.examples
    assert [places(batch) for batch in inner] == [{device.type}] * 2
    if before and budget:
        assert (next(iter(inner)) is old[0], list(inner)[1] is old[1]) == (True, device.type == "cpu")
    versions = inner.versions()
    source[0][0].zero_()
    assert inner.versions() == outer.versions() != versions
    if budget:
        assert all(a is b for a, b in zip(inner, outer, strict=True))


def test_a_derived_objective_takes_a_loaders_batches_as_they_are() -> None:
    outer = data(LOADED)
    inner = data(outer.again, device=torch.device("cpu"))
    assert all(a is b for a, b in zip(inner, outer, strict=True))


@pytest.mark.parametrize(
    ("loss", "taken"),
    [
        (torch.nn.MSELoss(), True),
        (torch.nn.functional.cross_entropy, True),
        (fc.hf_loss(), True),
        (fc.ModelLoss(lambda model, batch: model(batch[0]).sum()), False),
    ],
    ids=["module", "function", "hf_loss", "own"],
)
def test_a_batch_of_the_callers_own_function_is_left_alone(loss: object, taken: bool) -> None:
    assert takes_apart(loss) == taken


def test_a_packed_sequence_is_to_be_moved_by_its_owner() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"data: expected .* moved to meta.*; move it there yourself"):
        data([(packed, Y[:2])])
    batch = (packed.to("meta"), Y[:2])
    assert next(iter(data([batch]))) is batch


def test_a_list_that_grows_later_is_as_it_was() -> None:
    source = [(X, Y)]
    held = data(source, budget=0)
    source.append((X, Y))
    assert len(list(held)) == len(held) == 1
