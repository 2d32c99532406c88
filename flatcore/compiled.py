"""A captured program and the engine's form of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flatcore._C import engine
from flatcore.capture import ProbedProgram, Program
from flatcore.errors import CaptureError
from flatcore.plan import PlanRow

if TYPE_CHECKING:
    from flatcore.autograd import Mode


@dataclass(frozen=True)
class Compiled:
    """A captured program and the engine's form of it."""

    program: Program
    engine: engine.Program


def engine_program(
    program: Program | ProbedProgram,
    offsets: dict[int, int],
    parameters: int,
    device: torch.device,
    room: int,
) -> engine.Program:
    """The engine's form of a program whose parameters, by value id, begin there in the flat vector of that length.

    room: numbers that fit into the memory meant for the buffers of a product; a GPU's rules size some by it.
    """
    try:
        return engine.Program(
            values=[(value.kind, value.shape) for value in program.values],
            ops=[
                (op.kind, [-1 if i is None else i for i in op.inputs], op.output, op.attrs, op.path)
                for op in program.ops
            ],
            offsets=offsets,
            parameters=parameters,
            loss=program.loss,
            cut=list(program.cut or ()),
            device=device.type,
            room=min(room, 2**62),
        )
    except ValueError as error:
        raise CaptureError(f"the engine refuses the program: {error}") from error


def plan_rows(counted: list[tuple[Compiled, int]], mode: Mode) -> tuple[PlanRow, ...]:
    """One row per op; programs that differ in shapes only share their rows."""
    flops: dict[tuple[int, str, str, bool], float] = {}
    for compiled, count in counted:
        for index, op in enumerate(compiled.program.ops):
            row = (index, str(op.external or op.kind), op.path, op.external is None)
            flops[row] = flops.get(row, 0.0) + count * compiled.engine.op_flops(index, mode, 1)
    return tuple(
        PlanRow(kind, path, native, value) for (_, kind, path, native), value in sorted(flops.items())
    )
