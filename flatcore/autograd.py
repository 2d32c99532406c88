"""Products through torch autograd, one direction at a time: for models that have no program. Slower than a program;
from the second product at a point on the gradient's graph is kept, as far as memory goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, autograd
from torch.autograd.graph import saved_tensors_hooks

from flatcore import checks
from flatcore.autograd_maps import Map, Outputs, agreement, hessian_map, inner, second_derivatives
from flatcore.capture.batch import flatten_batch
from flatcore.capture.cost import Cost
from flatcore.data import Batch
from flatcore.errors import warn
from flatcore.evaluate import Evaluation, plain_torch, rows_mix
from flatcore.kept_maps import KeptMaps
from flatcore.plan import Plan, PlanRow
from flatcore.precision import Precision

if TYPE_CHECKING:
    from flatcore.objective import Objective, Snapshot, WeightedBatch

Mode = Literal["hessian", "ggn", "covariance"]


class AutogradBackend:
    """Hessian, GGN and gradient covariance of an objective by repeated differentiation.

    kept: what all backends of an objective keep, in one budget.
    by_example: each example's gradient from a batch of its own, whatever the shape of the model's output.
    """

    def __init__(self, objective: Objective, reason: str, kept: KeptMaps, by_example: bool = False) -> None:
        self.objective = objective
        self.reason = reason
        self._by_example = by_example
        self._symmetric = self._linear = False  # not checked yet
        # The point at which it was tried, and what was found, by batch.
        self._rows_mix: tuple[Snapshot, dict[int, bool]] | None = None
        self._precision_told = False
        self._kept = kept
        self._sizes: dict[tuple[Mode, tuple[torch.Size, ...]], float] = {}

    def product(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, precision: Precision = "full") -> None:
        """Y = A V for the rows of V and Y, both (K, P). In full precision; said once where another is asked for."""
        if precision != "full" and not self._precision_told:
            self._precision_told = True
            message = f"precision={precision!r}: products through torch autograd are in full precision"
            warn(message)
        with plain_torch(self.objective.layout.device):
            V = V.clone() if V.is_inference() else V
            if not self._with_kept_maps(mode, V, Y, at):
                self._all_batches(mode, V, Y, at, again=False)

    def _with_kept_maps(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot) -> bool:
        """False where that has to be done again, without: memory is out, or a tensor that the code holds was written
        into, which torch had kept for later. What was kept is then free."""
        try:
            self._all_batches(mode, V, Y, at, self._kept.begin(at, mode))
        except (RuntimeError, ValueError) as error:
            out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not out and "modified by an inplace operation" not in str(error):
                raise
            if not self._kept.forget(for_good=out):
                raise
            return False
        return True

    def _all_batches(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, again: bool) -> None:
        """again: there was a product of this kind at this point, so more are to be expected."""
        layout = self.objective.layout
        Y.zero_()
        for batch in self.objective.batches():
            apply = self._kept.find(at, mode, batch.index)
            if apply is None:
                # Measured first: another evaluation may write into what the map holds.
                size = self._bytes(mode, batch) if again and not self._by_example else math.inf
                apply = self._map_of(mode, batch, V, Y, at)
                if apply is None:
                    continue
                self._kept.keep(at, mode, batch.index, apply, size)
            with second_derivatives():
                for v, y in zip(V, Y, strict=True):
                    parts = apply(list(layout.split(v).values()))
                    y.add_(torch.cat([part.reshape(-1) for part in parts]), alpha=batch.weight)

    def _map_of(self, mode: Mode, batch: WeightedBatch, V: Tensor, Y: Tensor, at: Snapshot) -> Map | None:
        """None for a covariance that has no map of the whole batch: its product is then in Y."""
        evaluation, theta = self._evaluate(batch.batch, batch.index, at)
        checks.check_finite_loss(float(evaluation.loss.detach()), batch.index)
        if mode == "covariance" and self._one_by_one(evaluation, batch, at):
            self._covariance_by_example(batch, evaluation, V, Y, at)
            return None
        with second_derivatives():
            apply = self._map(mode, evaluation, theta, batch)
            if mode == "hessian" and not self._symmetric:
                self._check_symmetry(apply, theta)
        return apply

    def _bytes(self, mode: Mode, batch: WeightedBatch) -> float:
        """What a batch's map holds, by the first batch of its shapes; infinite where that is not known, or where it
        holds memory of the model's code, which may be written into when the model runs again."""
        key = mode, tuple(t.shape for t in flatten_batch(batch.batch)[0])
        if key not in self._sizes:
            cost = Cost()
            try:
                with saved_tensors_hooks(cost.note, lambda t: t):
                    self._run(mode, batch, 0, cost)
            # The model may not allow hooks, say; if something else is wrong, the products tell.
            except Exception:
                return math.inf
            own = (*self.objective.snapshot().values.values(), *self.objective.model.parameters())
            foreign = cost.older - {t.untyped_storage().data_ptr() for t in own}
            self._sizes[key] = math.inf if foreign else cost.saved
        return self._sizes[key]

    def quadratic_form(self, mode: Mode, V: Tensor, at: Snapshot, precision: Precision = "full") -> Tensor:
        """<v, A v> for the rows of V (K, P), from the products: (K,) float64 on the CPU."""
        Y = torch.empty_like(V, memory_format=torch.contiguous_format)
        self.product(mode, V, Y, at, precision)
        return (V * Y).sum(dim=1, dtype=torch.float64).cpu()

    def gradient(self, at: Snapshot) -> Tensor:
        """Gradient of the objective, (P,)."""
        objective = self.objective
        with plain_torch(objective.layout.device):
            total = torch.zeros(
                objective.layout.size, dtype=objective.layout.dtype, device=objective.layout.device
            )
            for batch in objective.batches():
                evaluation, theta = self._evaluate(batch.batch, batch.index, at)
                total.add_(_flat_gradient(evaluation.loss, theta), alpha=batch.weight)
        return total

    def plan(self, mode: Mode, precision: Precision = "full") -> Plan:
        """Measured on the first batch: arithmetic by torch's counter, memory as what autograd saves."""
        objective = self.objective
        first = next(iter(objective.batches()))
        base, held = self._measure(mode, first, 0)
        one, _ = self._measure(mode, first, 1)
        batches = objective.examples / first.examples
        return Plan(
            operator=mode,
            backend="autograd",
            reason=self.reason,
            rows=(PlanRow("model and loss", "", False, (one - base) * batches),),
            parameters=objective.layout.size,
            batches=len(objective.data),
            examples=objective.examples,
            state_bytes=held,
            kept_bytes=objective.budget.states,
            directions=1,
            _peak=lambda K: held,
            _flops=lambda K: (base + K * (one - base)) * batches,
        )

    def _measure(self, mode: Mode, batch: WeightedBatch, directions: int) -> tuple[float, int]:
        """Floating-point operations of a product with so many directions, and bytes saved for backward."""
        cost = Cost()
        try:
            with saved_tensors_hooks(cost.note, lambda t: t):
                self._run(mode, batch, directions, cost)
        except ValueError as error:
            if "saved tensor hooks" not in str(error):  # torch.func inside the model refuses them
                raise
            cost = Cost()
            self._run(mode, batch, directions, cost)
            return cost.flops, cost.made
        return cost.flops, cost.saved

    def _run(self, mode: Mode, batch: WeightedBatch, directions: int, cost: Cost) -> None:
        """One product, counted."""
        layout, at = self.objective.layout, self.objective.snapshot()
        V = torch.ones((directions, layout.size), dtype=layout.dtype, device=layout.device)
        with plain_torch(layout.device), cost:
            evaluation, theta = self._evaluate(batch.batch, batch.index, at)
            if mode == "covariance" and self._one_by_one(evaluation, batch, at):
                self._covariance_by_example(batch, evaluation, V, torch.zeros_like(V), at)
                return
            with second_derivatives():
                apply = self._map(mode, evaluation, theta, batch)
                for v in V:
                    apply(list(layout.split(v).values()))

    def _evaluate(self, batch: Batch, index: int, at: Snapshot) -> tuple[Evaluation, list[Tensor]]:
        """The loss of a batch as a function of fresh leaves, and the leaves."""
        theta = {name: value.detach().requires_grad_() for name, value in at.values.items()}
        return checks.evaluate(self.objective.evaluate, batch, theta, index), list(theta.values())

    def _map(self, mode: Mode, evaluation: Evaluation, theta: list[Tensor], batch: WeightedBatch) -> Map:
        if mode == "hessian":
            return hessian_map(evaluation.loss, theta)
        if not any(z.requires_grad for z in evaluation.outputs):
            raise ValueError(
                "loss: the Gauss-Newton matrix needs to know where the model ends and the loss begins, got "
                "a ModelLoss whose value is not the direct result of one function of torch.nn.functional; "
                "pass loss(output, target)"
            )
        outputs = Outputs(evaluation, theta)
        if not self._linear:
            outputs.check_transpose()
            self._linear = True
        if mode == "ggn":
            return outputs.ggn_map()
        return outputs.covariance_map(batch.examples, self.objective.examples * batch.weight)

    def _check_symmetry(self, apply: Map, theta: list[Tensor]) -> None:
        """Some second derivatives in torch are wrong (2.13: of weight_norm), which shows as a lack of symmetry."""
        generator = torch.Generator("cpu").manual_seed(0)
        u, v = (
            [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in theta] for _ in range(2)
        )
        Hu, Hv = apply(u), apply(v)
        a, b = inner(u, Hv), inner(v, Hu)
        scale = math.sqrt(inner(Hu, Hu) * inner(v, v)) + math.sqrt(inner(Hv, Hv) * inner(u, u))
        if abs(a - b) > agreement(theta[0].dtype) * scale:
            raise ValueError(
                "model: torch's second derivative of the loss is not symmetric, so one of its operations "
                f"differentiates wrongly: <u, H v> = {a:.6g} and <v, H u> = {b:.6g} for random u and v"
            )
        self._symmetric = True

    def _one_by_one(self, evaluation: Evaluation, batch: WeightedBatch, at: Snapshot) -> bool:
        if self._by_example or not _rows_are_examples(evaluation, batch.examples):
            return True
        if batch.examples == 1:
            return False
        if self._rows_mix is None or self._rows_mix[0] is not at:
            self._rows_mix = at, {}
        found = self._rows_mix[1]
        if batch.index not in found:

            def rows(data: Batch) -> list[Tensor]:
                outputs = checks.evaluate(self.objective.evaluate, data, at.values, batch.index).outputs
                return [z for z, live in zip(outputs, evaluation.outputs, strict=True) if live.requires_grad]

            with torch.no_grad():
                found[batch.index] = rows_mix(rows, batch.batch, batch.examples)
        return found[batch.index]

    def _covariance_by_example(
        self, batch: WeightedBatch, whole: Evaluation, V: Tensor, Y: Tensor, at: Snapshot
    ) -> None:
        """Each example as a batch of its own: for losses whose model part is not known."""
        objective = self.objective
        call = whole.call
        divisor = call.normaliser if call and call.normaliser else float(batch.examples)
        tensors, structure = flatten_batch(batch.batch)
        total = 0.0
        for n in range(batch.examples):
            alone = structure.rebuild(
                [t[n : n + 1] if t.dim() and t.shape[0] == batch.examples else t for t in tensors]
            )
            result, theta = self._evaluate(alone, batch.index, at)
            count = result.call.normaliser if result.call and result.call.normaliser is not None else 1.0
            if not count:
                continue
            total += count / divisor * float(result.loss.detach())
            g = _flat_gradient(result.loss, theta) * (objective.examples * batch.weight * count / divisor)
            Y.addr_(V @ g, g, alpha=1 / objective.examples)
        of_all = float(whole.loss.detach())
        # An example alone may have no loss at all: one with a standard deviation over the batch is then not a number.
        if not abs(total - of_all) <= agreement(objective.layout.dtype) * max(abs(total), abs(of_all)):
            raise ValueError(
                "loss: the gradient covariance needs a loss that is the mean over the examples, got "
                f"{of_all:.6g} for batch {batch.index} and {total:.6g} as the mean "
                "over its examples one by one"
            )


def _rows_are_examples(evaluation: Evaluation, examples: int) -> bool:
    live = [z for z in evaluation.outputs if z.requires_grad]
    return bool(live) and all(z.dim() > 0 and z.shape[0] % examples == 0 for z in live)


def _flat_gradient(loss: Tensor, theta: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in autograd.grad(loss, theta, materialize_grads=True)])
