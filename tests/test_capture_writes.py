"""Random sequences of views and of operations that write: the program computes what torch does, step by step."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcore.capture import batch_leaves, capture, interpret, named_tensors

ROWS, COLUMNS, MOST = 5, 4, 6


def _set(a: Tensor, place: tuple[object, ...] | list[int], value: Tensor) -> None:
    a[place] = value


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "relu_": lambda a, b: a.relu_(),
    "silu": lambda a, b: F.silu(a, inplace=True),
    "hardtanh": lambda a, b: F.hardtanh(a, inplace=True),
    "tanh_": lambda a, b: a.tanh_(),
    "clamp_": lambda a, b: a.clamp_(-1, 1),
    "add_": lambda a, b: a.add_(b * 0.3),
    "sub_ its own": lambda a, b: a.sub_(a * 0.2),
    "mul_": lambda a, b: a.mul_(b),
    "copy_": lambda a, b: a.copy_(b * 0.9),
    "masked_fill_": lambda a, b: a.masked_fill_(torch.eye(ROWS, COLUMNS).bool(), 0.2),
    "columns": lambda a, b: _set(a, (slice(None), slice(2)), b[:, 2:].clone()),
    "rows by index": lambda a, b: _set(a, [0, 2], b[[1, 3]]),
    "a row's view": lambda a, b: a[0].mul_(1.3),
    "a split's part": lambda a, b: a.split(2, 1)[0].add_(0.3),
    "diagonal": lambda a, b: a.diagonal().mul_(2.0),
}
GIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a * 0.5 + b,
    "product": lambda a, b: a * b.tanh(),
    "layer norm": lambda a, b: F.layer_norm(a, (COLUMNS,)),
    "clone": lambda a, b: a.clone(),
    "cat": lambda a, b: torch.cat(a.chunk(2, 1), 1),
    "view": lambda a, b: a.reshape(-1).view(ROWS, COLUMNS),
    "transposed twice": lambda a, b: a.t().t(),
    "slice": lambda a, b: a[0:ROWS],
    "contiguous": lambda a, b: a.contiguous(),
    "expand_as": lambda a, b: a.expand_as(b),
    "pad by nothing": lambda a, b: F.pad(a, (0, 0)),
    "einsum": lambda a, b: torch.einsum("ij->ij", a),
    "to": lambda a, b: a.to(torch.float64),
    # Their schemas do not say that they give what they get.
    "dropout": lambda a, b: F.dropout(a, training=False),
    "dropout of nothing": lambda a, b: F.dropout(a, 0.0),
    "type_as": lambda a, b: a.type_as(b),
    "atleast_2d": lambda a, b: torch.atleast_2d(a),
    "broadcast": lambda a, b: torch.broadcast_tensors(a, b)[0],
    "broadcast of a row": lambda a, b: torch.broadcast_tensors(a[:1], b)[0],
}
STEPS = [*WRITES, *GIVES]


class Sequence(nn.Module):
    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.first, self.last, self.steps = nn.Linear(6, COLUMNS), nn.Linear(COLUMNS, 3), steps

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        pool = [h, h * 1.5 + 0.1]
        for name, i, j in self.steps:
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            if name in WRITES:
                WRITES[name](a, b)
            else:
                pool.append(GIVES[name](a, b))
            if len(pool) > MOST:
                pool.pop(i % len(pool))
        weighted = [(0.3 + 0.1 * k) * part for k, part in enumerate(pool)]
        return self.last(torch.stack(weighted).sum(0))


def drawn(seed: int) -> Sequence:
    """With a write, two steps at least, and a view or a result that hides one before it."""
    draw = random.Random(seed)
    steps = [
        (draw.choice(STEPS), draw.randrange(99), draw.randrange(99)) for _ in range(draw.randrange(2, 9))
    ]
    steps.insert(
        draw.randrange(len(steps) + 1), (draw.choice(list(WRITES)), draw.randrange(99), draw.randrange(99))
    )
    torch.manual_seed(seed)
    return Sequence(steps).double().eval()


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_program_computes_what_torch_does(first: int) -> None:
    for seed in range(first, first + 10):
        model = drawn(seed)
        x, y = torch.randn(ROWS, 6).double(), torch.randint(3, (ROWS,))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(x)
        except (RuntimeError, UserWarning):  # torch refuses to write there, or will
            continue
        names = [name for name, _ in model.named_parameters()]
        program = capture(model, F.cross_entropy, (x, y), selected=names, loss_kind="output_target")
        for _ in range(2):
            expected = F.cross_entropy(model(x), y).item()
            constants = program.prelude.run(batch_leaves((x, y)), named_tensors(model, None))
            found = interpret(program, dict(model.named_parameters()), constants)[program.loss].item()
            # A few hundred operations on numbers of order one.
            assert abs(found - expected) <= 1000 * torch.finfo(x.dtype).eps * max(1, abs(expected)), (
                model.steps
            )
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.3 * torch.randn_like(p))
