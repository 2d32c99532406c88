"""What the optimizers here share: checked settings, momentum in torch's form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from flatcore.optim.scoping import Scoping

__all__ = [
    "as_number",
    "check_at_least_zero",
    "check_share",
    "refuse_sparse",
    "stored",
    "with_momentum",
]


def check_at_least_zero(name: str, value: Any, example: float) -> float:
    """``value`` as a float, refused with a sentence if it is no finite number >= 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number >= 0, got {value!r}; give e.g. {example:g}") from None
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}; give e.g. {example:g}")
    return number


def check_share(name: str, value: Any, example: float) -> float:
    """``value`` in [0, 1)."""
    number = check_at_least_zero(name, value, example)
    if number >= 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {number:g}; give e.g. {example:g}")
    return number


def as_number(loss: Any) -> float:
    """What a closure returned, which may still carry its graph."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def stored(scoping: Scoping | None) -> dict[str, Any] | None:
    """A schedule as plain numbers and words, which `torch.load` takes with weights_only."""
    if scoping is None:
        return None
    if not isinstance(scoping, Scoping):
        raise TypeError(
            f"scoping: expected a flatcore.optim.Scoping or None, got {type(scoping).__name__}; "
            'give e.g. Scoping("exponential", 1e4, steps=1000)'
        )
    return dataclasses.asdict(scoping)


def refuse_sparse(gradient: Tensor, optimizer: str) -> None:
    if gradient.is_sparse:
        raise ValueError(
            f"params: expected dense gradients, got a sparse one, which {optimizer} does not take; "
            "use sparse=False in embeddings"
        )


def with_momentum(gradient: Tensor, buffer: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """The step's direction, as `torch.optim.SGD` without dampening; ``buffer`` is updated."""
    if momentum == 0:
        return gradient
    buffer.mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum) if nesterov else buffer
