"""Products by the compiled engine: one program per batch structure, one state per batch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatcore import checks
from flatcore._C import engine
from flatcore.capture import (
    ProbedProgram,
    Program,
    batch_leaves,
    capture,
    cut_values,
    flatten_batch,
    interpret,
    named_tensors,
)
from flatcore.data import Batch, version
from flatcore.environment import ONE_AT_A_TIME
from flatcore.errors import CaptureError
from flatcore.evaluate import ModelLoss, once_differentiable, plain_torch, rows_mix
from flatcore.plan import Plan, PlanRow
from flatcore.precision import Precision

if TYPE_CHECKING:
    from flatcore.autograd import Mode
    from flatcore.objective import Objective, Snapshot, WeightedBatch

# A program is captured for every batch structure; more than this many cost more than they save.
_MOST_STRUCTURES = 16

# Why a gradient covariance is not computed from the rows of the model's output.
ROWS_MIX = "other rows of the model's output than the first example's depend on the first example"
# What a batch may hold besides tensors: equal where it prints alike, as the key of a structure has it.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


@dataclass(frozen=True)
class Compiled:
    """A captured program and the engine's form of it."""

    program: Program
    engine: engine.Program


class NativeBackend:
    """Hessian, GGN and gradient covariance of an objective whose batches all have programs.

    Raises CaptureError on construction where one has none, or where a program's loss is not the model's.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._compiled: dict[Hashable, Compiled] = {}
        self._keys: list[Hashable] = []
        self._point: tuple[Any, ...] = ()
        self._states: dict[int, engine.Linearization] = {}
        self._held = 0
        self._most: dict[tuple[Mode, Precision], int] = {}  # directions at once
        self._mixes: str | None = None  # not tried yet
        self.sweeps: object = None  # set by flatcore.example_sweeps
        with plain_torch():
            for batch in objective.batches():
                key = key_of(batch.batch)
                self._keys.append(key)
                if key in self._compiled:
                    continue
                if len(self._compiled) == _MOST_STRUCTURES:
                    raise CaptureError(
                        f"the batches have more than {_MOST_STRUCTURES} different shapes; pad them to a few"
                    )
                self._compiled[key] = self._compile(batch)
                self._check_loss(batch)

    def refusal(self, mode: Mode) -> str:
        """Why the programs have no products of this mode; empty if they have."""
        for batch, key in zip(self._sizes(), self._keys, strict=True):
            program = self._compiled[key].program
            if mode == "hessian":
                continue
            if program.cut is None:
                return program.cut_reason
            rows = [program.values[i].shape for i in program.cut]
            if mode == "covariance" and not all(shape and shape[0] % batch == 0 for shape in rows):
                return f"the model's output of shape {rows[0]} has no axis 0 made of {batch} examples"
        return self.mixing() if mode == "covariance" else ""

    @property
    def external(self) -> list[str]:
        """The operations that run through autograd, with the modules they stand in."""
        ops = [op for compiled in self._compiled.values() for op in compiled.program.ops]
        return list(dict.fromkeys(f"{op.external} in '{op.path}'" for op in ops if op.external))

    def _mixing(self) -> str:
        """Why the rows of the cut are not the examples' own, in their order; empty if they are.

        Tried, once per program: with the first example's data replaced by another's, only the first example's rows
        of the cut may change.
        """
        parameters = self.objective.snapshot().values
        seen = set()
        with plain_torch(), torch.no_grad():
            for batch, key in zip(self.objective.batches(), self._keys, strict=True):
                if key in seen or batch.examples < 2:
                    continue
                seen.add(key)
                program = self._compiled[key].program
                frozen = named_tensors(self.objective.model, self.objective.loss_function)

                def rows(data: Batch, program: Program = program, frozen: Any = frozen) -> list[Tensor]:
                    constants = program.prelude.run(batch_leaves(data), frozen)
                    values = interpret(program, parameters, constants)
                    return cut_values(program, values)

                if rows_mix(rows, batch.batch, batch.examples):
                    return ROWS_MIX
        return ""

    def product(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, precision: Precision = "full") -> None:
        """Y = A V for the rows of V and Y, both (K, P)."""
        pieces = self._pieces(mode, V.shape[0], precision)
        examples = self.objective.examples
        accumulate = False
        for batch, state in self._linearizations(at):
            for piece in pieces:
                state.product(V[piece], Y[piece], mode, accumulate, batch.examples, examples, precision)
            accumulate = True

    def quadratic_form(self, mode: Mode, V: Tensor, at: Snapshot, precision: Precision = "full") -> Tensor:
        """<v, A v> for the rows of V (K, P): (K,) float64 on the CPU. No A v is formed."""
        q = torch.zeros(V.shape[0], dtype=torch.float64, device="cpu")
        pieces, examples = self._pieces(mode, V.shape[0], precision), self.objective.examples
        for batch, state in self._linearizations(at):
            for piece in pieces:
                state.quadratic_form(V[piece], q[piece], mode, batch.examples, examples, precision)
        return q

    def gradient(self, at: Snapshot) -> Tensor:
        """Gradient of the objective, (P,)."""
        layout = self.objective.layout
        total = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        for _, state in self._linearizations(at):
            state.gradient(total, True)
        return total

    def plan(self, mode: Mode, precision: Precision = "full") -> Plan:
        objective, itemsize = self.objective, self.objective.layout.dtype.itemsize
        counted = [(self._compiled[key], count) for key, count in Counter(self._keys).items()]
        most = self._most_directions(mode, precision)

        def peak(K: int) -> int:
            return max(c.engine.peak_bytes(mode, min(K, most), itemsize, precision) for c, _ in counted)

        def flops(K: int) -> float:
            return sum(count * c.engine.flops(mode, K) for c, count in counted)

        rounded = sum(count * c.engine.rounded_flops(mode, 1) for c, count in counted)
        return Plan(
            operator=mode,
            backend="native",
            reason="",
            rows=_rows(counted, mode),
            parameters=objective.layout.size,
            batches=len(objective.data),
            examples=objective.examples,
            state_bytes=sum(count * c.engine.state_bytes(itemsize) for c, count in counted),
            kept_bytes=objective.budget.states,
            directions=most,
            _peak=peak,
            _flops=flops,
            precision=precision,
            bf16_fraction=rounded / (flops(1) or 1) if precision == "bf16" else 0.0,
        )

    def _compile(self, batch: WeightedBatch) -> Compiled:
        objective = self.objective
        loss = objective.loss_function
        try:
            program = capture(
                objective.model,
                loss.fn if isinstance(loss, ModelLoss) else loss,
                batch.batch,
                selected=list(objective.layout.slices),
                loss_kind="model_batch" if isinstance(loss, ModelLoss) else "output_target",
                allow_train_mode=objective.allow_train_mode,
            )
        except (CaptureError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # from torch.export, or a program that breaks the rules: autograd is right
            first_line = (str(error).strip() or "no message").splitlines()[0]
            raise CaptureError(f"{type(error).__name__}: {first_line}") from error
        if program.reduction == "sum":
            objective.refuse_sum()
        unknown = {op.kind for op in program.ops} - set(engine.op_kinds())
        if unknown:
            raise CaptureError("the engine has no rules for it", op=min(unknown))
        offsets = {i: objective.layout.slices[name].start for i, name in program.parameters.items()}
        return Compiled(program, engine_program(program, offsets, objective.layout.size))

    def _check_loss(self, batch: WeightedBatch) -> None:
        """A program that does not compute the model's loss must not be used, whatever the reason."""
        objective = self.objective
        try:
            ours = self._linearize(batch, objective.snapshot())[0].loss
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(
                f"the engine does not run its program: {str(error).splitlines()[0]}"
            ) from error
        with torch.no_grad():
            theirs = float(
                checks.evaluate(
                    objective.evaluate, batch.batch, objective.snapshot().values, batch.index, twice=False
                ).loss
            )
        program = self._compiled[key_of(batch.batch)].program
        # Does the model cast to float32 inside?
        rounds = any(
            op.kind == "round" or op.attrs.get("round") or (op.external and op.external.rounds)
            for op in program.ops
        )
        precision = torch.float32 if rounds else objective.layout.dtype
        # A loss near zero is the difference of numbers of order one.
        if not abs(ours - theirs) <= math.sqrt(torch.finfo(precision).eps) * (1 + abs(theirs)):
            raise CaptureError(
                f"the captured program gives the loss {ours:.9g} where the model gives {theirs:.9g}"
            )

    def _linearizations(self, snapshot: Snapshot) -> Iterator[tuple[WeightedBatch, engine.Linearization]]:
        """The states of all batches at these parameters, kept as far as the budget goes."""
        with ONE_AT_A_TIME:
            point = (snapshot, *map(version, self._code_tensors()))
            if point != self._point:
                self._states, self._held, self._point = {}, 0, point
            states = self._states  # another thread may go on to other parameters meanwhile
        for batch in self.objective.batches():
            state = states.get(batch.index)
            if state is None:
                with plain_torch():
                    state, size = self._linearize(batch, snapshot)
                    checks.check_finite_loss(state.loss, batch.index)
                    if states is self._states and self._held + size <= self.objective.budget.states:
                        self._held += size if batch.index not in states else 0
                        states[batch.index] = state
            yield batch, state

    def _code_tensors(self) -> list[Tensor]:
        """Tensors that the model or the loss hold outside their modules, in a closure say."""
        sources = [s for c in self._compiled.values() for s in c.program.prelude.sources]
        return [s.tensor for s in sources if s.tensor is not None]

    def compiled(self, batch: WeightedBatch) -> Compiled:
        """The program of a batch."""
        return self._compiled[key_of(batch.batch)]

    def programs(self) -> dict[Hashable, Compiled]:
        """The programs by the `key_of` the batches they are for."""
        return dict(self._compiled)

    def counts(self) -> Counter[Hashable]:
        """How many batches each program serves."""
        return Counter(self._keys)

    def mixing(self) -> str:
        """Why the rows of the model's output are not the examples' own; empty if they are."""
        if self._mixes is None:
            self._mixes = self._mixing()
        return self._mixes

    def leaves(self, batch: WeightedBatch, snapshot: Snapshot) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Constants and parameters of a batch's program by value id."""
        program = self.compiled(batch).program
        frozen = named_tensors(self.objective.model, self.objective.loss_function)
        constants = once_differentiable(partial(program.prelude.run, batch_leaves(batch.batch), frozen))
        return constants, {i: snapshot.values[name] for i, name in program.parameters.items()}

    def _linearize(self, batch: WeightedBatch, snapshot: Snapshot) -> tuple[engine.Linearization, int]:
        """The state of a batch and the bytes it holds, constants included."""
        constants, parameters = self.leaves(batch, snapshot)
        state = engine.Linearization(self.compiled(batch).engine, constants | parameters, batch.weight)
        frozen = named_tensors(self.objective.model, self.objective.loss_function)
        known = {t.untyped_storage().data_ptr() for t in (*batch_leaves(batch.batch), *frozen.values())}
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in constants.values()}
        return state, state.bytes + sum(size for storage, size in own.items() if storage not in known)

    def _sizes(self) -> list[int]:
        objective = self.objective
        return [n for n, weight in zip(objective.data.examples, objective.weights, strict=True) if weight]

    def _most_directions(self, mode: Mode, precision: Precision) -> int:
        """The most directions whose buffers fit into the budget; one at least."""
        if (mode, precision) not in self._most:
            itemsize, limit = self.objective.layout.dtype.itemsize, self.objective.budget.directions

            def too_many(K: int) -> bool:  # the peak moves from op to op as K grows: it is no line
                programs = self._compiled.values()
                return any(c.engine.peak_bytes(mode, K, itemsize, precision) > limit for c in programs)

            most = 1
            while most < limit and not too_many(2 * most):
                most *= 2
            more = bisect_left(range(most + 1, 2 * most), True, key=too_many)
            self._most[mode, precision] = most + more
        return self._most[mode, precision]

    def _pieces(self, mode: Mode, K: int, precision: Precision) -> list[slice]:
        """K directions in as few, nearly equal pieces as the budget allows."""
        count = -(-K // self._most_directions(mode, precision))
        bounds = [K * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(bounds)]


def key_of(batch: Batch) -> Hashable:
    """Batches of one key share a program. Raises CaptureError where that could mix up two batches."""
    structure = flatten_batch(batch)[1]
    for _, leaf in structure.others:
        if not isinstance(leaf, _PLAIN):
            raise CaptureError(
                f"a batch holds a {type(leaf).__name__}, which a program cannot read; pass it as a tensor"
            )
    return structure.key


def engine_program(
    program: Program | ProbedProgram, offsets: dict[int, int], parameters: int
) -> engine.Program:
    """The engine's form of a program whose parameters, by value id, begin there in the flat vector of that length."""
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
        )
    except ValueError as error:
        raise CaptureError(f"the engine refuses the program: {error}") from error


def _rows(counted: list[tuple[Compiled, int]], mode: Mode) -> tuple[PlanRow, ...]:
    """One row per op; programs that differ in shapes only share their rows."""
    flops: dict[tuple[int, str, str, bool], float] = {}
    for compiled, count in counted:
        for index, op in enumerate(compiled.program.ops):
            row = (index, str(op.external or op.kind), op.path, op.external is None)
            flops[row] = flops.get(row, 0.0) + count * compiled.engine.op_flops(index, mode, 1)
    return tuple(
        PlanRow(kind, path, native, value) for (_, kind, path, native), value in sorted(flops.items())
    )
