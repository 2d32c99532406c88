"""Products by the compiled engine: one program per batch structure, one state per batch."""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flatcore import changes, checks
from flatcore._C import engine
from flatcore.capture import (
    batch_leaves,
    capture,
    depends_on_values,
    flatten_batch,
    named_tensors,
)
from flatcore.compiled import Compiled, engine_program, plan_rows
from flatcore.cut_rows import mixing
from flatcore.data import Batch
from flatcore.directions import Directions
from flatcore.environment import ONE_AT_A_TIME
from flatcore.errors import CaptureError, first_line
from flatcore.evaluate import ModelLoss, once_differentiable, plain_torch
from flatcore.graphs import Graphs, pays
from flatcore.plan import Plan
from flatcore.precision import Precision

if TYPE_CHECKING:
    from flatcore.autograd import Mode
    from flatcore.objective import Objective, Snapshot, WeightedBatch

_Result = TypeVar("_Result")

# A program is captured for every batch structure; more than this many cost more than they save.
_MOST_STRUCTURES = 16

# What a batch may hold besides tensors: equal where it prints alike, as the key of a structure has it.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class NativeBackend:
    """Hessian, GGN and gradient covariance of an objective whose batches all have programs.

    Raises CaptureError on construction where one has none, where a program's loss is not the model's, or where the
    engine was not built for the parameters' device.
    """

    def __init__(self, objective: Objective) -> None:
        device = objective.layout.device
        if device.type != "cpu" and (device.type != "cuda" or engine.gpu != "cuda"):
            raise CaptureError(
                f"the parameters are on {device}, for which flatcore's extension was not built (`flatcore doctor` says "
                "for what it was)"
            )
        self.objective = objective
        self._compiled: dict[Hashable, Compiled] = {}
        self._keys: list[Hashable] = []
        self._point: tuple[Any, ...] = ()
        self._states: dict[int, engine.Linearization] = {}
        self._held = 0
        self._graphs: dict[int, tuple[engine.Linearization, Graphs]] = {}
        self._keeps_states = True
        self._directions: dict[tuple[Mode, Precision], Directions] = {}
        self._refusals: dict[Mode, str] = {}
        # The point at which it was tried, and what was found.
        self._mixes: tuple[weakref.ref[Snapshot], bytes, str] | None = None
        self.sweeps: object = None  # set by flatcore.example_sweeps
        with plain_torch(self.objective.layout.device):
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
        """Why the programs have no products of this mode; empty if they have. Asked before every product."""
        if mode not in self._refusals:
            self._refusals[mode] = self._refusal(mode)
        return self._refusals[mode] or (self.mixing() if mode == "covariance" else "")

    def _refusal(self, mode: Mode) -> str:
        for batch, key in zip(self._sizes(), self._keys, strict=True):
            program = self._compiled[key].program
            if mode == "hessian":
                continue
            if program.cut is None:
                return program.cut_reason
            rows = [program.values[i].shape for i in program.cut]
            if mode == "covariance" and not all(shape and shape[0] % batch == 0 for shape in rows):
                return f"the model's output of shape {rows[0]} has no axis 0 made of {batch} examples"
        return ""

    @functools.cached_property
    def external(self) -> list[str]:
        """The operations that run through autograd, with the modules they stand in."""
        ops = [op for compiled in self._compiled.values() for op in compiled.program.ops]
        return list(dict.fromkeys(f"{op.external} in '{op.path}'" for op in ops if op.external))

    def product(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, precision: Precision = "full") -> None:
        """Y = A V for the rows of V and Y, both (K, P)."""
        examples = self.objective.examples

        def all_batches(pieces: list[slice]) -> None:
            parts = [(V, Y)] if len(pieces) == 1 else [(V[piece], Y[piece]) for piece in pieces]
            accumulate = False
            for batch, state in self._linearizations(at):
                for rows, into in parts:
                    self._product(state, batch, rows, into, mode, accumulate, examples, precision)
                accumulate = True

        self._run(mode, precision, V.shape[0], all_batches)

    def _product(
        self,
        state: engine.Linearization,
        batch: WeightedBatch,
        V: Tensor,
        Y: Tensor,
        mode: Mode,
        accumulate: bool,
        examples: int,
        precision: Precision,
    ) -> None:
        def launch(rows: Tensor, into: Tensor) -> None:
            state.product(rows, into, mode, False, batch.examples, examples, precision)

        graphs = self._graphs_of(state, batch, V)
        if graphs is None:
            state.product(V, Y, mode, accumulate, batch.examples, examples, precision)
        else:
            size = partial(self._directions_of(mode, precision).peak, V.shape[0])
            graphs.run((mode, precision), launch, V, Y, accumulate, size, self._room)

    def _room(self) -> int:
        """Bytes that recorded products may still hold."""
        recorded = sum(other.bytes for _, other in list(self._graphs.values()))
        return self.objective.budget.states - self._held - recorded

    def _graphs_of(self, state: engine.Linearization, batch: WeightedBatch, V: Tensor) -> Graphs | None:
        """Where products of this state are recorded; None where that does not pay."""
        if not pays(V) or self.external or self._states.get(batch.index) is not state:
            return None
        held = self._graphs.get(batch.index)
        if held is None or held[0] is not state:
            held = self._graphs[batch.index] = (state, Graphs(V.device))
        return held[1]

    def _run(
        self, mode: Mode, precision: Precision, K: int, all_batches: Callable[[list[slice]], _Result]
    ) -> _Result:
        return self.within_memory(self._directions_of(mode, precision), K, all_batches)

    def within_memory(
        self, directions: Directions, K: int, all_batches: Callable[[list[slice]], _Result]
    ) -> _Result:
        """all_batches(pieces) of K directions; from its beginning again, with less, where memory runs out."""
        return directions.run(K, all_batches, self._release, self.objective.data.examples)

    def _release(self) -> bool:
        """Gives back what is held between products for speed: first the recorded products, then the states, which are
        not held again. Was there anything?"""
        recorded = sum(graphs.bytes for _, graphs in self._graphs.values())
        self._graphs = {}
        if recorded:
            return True
        held, self._keeps_states = self._keeps_states, False
        self._states, self._held = {}, 0
        return held

    def quadratic_form(self, mode: Mode, V: Tensor, at: Snapshot, precision: Precision = "full") -> Tensor:
        """<v, A v> for the rows of V (K, P): (K,) float64 on the CPU. No A v is formed."""
        examples = self.objective.examples

        def all_batches(pieces: list[slice]) -> Tensor:
            q = torch.zeros(V.shape[0], dtype=torch.float64, device="cpu")
            for batch, state in self._linearizations(at):
                for piece in pieces:
                    state.quadratic_form(V[piece], q[piece], mode, batch.examples, examples, precision)
            return q

        return self._run(mode, precision, V.shape[0], all_batches)

    def gradient(self, at: Snapshot) -> Tensor:
        """Gradient of the objective, (P,)."""
        layout = self.objective.layout

        def all_batches(pieces: list[slice]) -> Tensor:
            total = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
            for _, state in self._linearizations(at):
                state.gradient(total, True)
            return total

        return self._run("ggn", "full", 1, all_batches)

    def plan(self, mode: Mode, precision: Precision = "full") -> Plan:
        objective, itemsize = self.objective, self.objective.layout.dtype.itemsize
        counted = [(self._compiled[key], count) for key, count in Counter(self._keys).items()]
        most = self._directions_of(mode, precision).most

        def peak(K: int) -> int:
            return max(c.engine.peak_bytes(mode, min(K, most), itemsize, precision) for c, _ in counted)

        def flops(K: int) -> float:
            return sum(count * c.engine.flops(mode, K) for c, count in counted)

        rounded = sum(count * c.engine.rounded_flops(mode, 1) for c, count in counted)
        return Plan(
            operator=mode,
            backend="native",
            reason="",
            rows=plan_rows(counted, mode),
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
            if depends_on_values(error):
                raise CaptureError(
                    "the shape of a tensor depends on the values of another, which a program cannot follow"
                ) from error
            raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error
        if program.reduction == "sum":
            objective.refuse_sum()
        unknown = {op.kind for op in program.ops} - set(engine.op_kinds())
        if unknown:
            raise CaptureError("the engine has no rules for it", op=min(unknown))
        offsets = {i: objective.layout.slices[name].start for i, name in program.parameters.items()}
        layout = objective.layout
        room = objective.budget.directions // layout.dtype.itemsize
        return Compiled(program, engine_program(program, offsets, layout.size, layout.device, room))

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
            point = (snapshot, changes.versions(self._code_tensors))
            if point != self._point:
                self._states, self._graphs, self._held, self._point = {}, {}, 0, point
            states = self._states  # another thread may go on to other parameters meanwhile
        for batch in self.objective.batches():
            state = states.get(batch.index)
            if state is None:
                with plain_torch(self.objective.layout.device):
                    state, size = self._linearize(batch, snapshot)
                    checks.check_finite_loss(state.loss, batch.index)
                    fits = self._keeps_states and self._held + size <= self.objective.budget.states
                    if states is self._states and fits:
                        self._held += size if batch.index not in states else 0
                        states[batch.index] = state
            yield batch, state

    @functools.cached_property
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
        """Why the rows of the model's output are not the examples' own; empty if they are. Found at every point anew:
        what mixes them may be a tensor that changed, or a parameter that was zero before."""
        at, code = self.objective.last, changes.versions(self._code_tensors)
        if self._mixes is None or self._mixes[0]() is not at or self._mixes[1] != code:
            programs = [c.program for c in map(self._compiled.__getitem__, self._keys)]
            self._mixes = (weakref.ref(at), code, mixing(self.objective, programs, at))
        return self._mixes[2]

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

    def _directions_of(self, mode: Mode, precision: Precision) -> Directions:
        if (mode, precision) not in self._directions:
            itemsize = self.objective.layout.dtype.itemsize
            peaks = [
                partial(lambda program, K: program.peak_bytes(mode, K, itemsize, precision), c.engine)
                for c in self._compiled.values()
            ]
            limit, device = self.objective.budget.directions, self.objective.layout.device
            self._directions[mode, precision] = Directions(peaks, limit, device)
        return self._directions[mode, precision]


def key_of(batch: Batch) -> Hashable:
    """Batches of one key share a program. Raises CaptureError where that could mix up two batches."""
    structure = flatten_batch(batch)[1]
    for _, leaf in structure.others:
        if not isinstance(leaf, _PLAIN):
            raise CaptureError(
                f"a batch holds a {type(leaf).__name__}, which a program cannot read; pass it as a tensor"
            )
    return structure.key
