"""Where the model ends and the loss begins, and how the loss gathers the examples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .deferred import Deferred
from .graph import arguments, aten_name
from .lower import LogSoftmax, Lowering
from .program import Reduction, depending

# Losses of (prediction, target, ...): what they call their reduction stands in the schema.
_LOSSES = {
    "cross_entropy_loss.default",
    "nll_loss_nd.default",
    "mse_loss.default",
    "l1_loss.default",
    "smooth_l1_loss.default",
    "huber_loss.default",
    "binary_cross_entropy.default",
    "binary_cross_entropy_with_logits.default",
}
# Why there is no cut where torch autograd may still find one.
NO_VALUE = "the model hands the loss what is no floating tensor of a fixed shape"
_REDUCTIONS: dict[int, Reduction] = {1: "mean", 2: "sum"}
_PASS_ON = ("clone", "view", "reshape", "alias", "squeeze", "neg", "mul", "div")


def find_cut(
    lower: Lowering, needed: Sequence[fx.Node], marks: Sequence[fx.Node] | None, loss: int
) -> tuple[tuple[int, ...] | None, str]:
    """(cut, reason why there is none), in the value ids of `lower`.

    marks: the nodes of the model's outputs, where model and loss are apart; None where they are one function.
    """
    parameters = {value.id for value in lower.values if value.kind == "parameter"}
    if marks is None:
        losses = [node for node in needed if lower.is_active(node) and aten_name(node) in _LOSSES]
        if len(losses) != 1:
            names = ", ".join(aten_name(node).split(".")[0] for node in losses) or "none"
            return None, f"expected exactly one known loss function in the model's loss, found {names}"
        handed = [node for node in losses[0].all_input_nodes if lower.is_active(node)]
    else:
        handed = [mark for mark in marks if mark in set(needed) and lower.is_active(mark)]
    if any(isinstance(lower.result(node), Deferred) for node in handed):
        return None, NO_VALUE
    predictions = [_prediction(lower, node) for node in handed]
    if marks is None:
        # broadcast_tensors, in front of some losses, makes a target look active that is not.
        predictions = [p for p in predictions if p in depending(lower.ops, parameters)]
        if len(predictions) != 1:
            return None, f"both arguments of {aten_name(losses[0]).split('.')[0]} depend on the parameters"
    cut = tuple(dict.fromkeys(predictions))
    if not cut:
        return None, "no tensor of the model's output reaches the loss"
    if any(lower.values[i].kind != "activation" for i in cut):
        return None, "the loss reads a parameter as it is"
    if loss in depending(lower.ops, parameters, without=frozenset(cut)):
        return None, "the loss depends on the parameters in another way than through the model's output"
    return cut, ""


def _prediction(lower: Lowering, node: fx.Node) -> int:
    """What the loss takes from `node`: log-probabilities that only nll_loss reads are part of a cross-entropy."""
    result = lower.result(node)
    if isinstance(result, LogSoftmax) and result.is_of_cross_entropy(node):
        return result.logits
    return lower.operand(node)


def reduction_of(node: fx.Node, lower: Lowering) -> Reduction:
    """How a scalar gathers its examples, as far as the graph tells; constant terms do not matter."""
    name = aten_name(node)
    base = name.split(".")[0]
    if name in _LOSSES:
        return _REDUCTIONS.get(arguments(node).reduction, "other")
    if base in ("mean", "sum"):
        return "mean" if base == "mean" else "sum"
    sources = [n for n in node.all_input_nodes if lower.is_active(n)]
    if base in ("add", "sub", "rsub") or (base in _PASS_ON and len(sources) == 1):
        found = {reduction_of(n, lower) for n in sources}
        # A sum times a number may be meant as a mean: nothing in the graph says.
        if len(found) == 1 and not (found == {"sum"} and base in ("mul", "div")):
            return found.pop()
    return "other"
