"""A Gauss-Newton matrix as Rᵀ diag(s) R, with a row for every example and direction of the outputs' curvature."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from flatcore import checks
from flatcore.capture.batch import flatten_batch
from flatcore.data import Batch
from flatcore.errors import NoRowsError, told_as
from flatcore.evaluate import plain_torch
from flatcore.objective import Objective, Snapshot, WeightedBatch

__all__ = ["Extent", "OutputRows", "Unit"]

# Bytes of rows that one backward pass makes.
_CHUNK = 2**26


@dataclass(frozen=True)
class Extent:
    """most: rows there may be in all; largest: rows of one unit; units: evaluations of the model;
    passes: what the backward passes of all rows cost, in backward passes through all data."""

    most: int
    largest: int
    units: int
    passes: float


@dataclass(frozen=True)
class Unit:
    """Rows first, first + 1, ...: their signs, float64, and a way to compute them, (len(signs), P)."""

    first: int
    signs: Tensor
    rows: Callable[[], Tensor]


@dataclass(frozen=True)
class _Outputs:
    """The model's outputs that the loss reads, and the loss as a function of them."""

    z: list[Tensor]
    loss: Callable[[Sequence[Tensor]], Tensor]


class OutputRows:
    """J, the derivative of the model's outputs z in the parameters, times roots of the loss's curvature d²L/dz².

    With d²L/dz² = U diag(l) Uᵀ a row is sqrt(|l_i|) u_iᵀ J and its sign that of l_i; where l_i is zero there is none.
    Examples are evaluated one by one, so that a row costs a backward pass of one example; in a batch whose outputs
    are not made of those of its examples, a row costs a backward pass of the batch.

    logits_for_nll: outputs that are log-probabilities, handed to `nll_loss`, have the curvature of the cross-entropy.
    """

    def __init__(self, objective: Objective, at: Snapshot, logits_for_nll: bool) -> None:
        self._objective, self._at, self._logits_for_nll = objective, at, logits_for_nll
        self._batched = True  # until a backward pass refuses

    @cached_property
    def extent(self) -> Extent:
        """Costs an evaluation of every batch, without derivatives.

        Raises NoRowsError, as does `units`.
        """
        most, largest, units, passes = 0, 0, 0, 0.0
        examples = self._objective.examples
        with plain_torch(self._objective.layout.device), _differentiable():
            for batch in self._objective.batches():
                outputs = self._evaluate(batch.batch, batch.index)
                size = sum(part.numel() for part in outputs.z)
                count = self._parts(batch, outputs)
                most += size
                largest = max(largest, size // count)
                units += count
                passes += size / count * batch.examples / examples
        return Extent(most, largest, units, passes)

    def units(self) -> Iterator[Unit]:
        """All rows in order; to be exhausted, since the random generators are set back at the end."""
        first = 0
        with plain_torch(self._objective.layout.device), _differentiable():
            for batch in self._objective.batches():
                outputs = self._evaluate(batch.batch, batch.index)
                count = self._parts(batch, outputs)
                blocks = _curvature(outputs.loss, outputs.z, count)
                if len(blocks) < count:  # the loss couples examples
                    count, blocks = 1, _curvature(outputs.loss, outputs.z, 1)
                for n, (u, signs) in enumerate(_roots(blocks, batch.weight, count)):
                    yield Unit(first, signs, partial(self._rows, batch, outputs, n if count > 1 else None, u))
                    first += len(signs)

    def _evaluate(self, batch: Batch, index: int, theta: Mapping[str, Tensor] | None = None) -> _Outputs:
        """With ``theta``, leaves that take gradients, so that the outputs can be differentiated in them."""
        with torch.set_grad_enabled(theta is not None):
            values = self._at.values if theta is None else theta
            evaluation = checks.evaluate(self._objective.evaluate, batch, values, index, theta is not None)
        if not evaluation.outputs:
            raise NoRowsError(
                "the loss is a ModelLoss that is not the direct result of one function of torch.nn.functional, so "
                "the model's outputs are not known"
            )
        leaves = [part.detach().requires_grad_() for part in evaluation.outputs]
        used = [0]
        if len(leaves) > 1:
            gradients = autograd.grad(
                evaluation.loss_of(tuple(leaf.clone() for leaf in leaves)), leaves, allow_unused=True
            )
            used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        call = evaluation.call

        def loss(z: Sequence[Tensor]) -> Tensor:
            if self._logits_for_nll and call and call.function is F.nll_loss and used == [0]:
                return F.cross_entropy(z[0], **{k: v for k, v in call.arguments.items() if k != "input"})
            outputs: list[Tensor] = list(leaves)
            for i, part in zip(used, z, strict=True):
                outputs[i] = part
            return evaluation.loss_of(tuple(outputs))

        return _Outputs([evaluation.outputs[i] for i in used], loss)

    def _parts(self, batch: WeightedBatch, outputs: _Outputs) -> int:
        """Into how many parts a batch can be taken: its examples, or one. Tried with the first example."""
        N = batch.examples
        if N == 1 or not all(part.dim() and part.shape[0] % N == 0 for part in outputs.z):
            return 1
        try:
            self._alone(batch, outputs, 0)
        except ValueError:  # it differs, or the model takes no batch of one
            return 1
        return N

    def _alone(
        self, batch: WeightedBatch, whole: _Outputs, n: int, theta: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """The outputs of example n as a batch of its own."""
        tensors, structure = flatten_batch(batch.batch)
        N = batch.examples
        alone = structure.rebuild([t[n : n + 1] if t.dim() and t.shape[0] == N else t for t in tensors])
        z = self._evaluate(alone, batch.index, theta).z
        for ours, theirs in zip(z, whole.z, strict=True):
            rows = theirs.shape[0] // N
            expected = theirs[n * rows : (n + 1) * rows]
            close = math.sqrt(torch.finfo(theirs.dtype).eps) * float(theirs.abs().max())
            if ours.shape != expected.shape or bool(((ours - expected).abs() > close).any()):
                raise NoRowsError(
                    f"example {n} of batch {batch.index} has other outputs alone than in its batch"
                )
        return z

    def _rows(self, batch: WeightedBatch, whole: _Outputs, n: int | None, u: Tensor) -> Tensor:
        """Jᵀ u of example n, or of the batch."""
        theta = {name: value.detach().requires_grad_() for name, value in self._at.values.items()}
        with _differentiable():
            alone = [] if n is None else self._alone(batch, whole, n, theta)
            z = alone or self._evaluate(batch.batch, batch.index, theta).z
            return self._pull(z, list(theta.values()), u)

    def _pull(self, z: list[Tensor], theta: list[Tensor], u: Tensor) -> Tensor:
        """Jᵀ u for the rows of u."""
        layout = self._objective.layout
        result = torch.empty(len(u), layout.size, dtype=layout.dtype, device=layout.device)
        step = max(1, _CHUNK // (layout.size * layout.dtype.itemsize))
        for first in range(0, len(u), step):
            part = u[first : first + step].to(result)
            for place, gradient in zip(layout.slices.values(), self._gradients(z, theta, part), strict=True):
                into = result[first : first + step, place]
                if gradient is None:
                    into.zero_()
                else:
                    into.copy_(gradient.reshape(len(part), -1))
        return result

    def _gradients(self, z: list[Tensor], theta: list[Tensor], u: Tensor) -> Sequence[Tensor | None]:
        if self._batched:
            try:
                return autograd.grad(
                    z, theta, _shaped(u, z, 1), retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that cannot be vectorised
                self._batched = False
        one_by_one = [
            autograd.grad(
                z,
                theta,
                [part[0] for part in _shaped(row[None], z, 1)],
                retain_graph=True,
                materialize_grads=True,
            )
            for row in u
        ]
        return [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]


def _differentiable() -> contextlib.AbstractContextManager[None]:
    """What the engine can do and plain torch cannot (it writes in place, say) leaves no rows."""
    return told_as(lambda said: NoRowsError(f"torch could not differentiate model and loss: {said}"))


def _flat(z: Sequence[Tensor], parts: int) -> Tensor:
    """All entries as one vector, those of each of `parts` equal parts along axis 0 together."""
    return torch.cat([part.reshape(parts, -1) for part in z], dim=1).reshape(-1)


def _shaped(flat: Tensor, z: Sequence[Tensor], parts: int) -> list[Tensor]:
    """The inverse, for rows of vectors."""
    pieces = flat.reshape(len(flat), parts, -1).split([part.numel() // parts for part in z], dim=2)
    return [piece.reshape(len(flat), *part.shape) for piece, part in zip(pieces, z, strict=True)]


def _curvature(loss_of: Callable[[Sequence[Tensor]], Tensor], z: Sequence[Tensor], parts: int) -> Tensor:
    """d²L/dz² as blocks (n, c, c) on its diagonal, in the order of `_flat`, float64 where the loss takes float64.

    The blocks of the last axis where the others do not interact (the scores of one classification), else those of a
    part, else the whole: tried with a random vector.
    """

    def derivative(dtype: torch.dtype) -> tuple[list[Tensor], Sequence[Tensor]]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in z]
        value = loss_of([leaf.clone() for leaf in leaves])  # which it may write into
        return leaves, autograd.grad(value, leaves, create_graph=True, materialize_grads=True)

    try:
        leaves, dz = derivative(torch.float64)
    except RuntimeError:  # it mixes them with tensors of its own
        leaves, dz = derivative(z[0].dtype)
    live = [i for i, part in enumerate(dz) if part.requires_grad]
    numel = sum(part.numel() for part in z)

    def product(v: Tensor) -> Tensor:
        if not live:
            return torch.zeros_like(v)
        tangents = _shaped(v[None], z, parts)
        found = autograd.grad(
            [dz[i] for i in live],
            leaves,
            [tangents[i][0] for i in live],
            retain_graph=True,
            materialize_grads=True,
        )
        return _flat(found, parts)

    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(numel, generator=generator, dtype=leaves[0].dtype, device="cpu").to(leaves[0].device)
    expected = product(v)
    eps = torch.finfo(v.dtype).eps
    sizes = [numel // parts, numel]
    if len(z) == 1 and z[0].dim() > 1:
        sizes.insert(0, z[0].shape[-1])
    for c in sizes:
        blocks = torch.empty(numel // c, c, c, dtype=v.dtype, device=v.device)
        for j in range(c):
            unit = torch.zeros_like(v)
            unit[j::c] = 1
            blocks[:, :, j] = product(unit).reshape(-1, c)
        found = (blocks @ v.reshape(-1, c, 1)).reshape(-1)
        if c == numel or float((found - expected).norm()) <= math.sqrt(eps) * float(expected.norm()):
            break
    return (blocks + blocks.mT) / 2


def _roots(curvature: Tensor, weight: float, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each part: u (m, size) and signs (m,) float64 on the CPU, with uᵀ diag(signs) u its curvature times weight."""
    rounding = torch.finfo(curvature.dtype).eps * curvature.shape[-1]
    values, vectors = torch.linalg.eigh(curvature.double().cpu())
    values = values * weight
    kept = values.abs() > rounding * values.abs().max()
    roots = values.abs().sqrt()[:, None, :] * vectors
    count, c = values.shape
    per_part = count // parts
    for n in range(parts):
        blocks = range(n * per_part, (n + 1) * per_part)
        u = torch.zeros(
            int(kept[blocks.start : blocks.stop].sum()), per_part, c, dtype=torch.float64, device="cpu"
        )
        first = 0
        for i, block in enumerate(blocks):
            own = roots[block][:, kept[block]].T
            u[first : first + len(own), i] = own
            first += len(own)
        yield (
            u.reshape(len(u), per_part * c),
            values[blocks.start : blocks.stop][kept[blocks.start : blocks.stop]].sign(),
        )
