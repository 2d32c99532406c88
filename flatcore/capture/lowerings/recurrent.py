"""Recurrent layers (LSTM, GRU, RNN), step by step.

Examples stand on axis 0 throughout, so that what each contributes to a product can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, NoRuleError, lowers

# (what the input gives to the gates, what the last output gives to them, the last states) -> the next states, of which
# the first is the output
Cell = Callable[[Lowering, int, int, Sequence[int]], list[int]]


@lowers("lstm.input")
def _lstm(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    return _layers(lower, a, list(a.hx), _lstm_cell)


@lowers("gru.input")
def _gru(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    return _layers(lower, a, [a.hx], _gru_cell)


@lowers("rnn_tanh.input", "rnn_relu.input")
def _rnn(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    return _layers(lower, a, [a.hx], _rnn_cell(node))


@lowers("lstm_cell.default")
def _one_lstm_step(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, ...]:
    return tuple(_step(lower, a, [lower.operand(state) for state in a.hx], _lstm_cell))


@lowers("gru_cell.default")
def _one_gru_step(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _step(lower, a, [lower.operand(a.hx)], _gru_cell)[0]


@lowers("rnn_tanh_cell.default", "rnn_relu_cell.default")
def _one_rnn_step(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    return _step(lower, a, [lower.operand(a.hx)], _rnn_cell(node))[0]


def _step(lower: Lowering, a: SimpleNamespace, states: Sequence[int], cell: Cell) -> list[int]:
    into, across = lower.operand(a.w_ih), lower.operand(a.w_hh)
    x = lower.emit("linear", lower.operand(a.input), into, lower.optional(a.b_ih), transposed=False)
    h = lower.emit("linear", states[0], across, lower.optional(a.b_hh), transposed=False)
    return cell(lower, x, h, states)


def _rnn_cell(node: fx.Node) -> Cell:
    """Elman (1990), with tanh or relu by the operation's name."""
    function = "relu" if "relu" in str(node.target) else "tanh"
    return lambda lower, x, h, _: [lower.unary(function, _sum(lower, x, h))]


def _lstm_cell(lower: Lowering, x: int, h: int, states: Sequence[int]) -> list[int]:
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), as torch.nn.LSTM has it."""
    gates = _sum(lower, x, h)
    size = lower.shape(gates)[1] // 4
    open_gates = lower.unary("sigmoid", lower.slice(gates, 1, 0, 2 * size))  # input and forget gate
    news = lower.unary("tanh", lower.slice(gates, 1, 2 * size, size))
    out = lower.unary("sigmoid", lower.slice(gates, 1, 3 * size, size))
    kept = lower.emit("mul", lower.slice(open_gates, 1, size, size), states[1])
    taken = lower.emit("mul", lower.slice(open_gates, 1, 0, size), news)
    cell = _sum(lower, kept, taken)
    return [lower.emit("mul", out, lower.unary("tanh", cell)), cell]


def _gru_cell(lower: Lowering, x: int, h: int, states: Sequence[int]) -> list[int]:
    """Cho et al. (2014), with the reset gate behind the product, as torch.nn.GRU has it."""
    size = lower.shape(x)[1] // 3
    gates = lower.unary(
        "sigmoid", _sum(lower, lower.slice(x, 1, 0, 2 * size), lower.slice(h, 1, 0, 2 * size))
    )
    reset, update = lower.slice(gates, 1, 0, size), lower.slice(gates, 1, size, size)
    remembered = lower.emit("mul", reset, lower.slice(h, 1, 2 * size, size))
    new = lower.unary("tanh", _sum(lower, lower.slice(x, 1, 2 * size, size), remembered))
    difference = lower.emit("add", states[0], new, alpha=-1.0)
    return [_sum(lower, new, lower.emit("mul", update, difference))]


def _layers(lower: Lowering, a: SimpleNamespace, initial: list[fx.Node], cell: Cell) -> tuple[int, ...]:
    """(outputs, last states...), laid as torch does."""
    x = lower.operand(a.input)
    if not a.batch_first:
        x = lower.permute(x, (1, 0, 2))
    if 0 in lower.shape(x):
        raise NoRuleError
    starts = [lower.operand(state) for state in initial]
    directions = 2 if a.bidirectional else 1
    count = len(a.params) // (a.num_layers * directions)
    last: list[list[int]] = []
    for layer in range(a.num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            parameters = [lower.operand(p) for p in a.params[i * count : (i + 1) * count]]
            states = [lower.view(lower.slice(start, 0, i, 1), lower.shape(start)[1:]) for start in starts]
            steps, states = _sequence(lower, x, states, parameters, a.has_biases, bool(direction), cell)
            outputs.append(steps)
            last.append(states)
        x = lower.cat(outputs, 2)
    output = x if a.batch_first else lower.permute(x, (1, 0, 2))
    ends = (
        lower.cat([lower.view(state, (1, *lower.shape(state))) for state in kind], 0)
        for kind in zip(*last, strict=True)
    )
    return (output, *ends)


def _sequence(
    lower: Lowering,
    x: int,
    states: list[int],
    parameters: Sequence[int],
    has_biases: bool,
    reverse: bool,
    cell: Cell,
) -> tuple[int, list[int]]:
    """One layer in one direction over x (examples, steps, width): its outputs and last states."""
    into, across = parameters[:2]
    bias_into, bias_across = parameters[2:4] if has_biases else (None, None)
    projection = parameters[4 if has_biases else 2 :]  # of an LSTM's output, where it has proj_size
    wide = lower.emit("linear", x, into, bias_into, transposed=False)
    examples, length, width = lower.shape(wide)
    outputs = {}
    for t in reversed(range(length)) if reverse else range(length):
        here = lower.view(lower.slice(wide, 1, t, 1), (examples, width))
        back = lower.emit("linear", states[0], across, bias_across, transposed=False)
        states = cell(lower, here, back, states)
        if projection:
            states[0] = lower.emit("linear", states[0], projection[0], None, transposed=False)
        outputs[t] = lower.view(states[0], (examples, 1, lower.shape(states[0])[1]))
    return lower.cat((outputs[t] for t in range(length)), 1), states


def _sum(lower: Lowering, x: int, y: int) -> int:
    return lower.emit("add", x, y, alpha=1.0)
