"""The three forms of data: one batch, a list of batches, a loader that can be read again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcore import changes
from flatcore.capture.batch import batch_leaves, flatten_batch
from flatcore.environment import ONE_AT_A_TIME

_END = object()
Batch = Any  # a tuple, a dict, a tensor, or any tree of these


class Data:
    """Batches that can be read any number of times, always the same ones in the same order.

    A batch that lies on the CPU as a whole is copied to `device`, and one of a list again where the list's has changed;
    a batch with tensors elsewhere is left as it was made. Another's list is shared, with the copies that it holds.

    Batches are held in memory while they fit into `budget` bytes, those of a loader as copies, because a
    loader may fill the same tensors again; a loader that does not fit is read again
    on every pass, with the random generators set to where they stood on the first pass and set back
    afterwards, so that shuffling and augmentation repeat. A pass that differs in its batch sizes from the
    first is an error. `count(batch, index)` gives the number of examples of a batch.
    """

    def __init__(
        self, data: Any, budget: int, count: Callable[[Batch, int], int], device: torch.device
    ) -> None:
        self._count = count
        self._device = device
        self._given: tuple[Batch, ...]
        self._versions: list[bytes]
        self._held: list[Batch] | None = None
        self._moved = False
        if isinstance(data, Data) and data._given:
            self._given, self._versions = data._given, data._versions
            self._device, self._held, self._moved = data._device, data._held, data._moved
            self.examples = tuple(count(batch, index) for index, batch in enumerate(self._given))
            return
        self._source = _source(data)
        self._given = tuple(self._source) if isinstance(self._source, list) else ()
        self._versions = self._versions_given()
        self._random_state = _random_state(self._source)
        held: list[Batch] = []
        counts: list[int] = []
        storages: dict[int, int] = {}
        for index, (batch, shared) in enumerate(self._read()):
            counts.append(self._count(batch, index))
            if not shared:
                storages |= {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in batch_leaves(batch)
                }
                self._moved = bool(self._given)
            if shared or sum(storages.values()) <= budget:
                held.append(batch)
            else:
                held.clear()
                storages.clear()
                budget = -1
        if not counts:
            raise ValueError("data: expected at least one batch, got none")
        self.examples = tuple(counts)
        if len(held) == len(counts):
            self._held = held

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Batch]:
        if self._held is not None:
            self._renew(self._held)
            yield from self._held
            return
        counts: list[int] = []
        for index, (batch, _) in enumerate(self._read()):
            counts.append(self._count(batch, index))
            if tuple(counts) != self.examples[: len(counts)]:
                break
            yield batch
        if tuple(counts) != self.examples:
            raise ValueError(
                "data: expected every pass to give the batch sizes of the first "
                f"({_sizes(self.examples)}), got {_sizes(counts)}; pass a list of batches or a loader that "
                "repeats"
            )

    def _renew(self, held: list[Batch]) -> None:
        """Takes the batches of the list that have changed since they were copied."""
        if not self._moved:
            return
        for index, now in enumerate(self._versions_given()):
            if now != self._versions[index]:
                held[index] = _taken(self._given[index], self._device, copy=False)[0]
                self._versions[index] = now

    def _read(self) -> Iterator[tuple[Batch, bool]]:
        """One pass over the source. Its random state is in force only while the source itself runs."""
        if self._given:
            yield from (_taken(raw, self._device, copy=False) for raw in self._given)
            return
        state, batches = self._random_state, None
        while True:
            with preserved_random_state(self._source):
                _set_random_state(self._source, state)
                batches = iter(self._source) if batches is None else batches
                raw = next(batches, _END)
                state = _random_state(self._source)
            if raw is _END:
                return
            yield _taken(raw, self._device, copy=True)

    @property
    def again(self) -> Any:
        """What another objective takes for the same batches, without a second copy of those held in memory."""
        return self if self._given or self._held is None else list(self._held)

    def versions(self) -> bytes:
        """Changes when a batch of a list, or one held in memory, is changed in place."""
        return changes.versions(
            leaf for batch in self._given or self._held or () for leaf in batch_leaves(batch)
        )

    def _versions_given(self) -> list[bytes]:
        return [changes.versions(batch_leaves(batch)) for batch in self._given]


def _taken(raw: Any, device: torch.device, copy: bool) -> tuple[Batch, bool]:
    """A batch of the caller's, detached, on the device; and whether its tensors are still the caller's."""
    leaves, structure = flatten_batch(raw)
    if device.type != "cpu" and leaves and all(t.device.type == "cpu" for t in leaves):
        with torch.inference_mode(False):
            moved = [t.detach().to(device) for t in leaves]
            try:
                return structure.rebuild(moved), False
            except (TypeError, ValueError) as error:  # a packed sequence, whose lengths must stay on the CPU
                raise ValueError(
                    f"data: expected batches whose tensors can all be moved to {device}, where the model is, got one "
                    f"that refuses ({error}); move it there yourself"
                ) from error
    if copy:
        return structure.rebuild([t.detach().clone() for t in leaves]), False
    detached = any(t.requires_grad for t in leaves)
    return structure.rebuild([t.detach() for t in leaves]) if detached else raw, True


def count_examples(batch: Batch, index: int) -> int:
    """The length of the leading axis of the batch's first tensor that has one."""
    for leaf in batch_leaves(batch):
        if leaf.dim():
            if leaf.shape[0] == 0:
                raise ValueError(
                    f"data: expected at least one example in every batch, got none in batch {index}"
                )
            return leaf.shape[0]
    raise ValueError(
        "data: expected batches of tensors whose leading axis counts the examples, got "
        f"{type(batch).__name__} without such a tensor in batch {index}"
    )


def _source(data: Any) -> Iterable[Any]:
    if data is None:
        raise ValueError("data: expected a batch, a list of batches or a loader, got None")
    if isinstance(data, Tensor | Mapping | tuple):
        if isinstance(data, Mapping | tuple) and not data:
            raise ValueError(
                f"data: expected a batch with at least one tensor, got an empty {type(data).__name__}"
            )
        return [data]
    if not isinstance(data, Iterable):
        raise TypeError(
            "data: expected one batch (a tuple or a mapping), a list of batches or a loader, got "
            f"{type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise TypeError(
            "data: expected something that can be read more than once, got a one-shot "
            f"{type(data).__name__}; pass list(data), or a loader"
        )
    return data


def _sizes(counts: Iterable[int]) -> str:
    sizes = list(counts)
    shown = ", ".join(map(str, sizes[:6])) + (", …" if len(sizes) > 6 else "")
    return f"{len(sizes)} batches: {shown}" if sizes else "no batch"


def _generators(source: object) -> list[torch.Generator]:
    """The generators a DataLoader and its samplers own."""
    samplers = [source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None)]
    samplers.append(getattr(samplers[2], "sampler", None))
    found = {id(g): g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)}
    return list(found.values())


def _random_state(source: object) -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    own = [generator.get_state() for generator in _generators(source)]
    numpy = np.random.get_state()  # noqa: NPY002  # the global generator is what user code may draw from
    return random.getstate(), numpy, torch.get_rng_state(), devices, own


def _set_random_state(source: object, state: tuple[Any, ...]) -> None:
    python, numpy, cpu, devices, own = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if devices is not None:
        torch.cuda.set_rng_state_all(devices)
    for generator, generator_state in zip(_generators(source), own, strict=True):
        generator.set_state(generator_state)


@contextlib.contextmanager
def preserved_random_state(source: object = None) -> Iterator[None]:
    """Python's, numpy's and torch's generators stand afterwards where they stood before.

    They belong to the process, so other threads wait here.
    """
    with ONE_AT_A_TIME:
        state = _random_state(source)
        try:
            yield
        finally:
            _set_random_state(source, state)
