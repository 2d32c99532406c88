"""Every way to a Hessian-vector product that torch itself offers, for a fair comparison.

Each way is prepared once (its forward and gradient are computed and kept where the way allows it) and then maps a
tuple of directions, one tensor (K, *shape) per parameter, to a tuple of products of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vmap

Directions = tuple[Tensor, ...]
Way = Callable[[Directions], Directions]


def output_of_parameters(model: nn.Module, batch: Sequence[Any]) -> tuple[Callable[..., Tensor], Directions]:
    """The model's output as a function of the parameters' tensors, and those tensors, detached."""
    names = [name for name, _ in model.named_parameters()]
    parameters = tuple(p.detach().clone() for p in model.parameters())
    *inputs, _ = batch

    def evaluate(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, tensors, strict=True)), tuple(inputs))  # type: ignore[no-any-return]

    return evaluate, parameters


def loss_of_parameters(
    model: nn.Module, loss: Callable[..., Tensor], batch: Sequence[Any]
) -> tuple[Callable[..., Tensor], Directions]:
    """The loss as a function of the parameters' tensors, and those tensors, detached."""
    output, parameters = output_of_parameters(model, batch)
    return lambda *tensors: loss(output(*tensors), batch[-1]), parameters


def gradient_of(evaluate: Callable[..., Tensor], parameters: Directions) -> Directions:
    """One gradient by plain autograd: the unit in which the cost of a product is told."""
    leaves = tuple(p.clone().requires_grad_() for p in parameters)
    return torch.autograd.grad(evaluate(*leaves), leaves)


def ways(
    evaluate: Callable[..., Tensor], parameters: Directions, compiled: bool
) -> dict[str, Callable[[], Way]]:
    """Name -> a function that prepares the way. A way that torch cannot run raises when prepared or called.

    compiled: also by torch.compile, where there is a function to compile. The graph that autograd keeps for a second
    backward pass is none: torch.compile does not differentiate twice.
    """
    places = tuple(range(len(parameters)))
    gradient = grad(evaluate, argnums=places)

    def double_backward(batched: bool) -> Way:
        leaves = tuple(p.clone().requires_grad_() for p in parameters)
        first = torch.autograd.grad(evaluate(*leaves), leaves, create_graph=True)

        def one_by_one(V: Directions) -> Directions:
            return each(lambda *v: torch.autograd.grad(first, leaves, v, retain_graph=True), V)

        def at_once(V: Directions) -> Directions:
            return torch.autograd.grad(first, leaves, V, retain_graph=True, is_grads_batched=True)

        return at_once if batched else one_by_one

    def linearized(batched: bool, compile_it: bool = False) -> Way:
        product: Callable[..., Directions] = linearize(gradient, *parameters)[1]
        run = vmap(product) if batched else product
        if compile_it:
            run = torch.compile(run, fullgraph=True, dynamic=False)
        return (lambda V: run(*V)) if batched else (lambda V: each(run, V))

    def jvp_of_gradient(*v: Tensor) -> Directions:
        return jvp(gradient, parameters, v)[1]  # type: ignore[no-any-return]

    def gradient_of_jvp(*v: Tensor) -> Directions:
        return grad(lambda *tensors: jvp(evaluate, tensors, v)[1], argnums=places)(*parameters)  # type: ignore[no-any-return]

    def mapped(product: Callable[..., Directions], compile_it: bool = False) -> Way:
        run = vmap(product)
        if compile_it:
            run = torch.compile(run, fullgraph=True, dynamic=False)
        return lambda V: run(*V)

    eager: dict[str, Callable[[], Way]] = {
        "retained double backward": lambda: double_backward(batched=False),
        "double backward, batched": lambda: double_backward(batched=True),
        "linearize": lambda: linearized(batched=False),
        "vmap(linearize)": lambda: linearized(batched=True),
        "vmap(jvp(grad))": lambda: mapped(jvp_of_gradient),
        "vmap(grad(jvp))": lambda: mapped(gradient_of_jvp),
    }
    if not compiled:
        return eager
    return eager | {
        "compiled linearize": lambda: linearized(batched=False, compile_it=True),
        "compiled vmap(linearize)": lambda: linearized(batched=True, compile_it=True),
        "compiled vmap(jvp(grad))": lambda: mapped(jvp_of_gradient, compile_it=True),
        "compiled vmap(grad(jvp))": lambda: mapped(gradient_of_jvp, compile_it=True),
    }


def each(product: Callable[..., Directions], V: Directions) -> Directions:
    """The products one direction at a time."""
    rows = [product(*(v[k] for v in V)) for k in range(V[0].shape[0])]
    return tuple(torch.stack(columns) for columns in zip(*rows, strict=True))


def split(V: Tensor, parameters: Directions) -> Directions:
    """Flat directions (K, P) as one tensor (K, *shape) per parameter."""
    pieces = V.split([p.numel() for p in parameters], dim=1)
    return tuple(piece.reshape(-1, *p.shape) for piece, p in zip(pieces, parameters, strict=True))


def joined(V: Directions) -> Tensor:
    """The inverse of `split`."""
    return torch.cat([v.reshape(v.shape[0], -1) for v in V], dim=1)
