"""A random graph: its recipe, and the model, loss and batch that it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import contractions, images, movement, pointwise, recurrent, unsupported  # noqa: F401  (register their ops)
from .builder import NAMES, OPS, TWICE, UNSUPPORTED, Builder
from .losses import LOSSES, outputs


@dataclass(frozen=True)
class Recipe:
    """What a graph is drawn from. `steps`: names of ops with the seeds of their choices; the first `focused` of them
    must act on values that depend on the parameters."""

    seed: int
    steps: tuple[tuple[str, int], ...]
    focus: frozenset[int]  # positions among the steps
    loss: str


def recipe(seed: int, focus: list[str], loss: str, length: int, foreign: int = 0) -> Recipe:
    """Ops of the table at random, those of `focus` among them, and `foreign` ops that no lowering knows."""
    rng = random.Random(seed)
    # What the layout of images in memory could break is drawn more often than one op among many.
    weights = [len(OPS) // 8 if name == "behind_an_image" else 1 for name in OPS]
    names = [*focus, *rng.choices(list(OPS), weights, k=max(length - len(focus), 0))]
    names += rng.choices(list(UNSUPPORTED), k=foreign)
    marks = [i < len(focus) for i in range(len(names))]
    order = rng.sample(range(len(names)), len(names))
    return Recipe(
        seed,
        tuple((names[i], rng.getrandbits(32)) for i in order),
        frozenset(place for place, i in enumerate(order) if marks[i]),
        loss,
    )


class Graph(nn.Module):
    """The model: its forward pass is the source code, line by line."""

    def __init__(self, b: Builder, result: str, loss: str, target: Tensor, written: set[str]) -> None:
        super().__init__()
        state = b.state
        for name in state.parameters:
            value = state.tensors[name]
            self.register_parameter(name, nn.Parameter(value.detach().clone(), value.requires_grad))
        for name in state.constants:
            self.register_buffer(name, state.tensors[name])
        self.names = [*state.parameters, *state.constants]
        self.written = written  # names of the ops that applied
        self.casts = state.casts
        self.batch = (*(state.tensors[name] for name in state.inputs), target)
        self.tuple_result = "," in result
        head = f"def forward({', '.join([*self.names, *state.inputs])}):"
        self.source = "\n    ".join([head, *state.lines, f"return {result}"])
        self._forward = _function(self.source)
        tail = f"return noise({result})" if not self.tuple_result else f"return noise(({result}))"
        self._reference = "\n    ".join([head.replace("(", "(noise, ", 1), *state.reference, tail])
        self.loss_source = (
            f"def loss(output, y):\n    {'z, h = output' if self.tuple_result else 'z = output'}"
        )
        self.loss_source += f"\n    return {loss}"
        self.loss = _function(self.loss_source)
        self.eval()

    @property
    def torch_is_wrong(self) -> bool:
        """Has it a function whose second derivative torch does not get right? See `builder.TWICE`."""
        return any(f"{name}(" in self.source for name in TWICE if TWICE[name] is not NAMES[name])

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(*(getattr(self, name) for name in self.names), *inputs)

    def reference(self, inputs: tuple[Tensor, ...], noise: Callable[[Any], Any]) -> Any:
        """The same with each value passed through `noise`, and torch's twice differentiable forms."""
        tensors = (noise(getattr(self, name)) for name in self.names)
        return _function(self._reference, TWICE)(noise, *tensors, *inputs)

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{n}: {tuple(t.shape)}{'' if t.requires_grad or n[0] != 'p' else ' frozen'}"
            for n, t in [*self.named_parameters(), *self.named_buffers()]
        )
        inputs = ", ".join(str(tuple(t.shape)) for t in self.batch)
        return f"{self.source}\n{self.loss_source}\n# {shapes}\n# batch: {inputs}"


def _function(source: str, names: dict[str, Any] = NAMES) -> Callable[..., Any]:
    scope = dict(names)
    exec(source, scope)
    name = source[len("def ") : source.index("(")]
    return scope[name]  # type: ignore[no-any-return]


def build(recipe: Recipe) -> Graph:
    b = Builder(recipe.seed)
    # Steps draw from seeds of their own, so that a recipe without some of them stays much the same.
    b.state.inputs.append("x0")
    sizes = b.choice([(4, 6), (3, 3, 4), (2, 2, 4, 5)])
    b.state.tensors["x0"] = b._normal([b.integer(1, size) if b.chance(0.3) else size for size in sizes])
    b.focus = True
    width = b.size("x0", -1)
    b.let(f"F.linear(x0, {b.parameter((b.integer(2, 5), width), width**-0.5)})")
    b.let(f"x0 * {b.parameter(b.broadcastable(b.shape('x0')[1:]))}")
    written = set()
    for place, (name, seed) in enumerate(recipe.steps):
        op = OPS.get(name) or UNSUPPORTED[name]
        # An op that finds nothing to act on may with other choices.
        if any(
            b.step(op, seed + i, place in recipe.focus) for i in range(12 if place in recipe.focus else 2)
        ):
            written.add(name)
    b.rng, b.focus = random.Random(recipe.seed + 1), True
    z, h = outputs(b)
    make, _ = LOSSES[recipe.loss]
    loss = make(b, b.shape(z))
    expression = loss.expression + (" + 0.3 * h.square().mean()" if h else "")
    return Graph(b, f"{z}, {h}" if h else z, expression, loss.target, written)
