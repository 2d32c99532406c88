"""A batch, taken apart: its tensors, what else it holds, and which part of it the model and the loss take."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

TARGET_KEYS = ("target", "targets", "label", "labels", "y")
_ELSE = "pass fc.ModelLoss(fn) to take the batch apart yourself"


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(args, kwargs, target) of a batch for loss(model(*args, **kwargs), target).

    A tuple or list is (inputs..., target). A mapping holds the target under exactly one of the names target,
    targets, label, labels, y; the rest are the model's keyword arguments.
    Raises ValueError for anything else.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) != 1:
            raise ValueError(
                f"batch: expected a mapping with exactly one of the keys {', '.join(TARGET_KEYS)}, "
                f"got the keys {', '.join(map(str, batch))}; {_ELSE}"
            )
        return (), {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    length = f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
    raise ValueError(
        f"batch: expected a tuple (inputs..., target) or a mapping, got a {type(batch).__name__}{length}; "
        + _ELSE
    )


@dataclass(frozen=True)
class Structure:
    """All of a batch but the numbers in its tensors. Batches with equal `key` share one program."""

    spec: pytree.TreeSpec
    others: tuple[tuple[int, Any], ...]  # the leaves that are no tensors, with their positions
    mapping: Any  # an example of a mapping type that torch does not know; None for all others
    key: Hashable

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The batch with other tensors in it."""
        leaves = list(tensors)
        for position, leaf in self.others:
            leaves.insert(position, leaf)
        batch = pytree.tree_unflatten(leaves, self.spec)
        if self.mapping is None:
            return batch
        filled = copy.copy(self.mapping)
        for key, value in batch.items():
            filled[key] = value
        return filled


def flatten_batch(batch: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of a batch and the rest of it."""
    known = _known(batch)
    leaves, spec = pytree.tree_flatten(known)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
    key = (
        str(spec),
        tuple((tuple(t.shape), t.dtype, t.device) for t in tensors),
        tuple((i, repr(leaf)) for i, leaf in others),
    )
    return tensors, Structure(spec, others, None if known is batch else batch, key)


def batch_leaves(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order in which a prelude takes them."""
    if type(batch) is tuple and all(isinstance(part, Tensor) for part in batch):
        return list(batch)  # the common form, needed before every product
    return [leaf for leaf in pytree.tree_leaves(_known(batch)) if isinstance(leaf, Tensor)]


def _known(batch: Any) -> Any:
    """The batch, as a dict where it is a mapping of a type that torch does not take apart."""
    foreign = isinstance(batch, Mapping) and not pytree.SUPPORTED_NODES.get(type(batch))
    return dict(batch) if foreign else batch
