"""Recurrent layers and single steps of them."""

from __future__ import annotations

from .builder import Builder, op

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@op(*(f"{kind}.input" for kind in GATES))
def recurrent_layers(b: Builder) -> None:
    x = b.pick(3, 3)
    kind, layers, size = b.choice(list(GATES)), b.integer(1, 2), b.integer(1, 3)
    bidirectional, batch_first, biases = b.chance(), b.chance(), b.chance()
    directions, rows = 1 + bidirectional, GATES[kind] * size
    projected = size - 1 if kind == "lstm" and size > 1 and b.chance() else 0
    out = projected or size
    parameters = []
    for layer in range(layers):
        width = directions * out if layer else b.size(x, 2)
        for _ in range(directions):
            shapes = [(rows, width), (rows, out)] + [(rows,)] * (2 * biases)
            parameters += [b.weight(shape) for shape in shapes + [(out, size)] * bool(projected)]
    count = layers * directions, b.size(x, 0 if batch_first else 1)
    state = b.weight((*count, out))
    states = f"[{state}, {b.weight((*count, size))}]" if kind == "lstm" else state
    options = f"{biases}, {layers}, 0.0, False, {bidirectional}, {batch_first}"
    b.let(
        f"torch.{kind}({x}, {states}, [{', '.join(parameters)}], {options})", count=3 if kind == "lstm" else 2
    )


@op(*(f"{kind}_cell.default" for kind in GATES))
def recurrent_step(b: Builder) -> None:
    x = b.pick(2, 2)
    kind, size = b.choice(list(GATES)), b.integer(1, 4)
    rows, state = GATES[kind] * size, (b.size(x, 0), size)
    hidden = b.weight(state)
    states = f"[{hidden}, {b.weight(state)}]" if kind == "lstm" else hidden
    shapes = [(rows, b.size(x, 1)), (rows, size)] + [(rows,)] * (2 * b.chance())
    weights = ", ".join(b.weight(shape) for shape in shapes)
    b.let(f"torch.{kind}_cell({x}, {states}, {weights})", count=2 if kind == "lstm" else 1)
