"""Every way to a product with the Gauss-Newton matrix J^T H J that torch itself offers.

H is the Hessian of the loss at the model's output z, J = dz / d parameters. As in `bare_torch`, a way is prepared once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, linearize, vjp, vmap

from flatcore.bench.bare_torch import Directions, Way, each, output_of_parameters


def network_and_criterion(
    model: nn.Module, loss: Callable[..., Tensor], batch: Sequence[Any]
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Directions]:
    """The output as a function of the parameters' tensors, the loss as a function of the output, and those tensors."""
    network, parameters = output_of_parameters(model, batch)
    return network, lambda z: loss(z, batch[-1]), parameters


def ways(
    network: Callable[..., Tensor],
    criterion: Callable[[Tensor], Tensor],
    parameters: Directions,
    compiled: bool,
) -> dict[str, Callable[[], Way]]:
    """Name -> a function that prepares the way. A way that torch cannot run raises when prepared or called.

    compiled: also by torch.compile the ways that keep nothing; the graph that `vjp` keeps is none it could compile.
    """

    def computed_anew(*v: Tensor) -> Directions:
        z, Jv = jvp(network, parameters, v)  # type: ignore[misc]
        HJv = jvp(grad(criterion), (z,), (Jv,))[1]
        _, pull = vjp(network, *parameters)  # type: ignore[misc]
        return pull(HJv)  # type: ignore[no-any-return]

    def kept() -> Callable[..., Directions]:
        z, push = linearize(network, *parameters)
        curve = linearize(grad(criterion), z)[1]
        _, pull = vjp(network, *parameters)  # type: ignore[misc]
        return lambda *v: pull(curve(push(*v)))

    def mapped(product: Callable[..., Directions], compile_it: bool = False) -> Way:
        run = _compiled(vmap(product)) if compile_it else vmap(product)
        return lambda V: run(*V)

    def one_by_one(product: Callable[..., Directions], compile_it: bool = False) -> Way:
        run = _compiled(product) if compile_it else product
        return lambda V: each(run, V)

    eager: dict[str, Callable[[], Way]] = {
        "double backward": lambda: _double_backward(network, criterion, parameters, batched=False),
        "double backward, batched": lambda: _double_backward(network, criterion, parameters, batched=True),
        "jvp + vjp": lambda: one_by_one(computed_anew),
        "vmap(jvp + vjp)": lambda: mapped(computed_anew),
        "linearize + vjp": lambda: one_by_one(kept()),
        "vmap(linearize + vjp)": lambda: mapped(kept()),
    }
    if not compiled:
        return eager
    return eager | {
        "compiled jvp + vjp": lambda: one_by_one(computed_anew, compile_it=True),
        "compiled vmap(jvp + vjp)": lambda: mapped(computed_anew, compile_it=True),
    }


def _double_backward(
    network: Callable[..., Tensor],
    criterion: Callable[[Tensor], Tensor],
    parameters: Directions,
    batched: bool,
) -> Way:
    """J v by reverse mode alone: J^T u is linear in u, so its derivative by u along v is J v (Townsend 2017)."""
    leaves = tuple(p.clone().requires_grad_() for p in parameters)
    z = network(*leaves)
    u = torch.zeros_like(z, requires_grad=True)
    JTu = torch.autograd.grad(z, leaves, u, create_graph=True)
    output = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(criterion(output), output, create_graph=True)

    def product(v: Directions) -> Directions:
        (Jv,) = torch.autograd.grad(JTu, u, v, retain_graph=True, is_grads_batched=batched)
        (HJv,) = torch.autograd.grad(slope, output, Jv, retain_graph=True, is_grads_batched=batched)
        return torch.autograd.grad(z, leaves, HJv, retain_graph=True, is_grads_batched=batched)

    return product if batched else lambda V: each(lambda *v: product(v), V)


def _compiled(product: Callable[..., Directions]) -> Callable[..., Directions]:
    return torch.compile(product, fullgraph=True, dynamic=False)
