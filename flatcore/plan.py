"""What a product runs: op by op, natively or through autograd, with its memory and arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flatcore.memory import readable


@dataclass(frozen=True)
class PlanRow:
    """One op, or several of one kind in one module. `flops` is for one direction over all batches."""

    kind: str
    path: str
    native: bool
    flops: float


@dataclass(frozen=True)
class Plan:
    """How an operator computes its products. Printing it shows the table.

    operator, backend: what is computed, and by what: "native" or "autograd".
    reason:        why not natively; empty if native.
    rows:          the ops in order; one that runs through autograd has the name torch gives it.
    parameters, batches, examples: sizes of the problem.
    state_bytes:   activations and adjoints of all batches; kept between products as far as `kept_bytes` goes.
    directions:    the most directions that go through at once.
    precision:     "full", "tf32", or "bf16" where large matrix products take operands rounded to bfloat16;
    bf16_fraction: their share of a product's floating-point operations.
    """

    operator: str
    backend: str
    reason: str
    rows: tuple[PlanRow, ...]
    parameters: int
    batches: int
    examples: int
    state_bytes: int
    kept_bytes: int
    directions: int
    _peak: Callable[[int], int] = field(repr=False, compare=False)
    _flops: Callable[[int], float] = field(repr=False, compare=False)
    precision: str = "full"
    bf16_fraction: float = 0.0

    @property
    def native_fraction(self) -> float:
        """Share of a product's floating-point operations that run natively, in [0, 1]."""
        total = sum(row.flops for row in self.rows)
        return (
            sum(row.flops for row in self.rows if row.native) / total
            if total
            else float(self.backend == "native")
        )

    def peak_bytes(self, K: int) -> int:
        """The most bytes that the buffers of one product with K directions occupy, V and the result not
        counted."""
        return self._peak(K)

    def flops(self, K: int) -> float:
        """Floating-point operations of one product with K directions, activations and adjoints being
        known."""
        return self._flops(K)

    def __str__(self) -> str:
        head = (
            f"{self.operator}: P = {self.parameters:,}, {self.examples:,} examples in {self.batches} "
            f"{'batch' if self.batches == 1 else 'batches'}; {100 * self.native_fraction:.0f} % native"
            + (f", {100 * self.bf16_fraction:.0f} % in bf16" if self.precision == "bf16" else "")
        )
        operations = dict.fromkeys(f"{row.kind} in '{row.path}'" for row in self.rows if not row.native)
        through = self.reason or (", ".join(operations) if self.backend == "native" else "")
        why = [f"through autograd: {through}"] if through else []
        width = max([len(row.kind) for row in self.rows] + [4])
        path_width = max([len(row.path) for row in self.rows] + [6])
        total = sum(row.flops for row in self.rows) or 1.0
        table = [f"  {'op':{width}}  {'module':{path_width}}  {'runs':8}  {'flops':>9}  share"] + [
            f"  {row.kind:{width}}  {row.path:{path_width}}  {'native' if row.native else 'autograd':8}  "
            f"{row.flops:9.2e}  {100 * row.flops / total:4.0f} %"
            for row in self.rows
        ]
        foot = [
            f"  one direction: {self.flops(1):.3g} flops, {readable(self.peak_bytes(1))} of buffers",
            f"  activations: {readable(self.state_bytes)}, kept between products up to {readable(self.kept_bytes)}",
            f"  directions at once: {self.directions}",
        ]
        return "\n".join([head, *why, *table, *foot])
