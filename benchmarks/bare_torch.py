"""Every way to a Hessian-vector product that torch itself offers, for a fair comparison.

Each way is prepared once (its forward and gradient are computed and kept where the way allows it) and then maps a
tuple of directions, one tensor (K, *shape) per parameter, to a tuple of products of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import functional_call, grad, jvp, linearize, vmap

Directions = tuple[torch.Tensor, ...]
Way = Callable[[Directions], Directions]


def loss_of_parameters(model: torch.nn.Module, loss, batch) -> tuple[Callable[..., torch.Tensor], Directions]:
    """The loss as a function of the parameters' tensors, and those tensors, detached."""
    names = [name for name, _ in model.named_parameters()]
    parameters = tuple(p.detach().clone() for p in model.parameters())
    *inputs, target = batch

    def evaluate(*tensors: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, dict(zip(names, tensors, strict=True)), tuple(inputs)), target)

    return evaluate, parameters


def ways(evaluate: Callable[..., torch.Tensor], parameters: Directions) -> dict[str, Callable[[], Way]]:
    """Name -> a function that prepares the way. A way that torch cannot run raises when prepared or called."""
    places = tuple(range(len(parameters)))
    gradient = grad(evaluate, argnums=places)

    def graph() -> tuple[Directions, Directions]:
        leaves = tuple(p.clone().requires_grad_() for p in parameters)
        return leaves, torch.autograd.grad(evaluate(*leaves), leaves, create_graph=True)

    def double_backward(batched: bool) -> Way:
        leaves, first = graph()

        def one_by_one(V: Directions) -> Directions:
            rows = [
                torch.autograd.grad(first, leaves, tuple(v[k] for v in V), retain_graph=True)
                for k in range(V[0].shape[0])
            ]
            return tuple(torch.stack(columns) for columns in zip(*rows, strict=True))

        def at_once(V: Directions) -> Directions:
            return torch.autograd.grad(first, leaves, V, retain_graph=True, is_grads_batched=True)

        return at_once if batched else one_by_one

    def linearized(batched: bool) -> Way:
        product = linearize(gradient, *parameters)[1]

        def one_by_one(V: Directions) -> Directions:
            rows = [product(*(v[k] for v in V)) for k in range(V[0].shape[0])]
            return tuple(torch.stack(columns) for columns in zip(*rows, strict=True))

        return (lambda V: vmap(product)(*V)) if batched else one_by_one

    def jvp_of_grad() -> Way:
        return lambda V: vmap(lambda *v: jvp(gradient, parameters, v)[1])(*V)

    def grad_of_jvp() -> Way:
        def directional(v: Directions, *tensors: torch.Tensor) -> torch.Tensor:
            return jvp(evaluate, tensors, v)[1]

        return lambda V: vmap(
            lambda *v: grad(directional, argnums=tuple(p + 1 for p in places))(v, *parameters)
        )(*V)

    return {
        "retained double backward": lambda: double_backward(batched=False),
        "double backward, batched": lambda: double_backward(batched=True),
        "linearize": lambda: linearized(batched=False),
        "vmap(linearize)": lambda: linearized(batched=True),
        "vmap(jvp(grad))": jvp_of_grad,
        "vmap(grad(jvp))": grad_of_jvp,
    }


def split(V: torch.Tensor, parameters: Directions) -> Directions:
    """Flat directions (K, P) as one tensor (K, *shape) per parameter."""
    pieces = V.split([p.numel() for p in parameters], dim=1)
    return tuple(piece.reshape(-1, *p.shape) for piece, p in zip(pieces, parameters, strict=True))
