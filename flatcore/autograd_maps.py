"""The linear maps that products are made of, by repeated differentiation in torch: right for any model that torch can
differentiate twice."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, autograd

from flatcore.capture.external import refuse_dead_ends
from flatcore.capture.trial import gradient_sizes
from flatcore.errors import told_as
from flatcore.evaluate import Evaluation

Vectors = Sequence[Tensor]  # one tensor per parameter
Map = Callable[[Vectors], Vectors]


def hessian_map(loss: Tensor, theta: list[Tensor]) -> Map:
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
            a, b = inner(scaled, Jv), inner(Ju, v)
            scale = math.sqrt(inner(scaled, scaled) * inner(Jv, Jv)) + math.sqrt(inner(Ju, Ju) * inner(v, v))
            if math.isfinite(scale) and abs(a - b) > agreement(self.theta[0].dtype) * scale:
                raise ValueError(
                    "model: expected a backward pass that is linear in the gradient it is given and can be "
                    f"differentiated, got <u, J v> = {a:.6g} and <J^T u, v> = {b:.6g} for random u and v, so there is "
                    "no Gauss-Newton matrix; look for a torch.autograd.Function that clips, normalises or detaches "
                    "the gradient"
                )

    def ggn_map(self) -> Map:
        loss_hessian = _transposed(self.dz, self.z_leaves)
        return lambda v: self.pull(loss_hessian(self.push(v)))

    def covariance_map(self, examples: int, factor: float) -> Map:
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
        if difference > agreement(whole[0].dtype) * sum(float(a.norm()) for a in whole):
            raise ValueError(
                "loss: expected a loss that depends on the parameters through the model's output alone, "
                "got one that depends on them in another way too (a penalty, say), for which there is no "
                "Gauss-Newton matrix or gradient per example"
            )


def _transposed(values: Vectors, inputs: Vectors) -> Map:
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


def inner(a: Vectors, b: Vectors) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def agreement(dtype: torch.dtype) -> float:
    """Two ways to one number agree to the square root of the precision, if they are the same number at
    all."""
    return math.sqrt(torch.finfo(dtype).eps)


def second_derivatives() -> contextlib.AbstractContextManager[None]:
    """For what torch is asked to differentiate twice."""
    return told_as(
        lambda said: ValueError(
            f"model: expected a loss that torch can differentiate twice, got {said!r}; write the operation that it "
            "names in terms of others"
        )
    )
