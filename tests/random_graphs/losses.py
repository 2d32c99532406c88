"""What stands behind the steps of a graph: one or several outputs and a loss of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from .builder import Builder


@dataclass(frozen=True)
class Loss:
    """An expression of `z`, the model's main output, and the target `y`."""

    expression: str
    target: torch.Tensor


LossOf = Callable[[Builder, tuple[int, ...]], Loss]
LOSSES: dict[str, tuple[LossOf, tuple[str, ...]]] = {}


def loss(*reaches: str) -> Callable[[LossOf], LossOf]:
    def register(make: LossOf) -> LossOf:
        LOSSES[make.__name__] = (make, reaches)
        return make

    return register


def _classes(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Axis of the classes, and the shape of class indices."""
    axis = 1 if len(shape) > 1 else 0
    return axis, (*shape[:axis], *shape[axis + 1 :])


def _indices(b: Builder, shape: tuple[int, ...], ignored: bool) -> tuple[torch.Tensor, int]:
    axis, rows = _classes(shape)
    generator = torch.Generator().manual_seed(b.rng.getrandbits(40))
    target = torch.randint(shape[axis], rows, generator=generator)
    if not ignored:
        return target, -100
    ignore = b.choice([-100, shape[axis] - 1 if shape[axis] > 1 else -1])
    left_out = torch.rand(rows, generator=generator) < 0.3
    left_out.view(-1)[0] = False
    target.view(-1)[0] = 0
    return target.masked_fill(left_out, ignore), ignore


def _weights(b: Builder, classes: int) -> str:
    values = [round(b.rng.uniform(0.2, 2.0), 2) for _ in range(classes)]
    return f", weight=torch.tensor({values}, dtype=z.dtype)"


def _reduced(b: Builder, call: str, mean: str = "mean") -> str:
    """`call` has a place for the reduction; `mean` is what its mean is called."""
    return str(
        b.choice(
            [
                call.format(mean),
                call.format(mean),
                call.format("sum"),
                f"({call.format('none')}).square().mean()",
                f"({call.format('none')}).sum() / 7.0",
            ]
        )
    )


@loss("cross_entropy_loss.default")
def cross_entropy(b: Builder, shape: tuple[int, ...]) -> Loss:
    axis, _ = _classes(shape)
    options = _weights(b, shape[axis]) if b.chance(0.4) else ""
    options += f", label_smoothing={b.fraction()}" if b.chance(0.4) else ""
    target, ignore = _indices(b, shape, b.chance(0.4))
    if ignore != -100:
        options += f", ignore_index={ignore}"
    return Loss(_reduced(b, f"F.cross_entropy(z, y{options}, reduction='{{}}')"), target)


@loss("cross_entropy_loss.default")
def cross_entropy_of_probabilities(b: Builder, shape: tuple[int, ...]) -> Loss:
    axis, _ = _classes(shape)
    options = _weights(b, shape[axis]) if b.chance(0.4) else ""
    options += f", label_smoothing={b.fraction()}" if b.chance(0.4) else ""
    target = b._normal(shape).softmax(axis)
    return Loss(_reduced(b, f"F.cross_entropy(z, y{options}, reduction='{{}}')"), target)


@loss("nll_loss_nd.default", "log_softmax.int")
def nll(b: Builder, shape: tuple[int, ...]) -> Loss:
    axis, _ = _classes(shape)
    target, ignore = _indices(b, shape, b.chance(0.3))
    options = _weights(b, shape[axis]) if b.chance(0.4) else ""
    if ignore != -100:
        options += f", ignore_index={ignore}"
    source = b.choice(
        [
            f"F.log_softmax(z, {axis})",
            f"F.log_softmax(z, {axis - len(shape)})",
            f"F.log_softmax(z, {b.integer(0, len(shape) - 1)})",
            f"(F.softmax(z, {axis}) + 0.1).log()",
            "z",
        ]
    )
    return Loss(_reduced(b, f"F.nll_loss({source}, y{options}, reduction='{{}}')"), target)


@loss("log_softmax.int")
def divergence(b: Builder, shape: tuple[int, ...]) -> Loss:
    target = b._normal(shape).softmax(-1)
    call = b.choice(
        [
            "F.kl_div(F.log_softmax(z, -1), y, reduction='{}')",
            "F.kl_div(F.log_softmax(z, -1), y.log(), reduction='{}', log_target=True)",
        ]
    )
    return Loss(_reduced(b, call, "batchmean"), target)


@loss("mse_loss.default")
def mse(b: Builder, shape: tuple[int, ...]) -> Loss:
    return Loss(_reduced(b, "F.mse_loss(z, y, reduction='{}')"), b._normal(shape))


@loss("l1_loss.default")
def l1(b: Builder, shape: tuple[int, ...]) -> Loss:
    return Loss(_reduced(b, "F.l1_loss(z, y, reduction='{}')"), b._normal(shape))


@loss("smooth_l1_loss.default")
def smooth_l1(b: Builder, shape: tuple[int, ...]) -> Loss:
    call = f"F.smooth_l1_loss(z, y, beta={b.choice([0.0, 0.4, 1.5])}, reduction='{{}}')"
    return Loss(_reduced(b, call), b._normal(shape))


@loss("huber_loss.default")
def huber(b: Builder, shape: tuple[int, ...]) -> Loss:
    return Loss(_reduced(b, f"F.huber_loss(z, y, delta={b.fraction()}, reduction='{{}}')"), b._normal(shape))


@loss("binary_cross_entropy_with_logits.default")
def binary(b: Builder, shape: tuple[int, ...]) -> Loss:
    options = ""
    last = shape[-1] if shape else 1
    if b.chance(0.4):
        options += f", pos_weight={_weights(b, last).removeprefix(', weight=')}" if shape else ""
    if b.chance(0.4) and shape:
        options += _weights(b, last)
    call = f"F.binary_cross_entropy_with_logits(z, y{options}, reduction='{{}}')"
    return Loss(_reduced(b, call), b._normal(shape).sigmoid())


@loss()
def by_hand(b: Builder, shape: tuple[int, ...]) -> Loss:
    expression = b.choice(
        [
            "(z * y).sum() + (z - y).pow(4).mean()",
            "((z - y).square().sum() + 1).sqrt()",
            "F.softplus(-y * z).mean()",
            "(z.exp() - y * z).mean()",
            "-(y * z.sigmoid().log()).mean() + z.square().sum().log1p()",
            "z.logsumexp(0).sum() - (y * z).mean()",
            "(z.sin() * y).sum().square()",
        ]
    )
    return Loss(expression, b._normal(shape))


def outputs(b: Builder) -> tuple[str, str]:
    """The main output and the others ("" if none), such that every value is read by something."""
    known = b.state.tensors
    ends = [n for n in known if n[0] == "v" and n not in b.state.read and known[n].is_floating_point()]
    logits = [
        n for n in ends if known[n].requires_grad and 1 <= known[n].dim() <= 4 and known[n].shape[-1] > 1
    ]
    logits = [n for n in logits if known[n].dim() == 1 or known[n].shape[1] > 1]
    if logits and b.chance(0.5):
        z = b.choice(logits)
        rest = [n for n in ends if n != z]
        return z, b.let(f"torch.cat(({_flat(rest)},))") if rest else ""
    h = b.let(f"torch.cat(({_flat(ends)},))") if ends else b.let(f"{b.pick()}.reshape(-1)")
    n, classes = b.integer(1, 4), b.integer(2, 4)
    shape = b.choice([(n, classes), (n, classes), (n, classes, 2), (n, classes, 1, 2), (classes,)])
    mix = b.numbers((b.size(h, 0), prod(shape)))
    z = b.let(f"({h} @ {mix}).reshape({shape}) * {round(b.size(h, 0) ** -0.5, 3)}")
    return z, ""


def _flat(names: list[str]) -> str:
    return ", ".join(f"{name}.reshape(-1)" for name in names)
