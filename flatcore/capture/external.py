"""A function that the vocabulary cannot say, with first and second derivatives by torch autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd

Optional = Sequence[Tensor | None]  # one entry per input


class OnceDifferentiableError(RuntimeError):
    """A derivative that cannot be differentiated again."""


@dataclass(frozen=True, eq=False)
class External:
    """y = function(*inputs) of a fixed shape, where no rule of the engine is known.

    The engine calls `forward`, `tangent` and `adjoint`. Directions of a tensor of shape S are (K, *S). Nothing is
    kept between calls: each builds its graph anew.

    name:      of the operations, for people.
    function:  of as many tensors as the op has inputs; integers and masks take no part in derivatives.
    note:      what is doubtful about its derivatives, for people.
    rounds:    part of it is computed in single precision, whatever `dtype` is.
    flops:     floating-point operations of tangent and adjoint for one direction.
    workspace: elements that tangent or adjoint hold at once, directions not counted.
    """

    name: str
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    rounds: bool = False
    note: str = ""
    flops: float = 0.0
    workspace: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            given = [_ordinary(x) for x in inputs]
            y = self.function(*given)
            own = {x.untyped_storage().data_ptr() for x in given}
            return y.clone() if y.untyped_storage().data_ptr() in own else y

    def tangent(self, inputs: Sequence[Tensor], tangents: Optional) -> Tensor:
        """J tx. The gradient J' u is linear in u, and its derivative in u along tx is J tx: no forward mode needed,
        which a function with a backward of its own does not have."""
        K = next(len(t) for t in tangents if t is not None)
        with _differentiating():
            leaves, y = self._evaluate(inputs, [t is not None for t in tangents])
            ty = y.new_zeros((K, *y.shape))
            if y.requires_grad:
                u = torch.ones_like(y, requires_grad=True)
                live = _live(y, leaves, u)
                for k in range(K if live else 0):
                    along = [_direction(tangents, i, k) for i in live]
                    (derivative,) = autograd.grad(
                        list(live.values()), u, along, retain_graph=True, materialize_grads=True
                    )
                    ty[k] = derivative
        return ty.detach()

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        tangents: Optional,
        dy: Tensor | None,
        cotangents: Tensor | None,
        wants: Sequence[bool],
    ) -> list[Tensor | None]:
        """J' tdy, and where dy is given the derivative of J' dy along tx, for the inputs in `wants`."""
        wanted = [i for i, want in enumerate(wants) if want]
        results: list[Tensor | None] = [None] * len(inputs)
        directions = cotangents if cotangents is not None else next(t for t in tangents if t is not None)
        with _differentiating():
            leaves, y = self._evaluate(
                inputs, [w or t is not None for w, t in zip(wants, tangents, strict=True)]
            )
            if not y.requires_grad or not wanted:
                return results
            for i in wanted:
                results[i] = inputs[i].new_zeros((len(directions), *inputs[i].shape))
            live = {} if dy is None else _live(y, leaves, _ordinary(dy))
            values = [*([y] if cotangents is not None else []), *live.values()]
            for k in range(len(directions) if values else 0):
                along = [_direction(tangents, i, k) for i in live]
                if cotangents is not None:
                    along.insert(0, _ordinary(cotangents[k]))
                found = autograd.grad(
                    values, [leaves[i] for i in wanted], along, retain_graph=True, materialize_grads=True
                )
                for i, derivative in zip(wanted, found, strict=True):
                    results[i][k] = derivative.detach()  # type: ignore[index]
        return results

    def check_twice_differentiable(self, inputs: Sequence[Tensor], active: Sequence[bool]) -> None:
        """Raises OnceDifferentiableError where torch would take zero for the second derivative without a word."""
        with _differentiating():
            leaves, y = self._evaluate(inputs, active)
            if not y.requires_grad:
                return
            u = torch.ones_like(y, requires_grad=True)
            found = autograd.grad(
                y, [leaves[i] for i, a in enumerate(active) if a], u, create_graph=True, allow_unused=True
            )
            for g in found:
                if g is not None and not g.requires_grad and bool(g.count_nonzero()):
                    raise OnceDifferentiableError("its derivative has no derivative")
            refuse_dead_ends([g for g in found if g is not None])

    def _evaluate(self, inputs: Sequence[Tensor], active: Sequence[bool]) -> tuple[list[Tensor], Tensor]:
        """Inputs of their own, of which the active ones are differentiated, and the value."""
        leaves = [
            _ordinary(x).requires_grad_() if a else _ordinary(x) for x, a in zip(inputs, active, strict=True)
        ]
        return leaves, self.function(*leaves)


def refuse_dead_ends(values: Sequence[Tensor]) -> None:
    """A function that is differentiable once ends its gradient in an error node, behind which torch sees
    nothing: asked for the derivative in what lies beyond, it answers zero and never reaches the error."""
    seen: set[Any] = set()
    pending: list[Any] = [value.grad_fn for value in values]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise OnceDifferentiableError("one of its functions is marked as differentiable once only")
        seen.add(node)
        pending.extend(successor for successor, _ in node.next_functions)


@contextlib.contextmanager
def _differentiating() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _ordinary(x: Tensor) -> Tensor:
    """x as the model would see it: dense, without history, not made in inference mode."""
    x = x.clone() if x.is_inference() else x
    return x.detach().contiguous()


def _live(y: Tensor, leaves: Sequence[Tensor], u: Tensor) -> dict[int, Tensor]:
    """J' u for the inputs that it depends on, in a form that can be differentiated once more."""
    active = [i for i, x in enumerate(leaves) if x.requires_grad]
    found = autograd.grad(y, [leaves[i] for i in active], u, create_graph=True, allow_unused=True)
    return {i: g for i, g in zip(active, found, strict=True) if g is not None and g.requires_grad}


def _direction(tangents: Optional, i: int, k: int) -> Tensor:
    tangent = tangents[i]
    assert tangent is not None
    return _ordinary(tangent[k])
