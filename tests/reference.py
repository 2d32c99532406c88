"""Dense operators by torch.func, the slow obvious twins that products are compared with.

Everything goes through functional_call on the user's own model; nothing of flatcore is used. Second derivatives are
taken reverse over reverse: forward over reverse fails in torch 2.13 for some losses ("ZeroTensors are immutable").
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

TARGETS = ("target", "targets", "label", "labels", "y")


class Reference:
    """The loss of one batch as a function of the flat vector of the trainable parameters."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batch: Any, loss_kind: str) -> None:
        self.model, self.loss, self.batch, self.loss_kind = copy.deepcopy(model), loss, batch, loss_kind
        model = self.model
        self.parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.flat = torch.cat([p.reshape(-1) for p in self.parameters.values()])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        return {n: v.view(p.shape) for (n, p), v in zip(self.parameters.items(), pieces, strict=True)}

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        if isinstance(self.batch, dict):
            (key,) = [k for k in self.batch if k in TARGETS]
            return (), {k: v for k, v in self.batch.items() if k != key}, self.batch[key]
        return tuple(self.batch[:-1]), {}, self.batch[-1]

    def call(self, flat: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # functional_call does not restore a module that is registered under two names.
        own = [(m, dict(m._parameters)) for m in self.model.modules()]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
                return functional_call(self.model, self.unflatten(flat), args, kwargs)
        finally:
            for module, parameters in own:
                module._parameters.update(parameters)

    def output(self, flat: Tensor) -> Any:
        args, kwargs, _ = self.split()
        return self.call(flat, args, kwargs)

    def __call__(self, flat: Tensor) -> Tensor:
        if self.loss_kind == "output_target":
            return self.loss(self.output(flat), self.split()[2])
        parameters = self.unflatten(flat)

        class Bound(nn.Module):
            """What a loss of (model, batch) sees: the model at other parameters."""

            def forward(_, *args, **kwargs):
                return self.call(flat, args, kwargs)

            def parameters(_, recurse=True):
                return iter(parameters.values())

        return self.loss(Bound(), self.batch)

    def gradient(self) -> Tensor:
        return grad(self)(self.flat)

    def hessian(self) -> Tensor:
        """(P, P)"""
        return jacrev(grad(self))(self.flat)

    def ggn(self) -> Tensor:
        """(P, P): J^T (d2 loss / d output2) J, every tensor of the output counted."""
        leaves, structure = torch.utils._pytree.tree_flatten(self.output(self.flat))
        sizes = [leaf.numel() for leaf in leaves]
        shapes = [leaf.shape for leaf in leaves]

        def joined(flat: Tensor) -> Tensor:
            parts = torch.utils._pytree.tree_flatten(self.output(flat))[0]
            return torch.cat([part.reshape(-1) for part in parts])

        def loss_of(output: Tensor) -> Tensor:
            parts = [part.view(shape) for part, shape in zip(output.split(sizes), shapes, strict=True)]
            return self.loss(torch.utils._pytree.tree_unflatten(parts, structure), self.split()[2])

        J = jacrev(joined)(self.flat)
        output = joined(self.flat).detach()
        return J.T @ jacrev(grad(loss_of))(output) @ J

    def covariance(self, examples: int) -> Tensor:
        """(P, P): (1/N) sum g_n g_n^T, uncentred, from each example's own forward pass.

        l_n = N x the example's contribution to the loss, so this is right for losses that are means of one term per
        example only.
        """
        total = torch.zeros(self.flat.numel(), self.flat.numel(), dtype=self.flat.dtype)
        for n in range(examples):
            one = {k: v[n : n + 1] for k, v in self.batch.items()} if isinstance(self.batch, dict) else None
            batch = one or tuple(part[n : n + 1] for part in self.batch)
            g = Reference(self.model, self.loss, batch, self.loss_kind).gradient()
            total += g[:, None] * g
        return total / examples
