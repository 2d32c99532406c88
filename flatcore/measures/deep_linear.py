"""Deep linear networks: the curvature of a squared error from small matrices, and the least it can be.

With A_i the map from the output of layer i to the network's, B_i from the network's input to that of layer i, and
T the whole map, an example x has J delta = sum_i A_i delta_i B_i x, so that for (c/2n) sum_j |f(x_j) - y_j|²

    nonzero spectrum of the Gauss-Newton matrix = that of c K,
    K = sum_i A_i A_iᵀ (x) S B_iᵀ B_i S,    S² = (1/n) sum_j x_j x_jᵀ,

of outputs * inputs rows. At a global minimum of the regression the residual is orthogonal to the inputs, the
second derivatives of f drop out, and this is the Hessian's. Biases: x has a further entry 1, and B_i a further row
for a bias that is a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.capture.batch import split_batch
from flatcore.environment import exclusive
from flatcore.evaluate import ModelLoss, plain_torch
from flatcore.measures.layers import Layer
from flatcore.objective import Objective

__all__ = ["LinearNet", "NotLinearError", "least_eigenvalue", "read_linear_net"]


class NotLinearError(Exception):
    """Why the closed forms do not hold, in one clause."""


@dataclass(frozen=True)
class LinearNet:
    """paths: layers in the order they run. outputs: A_i, (outputs, d_i). inputs: B_i, (m_i, D), a last row for a bias
    that is a parameter. whole: T, (outputs, D). moment: (D, D). factor: c. widths: d_i of all layers but the last.
    affine: whether the last of the D entries of x is the constant 1. chain: whether A_i B_(i+1) = T throughout.
    best: the regression's solution, (outputs, D). power: the loss of f = 0."""

    paths: list[str]
    outputs: list[Tensor]
    inputs: list[Tensor]
    whole: Tensor
    moment: Tensor
    factor: float
    widths: list[int]
    affine: bool
    chain: bool
    best: Tensor
    power: float

    def root(self) -> Tensor:
        """S."""
        return _root(self.moment)

    def kronecker_factors(self) -> list[tuple[Tensor, Tensor]]:
        """c A_i A_iᵀ and S B_iᵀ B_i S of each layer."""
        root = self.root()
        return [
            (self.factor * A @ A.T, root @ B.T @ B @ root)
            for A, B in zip(self.outputs, self.inputs, strict=True)
        ]

    def excess_loss(self) -> float:
        """Loss above that of the best linear map."""
        away = self.whole - self.best
        return self.factor / 2 * float((away @ self.moment * away).sum())

    def bottleneck(self) -> int | None:
        """The narrowest width, if the best map needs more."""
        narrowest = min(self.widths, default=None)
        if narrowest is not None and narrowest < int(
            torch.linalg.matrix_rank(self.best @ self.root(), rtol=1e-6)
        ):
            return narrowest
        return None


def least_eigenvalue(net: LinearNet) -> float:
    """A lower bound on lambda_max over all deep linear nets of M layers with the same whole map, tight for white
    inputs.

    From Y = u vᵀ in <Y, K Y>, the inequality of the means over the layers and |A_iᵀ u| |B_(i+1) z| >= uᵀ T z:

        lambda_max >= c M max_|v|=1 (vᵀ S² v |T S v|^(2 (M - 1)))^(1/M)            = c M sigma_1^(2 - 2/M) for S = I,

    where with biases S² is the inputs' centred covariance. The maximum over v is a minimum over one number a > 0 of
    the largest eigenvalue of a S² + (M - 1) a^(-1/(M - 1)) S Tᵀ T S, convex in log a, since the pairs of
    quadratic forms of two symmetric matrices have a convex upper boundary (Brickman, Proc. AMS 12 (1961) 61-66).
    """
    moment, whole = net.moment, net.whole
    if net.affine:
        mean = moment[:-1, -1]
        moment, whole = moment[:-1, :-1] - torch.outer(mean, mean), whole[:, :-1]
    values, root = torch.linalg.eigvalsh(moment), _root(moment)
    M = len(net.outputs)
    if M == 1:
        return net.factor * float(values[-1].clamp_min(0))
    gain = root @ whole.T @ whole @ root

    def largest(log_a: float) -> float:
        a = torch.tensor(log_a, dtype=torch.float64).exp()
        return float(torch.linalg.eigvalsh(a * moment + (M - 1) * a ** (-1 / (M - 1)) * gain)[-1])

    top = torch.linalg.eigvalsh(gain)[-1]
    if top <= 0 or values[-1] <= 0:
        return 0.0
    # The best a is (|T S v|² / vᵀ S² v)^((M - 1) / M): within e^50 of this for any condition float64 can resolve.
    middle = (M - 1) / M * float(torch.log(top / values[-1]))
    return net.factor * largest(_golden(largest, middle - 50.0, middle + 50.0))


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
    return root


def _golden(function: Any, low: float, high: float) -> float:
    """The place of the minimum of a convex function, by golden section."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = function(a), function(b)
    for _ in range(60):  # 100 * ratio^60 = 3e-11
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = function(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = function(b)
    return (low + high) / 2


@exclusive
def read_linear_net(objective: Objective, layers: Sequence[Layer]) -> LinearNet:
    """The matrices of a net whose outputs are an affine function of its inputs, at float64.

    Raises NotLinearError where it is none, where other parameters than its layers' weights and biases are selected,
    or where the loss is no multiple of the squared error.
    """
    _check_parameters(objective, layers)
    inputs, residuals, examples, factor = _regression(objective)
    try:
        twin = copy.deepcopy(objective.model).double()
    except Exception as error:
        raise NotLinearError(f"the model cannot be copied ({type(error).__name__})") from error
    twin.requires_grad_(True)
    shape, d = inputs[0].shape[1:], inputs[0][0].numel()
    device = inputs[0].device
    basis = torch.cat([torch.eye(d, device=device), torch.zeros(1, d, device=device)]).double()
    order, seen, results = _run(twin, layers, basis.reshape(d + 1, *shape))
    if results.dim() != 2:
        raise NotLinearError(f"its outputs have {results.dim()} axes, not examples by outputs")
    K = results.shape[1]
    _, leaves, out = _run(
        twin, layers, torch.zeros(K, *shape, dtype=torch.float64, device=device), leaves=True
    )
    gradients = torch.autograd.grad(
        out, leaves, torch.eye(K, dtype=torch.float64, device=device), allow_unused=True
    )
    if any(g is None for g in gradients):
        raise NotLinearError("a layer does not reach the output")
    by_path = {layer.path: layer for layer in layers}
    whole, maps = _as_map(results), [_as_map(rows) for rows in seen]
    rounding = 1e3 * torch.finfo(torch.float64).eps * max(1.0, float(whole.norm()))
    affine = any(by_path[p].module.bias is not None for p in order) or bool(whole[:, -1].norm() > rounding)
    moment, cross, power = _moments(twin, inputs, residuals, examples, whole, affine)
    A = [g for g in gradients if g is not None]
    chain = all(
        a.shape[1] == len(b) and bool((a @ b[:, :d] - whole[:, :d]).norm() <= rounding)
        for a, b in zip(A[:-1], maps[1:], strict=True)
    )
    constant = torch.zeros(1, d + 1, dtype=torch.float64, device=device)
    constant[0, -1] = 1
    maps = [torch.cat([B, constant]) if by_path[p].bias else B for p, B in zip(order, maps, strict=True)]
    if not affine:
        whole, maps = whole[:, :-1], [B[:, :-1] for B in maps]
    return LinearNet(
        paths=order,
        outputs=A,
        inputs=maps,
        whole=whole,
        moment=moment,
        factor=factor,
        widths=[a.shape[1] for a in A[:-1]],
        affine=affine,
        chain=chain,
        best=cross @ torch.linalg.pinv(moment, hermitian=True),
        power=factor / 2 * power,
    )


def _as_map(rows: Tensor) -> Tensor:
    """The matrix of an affine function, from its values at the unit vectors and at zero."""
    return torch.cat([rows[:-1] - rows[-1], rows[-1:]]).detach().T


def _check_parameters(objective: Objective, layers: Sequence[Layer]) -> None:
    names = {layer.weight for layer in layers} | {layer.bias for layer in layers if layer.bias}
    others = [name for name in objective.layout.shapes if name not in names]
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise NotLinearError(f"{layer.path!r} is a {type(layer.module).__name__}, not a Linear")
        if layer.uses > 1:
            raise NotLinearError(f"the weight of {layer.path!r} is used {layer.uses} times")
    if others:
        raise NotLinearError(f"{others[0]!r} is a parameter of no linear layer")
    selected = {layer.path for layer in layers}
    for path, module in objective.model.named_modules():
        if isinstance(module, nn.Linear) and path not in selected:
            raise NotLinearError(f"the weight of {path!r} is not among the selected parameters")


def _regression(objective: Objective) -> tuple[list[Tensor], list[Tensor], list[int], float]:
    """Of each batch the inputs, residuals f - y and examples; and c with L = (c/2n) sum |f - y|².

    c is read off the second derivative of the loss by the outputs, which must be the same multiple of the identity in
    every batch and place.
    """
    if isinstance(objective.loss_function, ModelLoss):
        raise NotLinearError("inputs of a ModelLoss are not known")
    inputs, residuals, examples, factors = [], [], [], []
    values = objective.snapshot().values
    loose = 1e-10 if objective.layout.dtype == torch.float64 else 1e-4
    with plain_torch(objective.layout.device):
        for batch in objective.batches():
            args, kwargs, _ = split_batch(batch.batch)
            if len(args) != 1 or kwargs or not torch.is_tensor(args[0]) or not args[0].is_floating_point():
                raise NotLinearError("the model takes something else than one floating tensor")
            evaluation = objective.evaluate(batch.batch, values)
            if len(evaluation.outputs) != 1:
                raise NotLinearError(f"the model gives {len(evaluation.outputs)} outputs, not one")
            z = evaluation.outputs[0].detach()
            curvatures: list[Tensor] = []
            slope = z
            generator = torch.Generator().manual_seed(batch.index)
            signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
            for at in (z, z + signs):
                at = at.clone().requires_grad_()
                (g,) = torch.autograd.grad(evaluation.loss_of((at,)), at, create_graph=True)
                if not g.requires_grad:
                    raise NotLinearError(
                        "the loss has no second derivative by the outputs, so it is no squared error"
                    )
                slope = g.detach() if not curvatures else slope
                curvatures.append((torch.autograd.grad(g, at, signs)[0] * signs).double())
            c = float(curvatures[0].mean())
            if not all(bool(((x - c).abs() <= loose * abs(c)).all()) for x in curvatures) or not c > 0:
                raise NotLinearError("the loss is not a multiple of the squared error")
            inputs.append(args[0].detach().double())
            residuals.append(slope.double() / c)
            examples.append(batch.examples)
            factors.append(batch.weight * c * objective.examples)
    if max(factors) - min(factors) > loose * max(factors):
        raise NotLinearError("the loss weighs examples of different batches differently")
    return inputs, residuals, examples, sum(factors) / len(factors)


def _moments(
    twin: nn.Module,
    inputs: list[Tensor],
    residuals: list[Tensor],
    examples: list[int],
    whole: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, float]:
    """Means of x xᵀ, y xᵀ and |y|²; the outputs must be what the whole map makes of the inputs."""
    d, n = whole.shape[1] - 1, sum(examples)
    moment = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=whole.device)
    cross, power = torch.zeros_like(whole), 0.0
    for x, r in zip(inputs, residuals, strict=True):
        rows = torch.cat([x.reshape(len(x), d), x.new_ones(len(x), 1)], dim=1)
        with torch.no_grad():
            outputs = twin(x)
        away = float((outputs - rows @ whole.T).norm())
        if away > 1e-9 * (float(outputs.norm()) + float(rows.norm()) * float(whole.norm())):
            raise NotLinearError("its outputs are no affine function of its inputs")
        y = outputs - r
        moment += rows.T @ rows / n
        cross += y.T @ rows / n
        power += float(y.square().sum()) / n
    return (moment, cross, power) if affine else (moment[:-1, :-1], cross[:, :-1], power)


def _run(
    twin: nn.Module, layers: Sequence[Layer], x: Tensor, leaves: bool = False
) -> tuple[list[str], list[Tensor], Tensor]:
    """Paths of the layers as they run; their inputs, or their outputs if ``leaves``; and the model's output."""
    paths: list[str] = []
    tensors: list[Tensor] = []
    handles = []
    for layer in layers:
        module = twin.get_submodule(layer.path)

        def record(_: nn.Module, args: Any, output: Tensor, path: str = layer.path) -> None:
            if path in paths:
                raise NotLinearError(f"{path!r} runs more than once")
            if output.dim() != 2:
                raise NotLinearError(f"{path!r} works on {output.dim()} axes, not on examples by features")
            paths.append(path)
            tensors.append(output if leaves else args[0])

        handles.append(module.register_forward_hook(record))
    try:
        with torch.enable_grad():
            result = twin(x)
    except NotLinearError:
        raise
    except Exception as error:
        raise NotLinearError(
            f"it does not take other inputs than the data ({type(error).__name__})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if len(paths) != len(layers):
        raise NotLinearError(f"{len(layers) - len(paths)} of its layers do not run")
    if not torch.is_tensor(result):
        raise NotLinearError(f"it gives a {type(result).__name__}, not a tensor")
    return paths, tensors, result
