"""Sweeps over the examples of an objective one by one, all at once: probes of each example's own, exact sums over the
outputs. For objectives that have programs and whose loss is a sum over examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flatcore import checks
from flatcore._C import engine
from flatcore.autograd import Mode
from flatcore.backend import native_backend
from flatcore.capture import ProbedProgram, probe
from flatcore.compiled import engine_program
from flatcore.directions import Directions
from flatcore.environment import full_precision
from flatcore.errors import NotSeparable
from flatcore.evaluate import plain_torch
from flatcore.example_outputs import Outputs
from flatcore.native import NativeBackend, key_of
from flatcore.objective import Objective, Snapshot, WeightedBatch

# "remainder": the Hessian without the Gauss-Newton matrix, second derivatives of the model alone.
SweepMode = Literal["hessian", "ggn", "remainder"]

# Outputs of an example up to which each gets a sweep of its own.
_MOST_OUTPUTS = 256


@dataclass(frozen=True)
class Samples:
    """Sums over all examples, in all and for each parameter: entry 0 is the total, entry 1 + i parameter i. On the CPU.

    mean: of K probes. variance: of that mean, from the spread of each example's K values. fourth: the sum of the
    squares of what variance adds up, which tells how many terms make it. diagonal and its variance: (P,) or None.
    """

    mean: Tensor
    variance: Tensor
    fourth: Tensor
    K: int
    diagonal: Tensor | None = None
    diagonal_variance: Tensor | None = None


@dataclass(frozen=True)
class _Compiled:
    program: ProbedProgram
    engine: engine.Program


class ExampleSweeps:
    """Traces and diagonals of an objective's curvature, example by example at once.

    Raises NotSeparable, with the reason, where the loss is not seen to be a sum over examples or has no program.

    probed: the parameters that each example's probes reach; left: those that need vectors shared by all examples.
    """

    def __init__(self, objective: Objective, native: NativeBackend) -> None:
        self._objective, self._native = objective, native
        offsets = {name: part.start for name, part in objective.layout.slices.items()}
        self._compiled: dict[Hashable, _Compiled] = {}
        room = objective.budget.directions // objective.layout.dtype.itemsize
        for key, compiled in native.programs().items():
            program = probe(compiled.program, offsets)
            device = objective.layout.device
            self._compiled[key] = _Compiled(program, engine_program(program, {}, 0, device, room))
        names = list(objective.layout.slices)
        left = {name for c in self._compiled.values() for name in c.program.left}
        self.probed = tuple(name for name in names if name not in left)
        self.left = tuple(name for name in names if name in left)
        self.reads_rows = any(len(c.program.cut) == 1 for c in self._compiled.values())
        self._kept: tuple[Snapshot, int, engine.Linearization] | None = None
        self._directions_of: dict[tuple[SweepMode, int], Directions] = {}

    def product_flops(self, mode: Mode) -> float:
        """Of a product with one vector."""
        counts, compiled = self._native.counts(), self._native.programs()
        return sum(count * compiled[key].engine.flops(mode, 1) for key, count in counts.items())

    @property
    def examples(self) -> int:
        return self._objective.examples

    @property
    def slices(self) -> dict[str, slice]:
        return self._objective.layout.slices

    @property
    def repeated(self) -> tuple[str, ...]:
        """Parameters with several uses in the program."""
        found = {
            compiled.program.probed[op.attrs["parameter"]]  # type: ignore[index]
            for compiled in self._compiled.values()
            for op in compiled.program.ops
            if op.attrs.get("repeated")
        }
        return tuple(name for name in self.probed if name in found)

    @property
    def has_remainder(self) -> bool:
        """Does the Hessian's trace differ from that of the Gauss-Newton matrix? Not in piecewise linear models."""
        return any(c.engine.has_remainder() for c in self._compiled.values())

    def flops(self, mode: SweepMode) -> float:
        """Floating-point operations of one probe, or with "ggn" of about two outputs, over all batches."""
        counts = self._native.counts()
        return sum(count * self._compiled[key].engine.flops(mode, 1) for key, count in counts.items())

    @property
    def outputs_are_apart(self) -> bool:
        """Does what comes back from an output tell the gradient of each parameter? Not where one has several uses."""
        programs = [c.program for c in self._compiled.values()]
        return not self.repeated and all(len(p.cut) == 1 and p.outputs_by_example for p in programs)

    @property
    def outputs(self) -> int:
        """Outputs of an example that an exact sum goes through; 0 where there is none."""
        if self.left or not self.outputs_are_apart:
            return 0
        programs = [c.program for c in self._compiled.values()]
        most = max(p.values[p.cut[0]].numel // p.examples for p in programs)
        return most if most <= _MOST_OUTPUTS else 0

    def probe(
        self,
        mode: SweepMode,
        at: Snapshot,
        seed: int,
        first: int,
        K: int,
        *,
        relative: bool = False,
        diagonal: bool = False,
    ) -> Samples:
        """K >= 2 probes, numbers first to first + K - 1, of every example. The same for a seed however the data are cut
        into batches.

        relative: probes W A with random signs A, for weights with one use alone, whose mean is
        sum_ss' <w_s, w_s'> tr H_ss' for the rows w_s of each weight (Petzka et al. 2021).
        """
        by_outputs = mode == "ggn" and self.outputs_are_apart and not (relative or diagonal)

        def all_batches(pieces: list[slice]) -> Samples:
            totals = self._zeros(3, 1 + len(self.probed))
            # The mean of the diagonal, and its variance.
            entries = list(self._zeros(2, self._objective.layout.size)) if diagonal else []
            for batch, first_example, state, compiled in self._states(at):
                sums = self._zeros(K, len(compiled.program.probed), batch.examples)
                outputs = (
                    Outputs(compiled.program, state, batch.examples, self._objective.layout)
                    if by_outputs
                    else None
                )
                for piece in pieces:
                    number, count = first + piece.start, piece.stop - piece.start
                    drawn = outputs.sampled(seed, number, count, first_example) if outputs else None
                    if outputs and drawn is not None:
                        state.output_pass(outputs.value, drawn, sums[piece])
                        continue
                    whole = len(pieces) == 1
                    part = entries if whole else [torch.zeros_like(entry) for entry in entries]
                    state.example_pass(mode, sums[piece], seed, number, first_example, relative, *part)
                    for power, (entry, of_piece) in enumerate(zip(entries, part, strict=True), 1):
                        if not whole:
                            entry.add_(of_piece, alpha=(count / K) ** power)
                values = self._by_name(sums, compiled)
                mean = values.mean(0)
                variance = (values - mean).square_().sum(0) / (K * (K - 1))
                totals[0] += mean.sum(1)
                totals[1] += variance.sum(1)
                totals[2] += variance.square().sum(1)
            mean, variance, fourth = totals.cpu()
            return Samples(mean, variance, fourth, K, *(entry.cpu() for entry in entries))

        return self._native.within_memory(self._directions(mode, 2 if diagonal else 1), K, all_batches)

    def exact_ggn(self, at: Snapshot, *, diagonal: bool = False) -> tuple[Tensor, Tensor | None]:
        """tr G as `Samples.mean` holds it, and diag G (P,), on the CPU: one sweep for each output of an example.

        With S_n = sum_j s_nj a_nj a_njᵀ the loss' second derivative in the outputs of example n, s_nj its signs,
        tr G is the sum of the s_nj |J_nᵀ a_nj|².
        """
        directions = self._directions("ggn")

        def all_batches(pieces: list[slice]) -> tuple[Tensor, Tensor | None]:
            totals = self._zeros(1 + len(self.probed))
            diag = self._zeros(self._objective.layout.size) if diagonal else None
            for batch, _, state, compiled in self._states(at):
                outputs = Outputs(compiled.program, state, batch.examples, self._objective.layout)
                for sign, cotangents in outputs.factors():
                    sums = self._zeros(len(cotangents), len(compiled.program.probed), batch.examples)
                    part = None if diag is None else torch.zeros_like(diag)
                    for piece in directions.pieces(len(cotangents)):
                        state.output_pass(outputs.value, cotangents[piece].contiguous(), sums[piece], part)
                    totals += sign * self._by_name(sums, compiled).sum((0, 2))
                    if diag is not None and part is not None:
                        diag += sign * part
            return totals.cpu(), None if diag is None else diag.cpu()

        return self._native.within_memory(directions, self.outputs, all_batches)

    def exact_covariance(self, at: Snapshot, *, diagonal: bool = False) -> tuple[Tensor, Tensor | None]:
        """The trace of (1/N) sum_n g_n g_nᵀ, not centred, and its diagonal, in the same form: one sweep."""
        N = self._objective.examples

        def all_batches(pieces: list[slice]) -> tuple[Tensor, Tensor | None]:
            totals = self._zeros(1 + len(self.probed))
            diag = self._zeros(self._objective.layout.size) if diagonal else None
            for batch, _, state, compiled in self._states(at):
                cut = compiled.program.cut[0]
                adjoint = state.adjoint(cut).unsqueeze(0).contiguous()
                sums = self._zeros(1, len(compiled.program.probed), batch.examples)
                state.output_pass(cut, adjoint, sums, diag)
                totals += self._by_name(sums, compiled).sum((0, 2))
            return totals.cpu() * N, None if diag is None else diag.cpu() * N

        return self._native.within_memory(self._directions("ggn"), 1, all_batches)

    def release(self) -> None:
        """Gives back what is held between two sweeps."""
        self._kept = None

    def _by_name(self, sums: Tensor, compiled: _Compiled) -> Tensor:
        """(K, 1 + probed, examples): the total first."""
        if compiled.program.probed != self.probed:
            places = [compiled.program.probed.index(name) for name in self.probed]
            sums = sums[:, places]
        return torch.cat([sums.sum(1, keepdim=True), sums], 1)

    def _of(self, batch: WeightedBatch) -> _Compiled:
        return self._compiled[key_of(batch.batch)]

    def _states(self, at: Snapshot) -> Iterator[tuple[WeightedBatch, int, engine.Linearization, _Compiled]]:
        """Each batch with the number of its first example and its state, which goes with the next one's."""
        examples = self._objective.data.examples
        for batch in self._objective.batches():
            compiled = self._of(batch)
            if self._kept is not None and self._kept[:2] == (at, batch.index):
                state = self._kept[2]
            else:
                self._kept = None
                with plain_torch(self._objective.layout.device):
                    state = self._linearize(batch, compiled, at)
                self._kept = (at, batch.index, state)
            with full_precision():
                yield batch, sum(examples[: batch.index]), state, compiled

    def _linearize(self, batch: WeightedBatch, compiled: _Compiled, at: Snapshot) -> engine.Linearization:
        constants, parameters = self._native.leaves(batch, at)
        program = compiled.program
        if op := program.crosses(constants):
            raise NotSeparable(f"'{op.aten or op.kind}' in module '{op.path}' mixes the examples of a batch")
        leaves = constants | parameters | program.element_constants(constants)
        state = engine.Linearization(compiled.engine, leaves, batch.weight)
        checks.check_finite_loss(state.loss, batch.index)
        return state

    def _zeros(self, *shape: int) -> Tensor:
        """Sums are kept in double."""
        return torch.zeros(shape, dtype=torch.float64, device=self._objective.layout.device)

    def _directions(self, mode: SweepMode, least: int = 1) -> Directions:
        if (mode, least) not in self._directions_of:
            peaks = [partial(self._peak, compiled, mode) for compiled in self._compiled.values()]
            limit, device = self._objective.budget.directions, self._objective.layout.device
            self._directions_of[mode, least] = Directions(
                peaks, limit, device, "a sweep over the examples", least
            )
        return self._directions_of[mode, least]

    def _peak(self, compiled: _Compiled, mode: SweepMode, K: int) -> int:
        """Bytes of a sweep's buffers, what the probes put in among them."""
        itemsize = self._objective.layout.dtype.itemsize
        values, ops = compiled.program.values, compiled.program.ops
        held = sum(values[op.output].numel for op in ops if op.kind.startswith("probe_"))
        return compiled.engine.peak_bytes(mode, K, itemsize) + K * held * itemsize


def sweeps_for(objective: Objective, at: Snapshot) -> ExampleSweeps | str:
    """The sweeps of an objective, made at first use; a sentence that says why there are none. `at`: its snapshot."""
    native = native_backend(objective)
    if isinstance(native, str):
        return native
    if not isinstance(native.sweeps, ExampleSweeps | str):
        try:
            native.sweeps = ExampleSweeps(objective, native)
        except NotSeparable as error:
            native.sweeps = str(error)
    if isinstance(native.sweeps, ExampleSweeps) and native.sweeps.reads_rows and (reason := native.mixing()):
        return reason
    return native.sweeps


class OperatorSweeps:
    """The sweeps for one operator at one point, as `flatcore.by_example.Sweeps` wants them."""

    def __init__(
        self,
        sweeps: ExampleSweeps,
        kind: Mode,
        at: Snapshot,
        diagonal: bool,
    ) -> None:
        self._sweeps, self._kind, self._at, self._diagonal = sweeps, kind, at, diagonal
        self.mean_gradient: Callable[[], Tensor] | None = None  # what a covariance is centred by
        covariance = kind == "covariance"
        self.probed, self.examples = sweeps.probed, sweeps.examples
        # Of a parameter with several uses the diagonal is not got use by use.
        self.left = tuple(
            {**dict.fromkeys(sweeps.left), **dict.fromkeys(sweeps.repeated if diagonal else ())}
        )
        self.outputs = (1 if sweeps.outputs else 0) if covariance else sweeps.outputs
        self.exact = bool(self.outputs) and (kind != "hessian" or not sweeps.has_remainder)
        self.product_work = sweeps.product_flops(kind)
        self.probe_work = math.inf if covariance else sweeps.flops("hessian" if kind == "hessian" else "ggn")
        self.remainder_work = sweeps.flops("remainder")
        self.output_work = sweeps.flops("ggn") / 2

    def probe(self, remainder: bool, seed: int, first: int, K: int) -> Samples:
        mode: SweepMode = "remainder" if remainder else "hessian" if self._kind == "hessian" else "ggn"
        return self._sweeps.probe(mode, self._at, seed, first, K, diagonal=self._diagonal)

    def from_outputs(self) -> tuple[Tensor, Tensor | None]:
        if self._kind == "covariance":
            totals, diagonal = self._sweeps.exact_covariance(self._at, diagonal=self._diagonal)
            if self.mean_gradient is not None:
                square = self.mean_gradient().cpu().double().square()
                slices = self._sweeps.slices
                totals -= torch.stack([square.sum(), *(square[slices[name]].sum() for name in self.probed)])
                diagonal = None if diagonal is None else diagonal - square
            return totals, diagonal
        return self._sweeps.exact_ggn(self._at, diagonal=self._diagonal)

    def release(self) -> None:
        self._sweeps.release()
