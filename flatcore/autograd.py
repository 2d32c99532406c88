"""Products through torch autograd, one direction at a time: for models that have no program. Right for any
model that torch can differentiate twice, and slow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, autograd
from torch.autograd.graph import saved_tensors_hooks

from flatcore import checks
from flatcore.capture.batch import flatten_batch
from flatcore.capture.cost import Cost
from flatcore.capture.external import refuse_dead_ends
from flatcore.capture.trial import gradient_sizes
from flatcore.data import Batch
from flatcore.errors import warn
from flatcore.evaluate import Evaluation, plain_torch, rows_mix
from flatcore.plan import Plan, PlanRow
from flatcore.precision import Precision

if TYPE_CHECKING:
    from flatcore.objective import Objective, Snapshot, WeightedBatch

Mode = Literal["hessian", "ggn", "covariance"]
Vectors = Sequence[Tensor]  # one tensor per parameter


class AutogradBackend:
    """Hessian, GGN and gradient covariance of an objective by repeated differentiation.

    by_example: each example's gradient from a batch of its own, whatever the shape of the model's output.
    """

    def __init__(self, objective: Objective, reason: str, by_example: bool = False) -> None:
        self.objective = objective
        self.reason = reason
        self._by_example = by_example
        self._symmetric = self._linear = False  # not checked yet
        self._rows_mix: bool | None = None  # not tried yet
        self._precision_told = False

    def product(self, mode: Mode, V: Tensor, Y: Tensor, at: Snapshot, precision: Precision = "full") -> None:
        """Y = A V for the rows of V and Y, both (K, P). In full precision; said once where another is asked for."""
        if precision != "full" and not self._precision_told:
            self._precision_told = True
            message = f"precision={precision!r}: products through torch autograd are in full precision"
            warn(message)
        objective = self.objective
        Y.zero_()
        with plain_torch(objective.layout.device):
            V = V.clone() if V.is_inference() else V
            for batch in objective.batches():
                evaluation, theta = self._evaluate(batch.batch, batch.index, at)
                checks.check_finite_loss(float(evaluation.loss.detach()), batch.index)
                if mode == "covariance" and self._one_by_one(evaluation, batch, at):
                    self._covariance_by_example(batch, evaluation, V, Y, at)
                    continue
                with _second_derivatives():
                    apply = self._map(mode, evaluation, theta, batch)
                    if mode == "hessian" and not self._symmetric:
                        self._check_symmetry(apply, theta)
                    for v, y in zip(V, Y, strict=True):
                        parts = apply(list(objective.layout.split(v).values()))
                        y.add_(torch.cat([part.reshape(-1) for part in parts]), alpha=batch.weight)

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
            kept_bytes=0,
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
            with _second_derivatives():
                apply = self._map(mode, evaluation, theta, batch)
                for v in V:
                    apply(list(layout.split(v).values()))

    def _evaluate(self, batch: Batch, index: int, at: Snapshot) -> tuple[Evaluation, list[Tensor]]:
        """The loss of a batch as a function of fresh leaves, and the leaves."""
        theta = {name: value.detach().requires_grad_() for name, value in at.values.items()}
        return checks.evaluate(self.objective.evaluate, batch, theta, index), list(theta.values())

    def _map(
        self, mode: Mode, evaluation: Evaluation, theta: list[Tensor], batch: WeightedBatch
    ) -> Callable[[Vectors], Vectors]:
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

    def _check_symmetry(self, apply: Callable[[Vectors], Vectors], theta: list[Tensor]) -> None:
        """Some second derivatives in torch are wrong (2.13: of weight_norm), which shows as a lack of symmetry."""
        generator = torch.Generator("cpu").manual_seed(0)
        u, v = (
            [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in theta] for _ in range(2)
        )
        Hu, Hv = apply(u), apply(v)
        a, b = _inner(u, Hv), _inner(v, Hu)
        scale = math.sqrt(_inner(Hu, Hu) * _inner(v, v)) + math.sqrt(_inner(Hv, Hv) * _inner(u, u))
        if abs(a - b) > _agreement(theta[0].dtype) * scale:
            raise ValueError(
                "model: torch's second derivative of the loss is not symmetric, so one of its operations "
                f"differentiates wrongly: <u, H v> = {a:.6g} and <v, H u> = {b:.6g} for random u and v"
            )
        self._symmetric = True

    def _one_by_one(self, evaluation: Evaluation, batch: WeightedBatch, at: Snapshot) -> bool:
        if self._by_example or not _rows_are_examples(evaluation, batch.examples):
            return True
        if self._rows_mix is None and batch.examples > 1:

            def rows(data: Batch) -> list[Tensor]:
                outputs = checks.evaluate(self.objective.evaluate, data, at.values, batch.index).outputs
                return [z for z, live in zip(outputs, evaluation.outputs, strict=True) if live.requires_grad]

            with torch.no_grad():
                self._rows_mix = rows_mix(rows, batch.batch, batch.examples)
        return bool(self._rows_mix)

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
        if not abs(total - of_all) <= _agreement(objective.layout.dtype) * max(abs(total), abs(of_all)):
            raise ValueError(
                "loss: the gradient covariance needs a loss that is the mean over the examples, got "
                f"{of_all:.6g} for batch {batch.index} and {total:.6g} as the mean "
                "over its examples one by one"
            )


def hessian_map(loss: Tensor, theta: list[Tensor]) -> Callable[[Vectors], Vectors]:
    """v -> H v by differentiating the gradient along v; the gradient's graph is kept."""
    gradient = autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
    return _transposed(gradient, theta)


class Outputs:
    """z(theta), the model's outputs, and L(z), with the products J v, J^T u and (d2L/dz2) t."""

    def __init__(self, evaluation: Evaluation, theta: list[Tensor]) -> None:
        self.theta = theta
        self.live = [i for i, z in enumerate(evaluation.outputs) if z.requires_grad]
        self.z = [evaluation.outputs[i] for i in self.live]
        # detached, so that the loss is differentiated with respect to the outputs alone
        leaves = [z.detach().clone().requires_grad_(i in self.live) for i, z in enumerate(evaluation.outputs)]
        self.z_leaves = [leaves[i] for i in self.live]
        self.dz = autograd.grad(
            evaluation.loss_of(tuple(leaves)), self.z_leaves, create_graph=True, materialize_grads=True
        )
        self._refuse_other_ways(evaluation)
        self.dummies = [torch.zeros_like(z, requires_grad=True) for z in self.z]
        # J^T u is linear in u, so its derivative in u along v is J v.
        pulled = autograd.grad(self.z, theta, self.dummies, create_graph=True, materialize_grads=True)
        self.push = _transposed(pulled, self.dummies)

    def pull(self, u: Vectors) -> Vectors:
        return autograd.grad(self.z, self.theta, u, retain_graph=True, materialize_grads=True)

    def check_transpose(self) -> None:
        """A torch.autograd.Function may have a backward that is no derivative: <u, J v> = <J^T u, v> shows it."""
        generator = torch.Generator("cpu").manual_seed(0)
        v, u = (
            [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in ts]
            for ts in (self.theta, self.z)
        )
        Jv = self.push(v)
        for size in gradient_sizes(self.theta[0].dtype):
            scaled = [size * x for x in u]
            Ju = self.pull(scaled)
            a, b = _inner(scaled, Jv), _inner(Ju, v)
            scale = math.sqrt(_inner(scaled, scaled) * _inner(Jv, Jv)) + math.sqrt(
                _inner(Ju, Ju) * _inner(v, v)
            )
            if math.isfinite(scale) and abs(a - b) > _agreement(self.theta[0].dtype) * scale:
                raise ValueError(
                    "model: expected a backward pass that is linear in the gradient it is given and can be "
                    f"differentiated, got <u, J v> = {a:.6g} and <J^T u, v> = {b:.6g} for random u and v, so there is "
                    "no Gauss-Newton matrix; look for a torch.autograd.Function that clips, normalises or detaches "
                    "the gradient"
                )

    def ggn_map(self) -> Callable[[Vectors], Vectors]:
        loss_hessian = _transposed(self.dz, self.z_leaves)
        return lambda v: self.pull(loss_hessian(self.push(v)))

    def covariance_map(self, examples: int, factor: float) -> Callable[[Vectors], Vectors]:
        """v -> factor * sum_n J_n^T dz_n <dz_n, J_n v>, the rows of z in `examples` equal groups."""
        rows = [dz.detach().reshape(examples, -1) for dz in self.dz]

        def apply(v: Vectors) -> Vectors:
            tangents = [t.reshape(examples, -1) for t in self.push(v)]
            inner = sum((r * t).sum(1, keepdim=True) for r, t in zip(rows, tangents, strict=True)) * factor
            return self.pull([(inner * r).view_as(z) for r, z in zip(rows, self.z, strict=True)])

        return apply

    def _refuse_other_ways(self, evaluation: Evaluation) -> None:
        whole = autograd.grad(evaluation.loss, self.theta, retain_graph=True, materialize_grads=True)
        through = self.pull([dz.detach() for dz in self.dz])
        difference = sum(float((a - b).norm()) for a, b in zip(whole, through, strict=True))
        if difference > _agreement(whole[0].dtype) * sum(float(a.norm()) for a in whole):
            raise ValueError(
                "loss: expected a loss that depends on the parameters through the model's output alone, "
                "got one that depends on them in another way too (a penalty, say), for which there is no "
                "Gauss-Newton matrix or gradient per example"
            )


def _transposed(values: Vectors, inputs: Vectors) -> Callable[[Vectors], Vectors]:
    """v -> derivative of <values, v> in the inputs; values that do not depend on the inputs give nothing."""
    live = [i for i, value in enumerate(values) if value.requires_grad]
    refuse_dead_ends([values[i] for i in live])

    def apply(v: Vectors) -> Vectors:
        if not live:
            return [torch.zeros_like(x) for x in inputs]
        return autograd.grad(
            [values[i] for i in live], inputs, [v[i] for i in live], retain_graph=True, materialize_grads=True
        )

    return apply


def _rows_are_examples(evaluation: Evaluation, examples: int) -> bool:
    live = [z for z in evaluation.outputs if z.requires_grad]
    return bool(live) and all(z.dim() > 0 and z.shape[0] % examples == 0 for z in live)


def _flat_gradient(loss: Tensor, theta: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in autograd.grad(loss, theta, materialize_grads=True)])


def _inner(a: Vectors, b: Vectors) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _agreement(dtype: torch.dtype) -> float:
    """Two ways to one number agree to the square root of the precision, if they are the same number at
    all."""
    return math.sqrt(torch.finfo(dtype).eps)


@contextlib.contextmanager
def _second_derivatives() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(
            f"model: expected a loss that torch can differentiate twice, got {first_line!r}; write the operation that "
            "it names in terms of others"
        ) from error
