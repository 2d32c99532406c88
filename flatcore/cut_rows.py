"""Are the rows of the model's output the examples' own, one after another?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatcore.capture import Program, batch_leaves, cut_values, interpret, named_tensors
from flatcore.data import Batch
from flatcore.evaluate import plain_torch, rows_mix

if TYPE_CHECKING:
    from flatcore.objective import Objective, Snapshot

# Why a gradient covariance is not computed from the rows of the model's output.
ROWS_MIX = "other rows of the model's output than the first example's depend on the first example"


def mixing(objective: Objective, programs: Sequence[Program], at: Snapshot) -> str:
    """Why the rows of the cut are not the examples' own, in their order; empty if they are. programs: of the batches.

    Tried, once per program, for two evaluations of a batch: with the first example's data replaced by another's, only
    the first example's rows of the cut may change.
    """
    parameters = at.values
    seen: set[int] = set()
    with plain_torch(objective.layout.device), torch.no_grad():
        for batch, program in zip(objective.batches(), programs, strict=True):
            if id(program) in seen or batch.examples < 2:
                continue
            seen.add(id(program))
            frozen = named_tensors(objective.model, objective.loss_function)

            def rows(data: Batch, program: Program = program, frozen: Any = frozen) -> list[Tensor]:
                constants = program.prelude.run(batch_leaves(data), frozen)
                values = interpret(program, parameters, constants)
                return cut_values(program, values)

            if rows_mix(rows, batch.batch, batch.examples):
                return ROWS_MIX
    return ""
