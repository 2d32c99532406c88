"""Random programs of the vocabulary itself, thousands in a few seconds: no model is captured.

Inputs of an op are parameters, constants, values of other ops, and views of all three with any strides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from flatcore.capture.interpreter import meaning

MOST_ELEMENTS = 200
# unary function -> constants; those that take any number.
FUNCTIONS: dict[str, tuple[float, float, float]] = {
    **dict.fromkeys(
        ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "square", "abs", "sin", "cos"), (0, 0, 0)
    ),
    **dict.fromkeys(("hardswish", "mish", "erf"), (0, 0, 0)),
    "leaky_relu": (0.2, 0, 0),
    "elu": (0.7, 1.1, 0.9),
    "softplus": (1.5, 2.5, 0),
    "smooth_l1": (0.6, 0, 0),
    "huber": (0.8, 0, 0),
    "clamp": (-0.6, 0.9, 0),
    "hardtanh": (-0.8, 0.5, 0),
}


class Program:
    """Grows op by op, each evaluated at once. `kinds[i]`, `tensors[i]` are of value i."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kinds: list[str] = []
        self.tensors: list[Tensor] = []
        self.ops: list[tuple[str, list[int], int, dict[str, Any], str]] = []
        self.read: set[int] = set()
        for _ in range(2):
            self.parameter([self.size(2, 4) for _ in range(self.size(1, 4))])

    def size(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def chance(self, p: float = 0.5) -> bool:
        return self.rng.random() < p

    def _add(self, kind: str, tensor: Tensor) -> int:
        self.kinds.append(kind)
        self.tensors.append(tensor)
        return len(self.kinds) - 1

    def normal(self, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.getrandbits(40))
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    def parameter(self, shape: Sequence[int]) -> int:
        return self._add("parameter", self.normal(shape).requires_grad_())

    def constant(self, tensor: Tensor) -> int:
        return self._add("constant", tensor)

    def indices(self, shape: Sequence[int], below: int) -> int:
        drawn = [self.rng.randrange(below) for _ in range(prod(shape))]
        return self.constant(torch.tensor(drawn, dtype=torch.int64).reshape(tuple(shape)))

    def shape(self, i: int) -> tuple[int, ...]:
        return tuple(self.tensors[i].shape)

    def emit(self, kind: str, *inputs: int | None, **attrs: Any) -> int:
        value = meaning(kind, attrs, [None if i is None else self.tensors[i] for i in inputs])
        if value.numel() > MOST_ELEMENTS or value.numel() == 0:
            raise ValueError("too large")
        self.read.update(i for i in inputs if i is not None)
        output = self._add("activation", value)
        self.ops.append((kind, [-1 if i is None else i for i in inputs], output, attrs, ""))
        largest = value.abs().max().item()
        if largest > 6:
            return self.emit("affine", output, scale=2 / largest, shift=0.0)
        return output

    def pick(self, least: int = 0, most: int = 5) -> int:
        """An active value, a late one and one that nobody has read before others, of a rank between the two."""
        active = [i for i, t in enumerate(self.tensors) if t.requires_grad]
        weights = [(1 + i) * (1 if i in self.read else 4) for i in active]
        (i,) = self.rng.choices(active, weights)
        shape = list(self.shape(i))
        while len(shape) > most:
            shape[:2] = [shape[0] * shape[1]]
        while len(shape) < least:
            shape.insert(self.size(0, len(shape)), 1)
        return i if shape == list(self.shape(i)) else self.emit("view", i, shape=shape)

    def given(self, *shape: int) -> int:
        """A value of this shape, of whatever kind and strides."""
        known = [i for i, t in enumerate(self.tensors) if t.shape == shape and t.is_floating_point()]
        way = self.rng.random()
        if known and way < 0.3:
            return self.rng.choice(known)
        if way < 0.4 and shape:
            x = self.source((*shape[:-1], 2 * shape[-1] + 1))
            return self.emit("slice", x, dim=len(shape) - 1, start=1, step=2, length=shape[-1])
        if way < 0.5 and len(shape) > 1:
            return self.emit("permute", self.source(shape[::-1]), dims=list(range(len(shape)))[::-1])
        if way < 0.6 and shape:
            return self.emit("expand", self.source((1, *shape[1:])), shape=list(shape))
        return self.source(shape)

    def source(self, shape: Sequence[int]) -> int:
        if self.chance(0.2):
            return self.constant(self.normal(shape))
        x = self.parameter(shape)
        return self.emit("unary", x, function="sin", a=0.0, b=0.0, c=0.0) if self.chance(0.3) else x

    def broadcast(self, shape: Sequence[int]) -> int:
        kept = list(shape)[self.size(0, len(shape)) if self.chance(0.3) else 0 :]
        return self.given(*(1 if self.chance(0.2) else size for size in kept))

    def finish(self) -> None:
        """One number that every value that nobody has read goes into."""
        total: int | None = None
        last = [
            out for _, _, out, _, _ in self.ops if self.tensors[out].requires_grad and out not in self.read
        ]
        for i in last or [0]:
            x = self.emit("unary", i, function="sin", a=0.0, b=0.0, c=0.0)
            axes = list(range(self.tensors[x].dim()))
            x = self.emit("sum", x, dims=axes, keepdim=False, scale=0.7)
            total = x if total is None else self.emit("add", total, x, alpha=1.0)
        assert total is not None
        self.emit("unary", total, function="softplus", a=1.0, b=20.0, c=0.0)

    def evaluate(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The last value, by the interpreter, with each value passed through `change`."""
        values = [change(t) if t.is_floating_point() else t for t in self.tensors]
        for kind, inputs, output, attrs, _ in self.ops:
            given = [None if i < 0 else values[i] for i in inputs]
            value = _batch_norm(*given, **attrs) if kind == "batch_norm" else meaning(kind, attrs, given)
            values[output] = change(value)
        return values[-1]


def _batch_norm(
    x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Written out: torch's own has no second derivative with a bias and no weight."""
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    y = y if w is None else y * w.reshape(shape)
    return y if b is None else y + b.reshape(shape)


OPS: dict[str, Callable[[Program], Any]] = {}


def op(write: Callable[[Program], Any]) -> Callable[[Program], Any]:
    OPS[write.__name__] = write
    return write


@op
def linear(p: Program) -> None:
    x, out, transposed = p.pick(1), p.size(1, 4), p.chance()
    width = p.shape(x)[-1]
    weight = p.given(width, out) if transposed else p.given(out, width)
    p.emit("linear", x, weight, p.given(out) if p.chance() else None, transposed=transposed)


@op
def matmul(p: Program) -> None:
    x = p.pick(2, 4)
    *front, n, m = p.shape(x)
    front = front if p.chance() else front[p.size(0, len(front)) :]
    if p.chance():
        p.emit("matmul", x, p.given(*front, m, p.size(1, 4)))
    else:
        p.emit("matmul", p.given(*front, p.size(1, 4), n), x)


@op
def conv2d(p: Program) -> None:
    x = p.pick(4, 4)
    _, channels, height, width = p.shape(x)
    groups = channels if p.chance(0.3) else 1
    out = groups * p.size(1, 2)
    kernel = [p.size(1, min(2, size)) for size in (height, width)]
    weight = p.given(out, channels // groups, *kernel)
    sizes = {"stride": [p.size(1, 2), 1], "padding": [p.size(0, 1), p.size(0, 1)], "dilation": [1, 1]}
    p.emit("conv2d", x, weight, p.given(out) if p.chance() else None, **sizes, groups=groups)


@op
def batch_norm(p: Program) -> None:
    x = p.pick(2, 4)
    channels = p.shape(x)[1]
    weight, bias = (p.given(channels) if p.chance(0.7) else None for _ in range(2))
    mean, variance = p.normal([channels]), p.normal([channels]).square() + 0.5
    p.emit("batch_norm", x, weight, bias, p.constant(mean), p.constant(variance), eps=0.01)


@op
def unary(p: Program) -> None:
    name = p.rng.choice(list(FUNCTIONS))
    a, b, c = map(float, FUNCTIONS[name])
    p.emit("unary", p.pick(), function=name, a=a, b=b, c=c)


@op
def positive(p: Program) -> None:
    """A function of positive numbers, of a value kept above 0.5."""
    x = p.emit("unary", p.pick(), function="softplus", a=1.0, b=20.0, c=0.0)
    x = p.emit("affine", x, scale=0.8, shift=0.5)
    name = p.rng.choice(["log", "sqrt", "rsqrt", "reciprocal", "pow", "log1p", "expm1", "exp"])
    p.emit("unary", x, function=name, a=-0.7 if name == "pow" else 0.0, b=0.0, c=0.0)


@op
def add(p: Program) -> None:
    x = p.pick()
    pair = [x, p.broadcast(p.shape(x))]
    p.rng.shuffle(pair)
    p.emit("add", *pair, alpha=-1.3)


@op
def mul(p: Program) -> None:
    x = p.pick()
    pair = [x, p.broadcast(p.shape(x))]
    p.rng.shuffle(pair)
    p.emit("mul", *pair)


@op
def sums(p: Program) -> None:
    x = p.pick(1)
    rank = p.tensors[x].dim()
    p.emit("sum", x, dims=p.rng.sample(range(rank), p.size(1, rank)), keepdim=p.chance(), scale=0.6)


@op
def pools(p: Program) -> None:
    x = p.pick(4, 4)
    kernel = [p.size(1, size) for size in p.shape(x)[2:]]
    window = {"kernel": kernel, "stride": [p.size(1, 2), 1], "padding": [k // 2 for k in kernel]}
    way = p.size(0, 2)
    if way == 0:
        p.emit("max_pool2d", x, **window, dilation=[1, 1], ceil_mode=p.chance())
    elif way == 1:
        p.emit(
            "avg_pool2d",
            x,
            **window,
            ceil_mode=p.chance(),
            count_include_pad=p.chance(),
            divisor=p.size(0, 1) * 3,
        )
    else:
        p.emit("adaptive_avg_pool2d", x, output_size=[p.size(1, 3), p.size(1, 3)])


@op
def shapes(p: Program) -> None:
    x = p.pick(1, 4)
    shape = list(p.shape(x))
    way = p.size(0, 3)
    if way == 0:
        p.emit("view", x, shape=[prod(shape[:1]), 1, prod(shape[1:])])
    elif way == 1:
        p.emit("permute", x, dims=p.rng.sample(range(len(shape)), len(shape)))
    elif way == 2:
        p.emit("expand", p.emit("sum", x, dims=[0], keepdim=True, scale=1.0), shape=[2, 3, *shape[1:]])
    else:
        dim = p.size(0, len(shape) - 1)
        start = p.size(0, shape[dim] - 1)
        p.emit("slice", x, dim=dim, start=start, step=2, length=(shape[dim] - start + 1) // 2)


@op
def cat(p: Program) -> None:
    x = p.pick(1)
    shape = list(p.shape(x))
    dim = p.size(0, len(shape) - 1)
    other = p.given(*(p.size(1, 3) if i == dim else size for i, size in enumerate(shape)))
    p.emit("cat", *p.rng.choice([(x, other), (other, x), (x, other, x)]), dim=dim)


@op
def pad(p: Program) -> None:
    x = p.pick(1)
    pads = [p.size(0, 2), p.size(0, 2)]
    p.emit("pad", x, pads=pads if p.shape(x)[-1] == 1 else [-1, pads[1]], value=0.4)


@op
def rows(p: Program) -> None:
    x = p.pick(1, 3)
    generator = torch.Generator().manual_seed(p.rng.getrandbits(40))
    index = torch.randint(p.shape(x)[0], [p.size(1, 3)] * p.size(1, 2), generator=generator)
    p.emit("rows", x, p.constant(index), frozen=p.rng.choice([-1, -1, 0]))


@op
def where(p: Program) -> None:
    x = p.pick()
    shape = p.shape(x)
    if p.chance():
        mask = p.constant(p.normal(shape) > -0.2)
    else:
        mask = p.emit("unary", p.broadcast(shape), function="step", a=0.0, b=0.0, c=0.0)
    pair = [x, p.broadcast(shape)]
    p.rng.shuffle(pair)
    p.emit("where", mask, *pair)


@op
def normalise(p: Program) -> None:
    x, axes = p.pick(1), p.size(1, 2)
    shape = p.shape(x)[-axes:]
    weight, bias = (p.given(*shape) if p.chance(0.7) else None for _ in range(2))
    p.emit("normalise", x, weight, bias, eps=0.05, centred=p.chance() and prod(shape) > 1, axes=len(shape))


@op
def softmaxes(p: Program) -> None:
    x = p.pick(1)
    p.emit(p.rng.choice(["softmax", "logsumexp"]), x)


@op
def cross_entropies(p: Program) -> None:
    x = p.pick(1)
    *rows, classes = p.shape(x)
    if p.chance(0.3):
        p.emit("cross_entropy", x, p.constant(p.normal(p.shape(x)).abs()), None)
        return
    mass = p.constant(p.normal(rows).abs())
    if p.chance():
        p.emit("cross_entropy", x, mass, p.indices(rows, classes))
        return
    tokens, transposed = p.size(1, 5), p.chance()
    weight = p.given(*((classes, tokens) if transposed else (tokens, classes)))
    bias = p.given(tokens) if p.chance() else None
    attrs = {"transposed": transposed, "round": False}
    p.emit("linear_cross_entropy", x, weight, bias, mass, p.indices(rows, tokens), **attrs)


@op
def attention(p: Program) -> None:
    x = p.pick(4, 4)
    *front, length, width = p.shape(x)
    keys, causal = p.size(1, 4), p.chance(0.4)
    q, k, v = x, p.given(*front, keys, width), p.given(*front, keys, p.size(1, 3))
    mask = None
    if p.chance():
        mask = p.constant(p.normal((length, keys)) > -0.8 if p.chance() else p.normal((length, keys)))
    p.emit("attention", q, k, v, mask, causal=causal, scale=0.7)


def draw(seed: int, length: int = 8) -> Program:
    """The ops of the table in turn and others at random."""
    p = Program(seed)
    names = list(OPS)
    for name in [names[seed % len(names)], *p.rng.choices(names, k=length)]:
        before = (list(p.kinds), list(p.tensors), list(p.ops), set(p.read))
        try:
            OPS[name](p)
        except (ValueError, RuntimeError):  # too large, or a window that leaves nothing
            p.kinds, p.tensors, p.ops, p.read = before
    p.finish()
    return p


def offsets(p: Program) -> tuple[Mapping[int, int], int]:
    """Where each parameter stands in the flat vector, and its length."""
    places, total = {}, 0
    for i, kind in enumerate(p.kinds):
        if kind == "parameter":
            places[i] = total
            total += p.tensors[i].numel()
    return places, total
