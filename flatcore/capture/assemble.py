"""From an exported graph to a verified program."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from torch import Tensor
from torch.export import ExportedProgram

from . import lowerings  # noqa: F401  (registers the lowerings)
from .cut import find_cut, reduction_of
from .fuse import fuse
from .gelu import whole_gelus
from .graph import Names, active_nodes, module_path, needed_nodes, outputs
from .lower import Lowering
from .prelude import Source
from .program import Op, Program
from .refusals import refuse_changed_buffers, refuse_detached, refuse_random
from .verify import verify


def assemble(
    exported: ExportedProgram, names: Names, has_marks: bool, examples: int, allow_train_mode: bool
) -> Program:
    """Lower what the loss needs, find the cut, number the values, verify.

    has_marks: the outputs behind the loss mark the model's outputs.
    allow_train_mode: normalisation layers may update their running statistics.
    """
    refuse_changed_buffers(exported, names, allow_train_mode)
    loss_node, *marks = outputs(exported)
    parameters, sources = names.inputs(exported)
    active = active_nodes(exported.graph, parameters)
    required = needed_nodes([loss_node])
    needed = [node for node in exported.graph.nodes if node in required]
    refuse_random(needed)
    if loss_node not in active:
        raise ValueError("selected: expected a parameter that the loss depends on, got none that reaches it")
    refuse_detached(needed, active)
    for node in exported.graph.nodes:
        if node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor):
            sources[node] = Source(tensor=getattr(exported.graph_module, str(node.target)))
    lower = Lowering(parameters, sources, active, names.selected, module_path)
    for node in needed:
        if node in active:
            lower.lower(node, mark=node in marks)
    loss = lower.operand(loss_node)
    cut, cut_reason = find_cut(lower, needed, marks if has_marks else None, loss)
    normaliser = lower.constant(lower.normalisers[loss]) if loss in lower.normalisers else None

    ops, renamed = _without_plain_marks(_alive(lower.ops, loss), lower)
    cut = None if cut is None else tuple(renamed.get(i, i) for i in cut)
    ops, cut = fuse(whole_gelus(ops, cut or ()), lower.values, cut, examples)
    read = {i for op in ops for i in op.present}
    if normaliser is not None:
        read.add(normaliser)
    named = [value for value in lower.values if value.kind == "parameter"]
    constants = [i for i in lower.constants if i in read]
    order: list[int] = [*(value.id for value in named), *constants, *(op.output for op in ops)]
    new = {old: position for position, old in enumerate(order)}
    program = Program(
        values=tuple(dataclasses.replace(lower.values[old], id=new[old]) for old in order),
        ops=tuple(_renumbered(op, new) for op in ops),
        parameters={new[value.id]: value.name for value in named},
        constants=tuple(new[i] for i in constants),
        loss=new[renamed.get(loss, loss)],
        cut=None if cut is None else tuple(new[i] for i in cut),
        cut_reason=cut_reason,
        normaliser=None if normaliser is None else new[normaliser],
        reduction=reduction_of(loss_node, lower),
        examples=examples,
        prelude=lower.prelude.finish({new[i]: lower.constants[i] for i in constants}),
    )
    verify(program)
    return program


def _alive(ops: list[Op], loss: int) -> list[Op]:
    """The ops that the loss needs."""
    needed, alive = {loss}, []
    for op in reversed(ops):
        if op.output in needed:
            needed.update(op.present)
            alive.append(op)
    return alive[::-1]


def _without_plain_marks(ops: list[Op], lower: Lowering) -> tuple[list[Op], dict[int, int]]:
    """Drop the marks of activations that nothing else reads: such an activation is the model's output itself.

    The mark stays where the model's output is a parameter, or where the model reads its output too: then the
    adjoint of the mark, unlike that of the activation, is the derivative by the output alone.
    """
    readers = Counter(i for op in ops for i in op.present)
    renamed = {
        op.output: source
        for op in ops
        if op.output in lower.marks
        for source in op.present
        if lower.values[source].kind == "activation" and readers[source] == 1
    }
    kept = [op for op in ops if op.output not in renamed]
    return [
        dataclasses.replace(op, inputs=tuple(None if i is None else renamed.get(i, i) for i in op.inputs))
        for op in kept
    ], renamed


def _renumbered(op: Op, new: Mapping[int, int]) -> Op:
    inputs = tuple(None if i is None else new[i] for i in op.inputs)
    return dataclasses.replace(op, inputs=inputs, output=new[op.output])
