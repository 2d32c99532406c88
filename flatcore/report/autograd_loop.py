"""The Hessian the usual way: one vector at a time through a retained double backward. The yardstick of a report."""

from __future__ import annotations

import torch
from torch import Tensor

from flatcore.environment import full_float32
from flatcore.evaluate import plain_torch
from flatcore.objective import Objective


class AutogradLoop:
    """The (P, P) Hessian of an objective for anything that takes `.shape` and `@`.

    The loss and its gradient are computed once, with their graph kept, so that a product costs no more than one
    backward pass through the graph of the gradient. Memory: that graph, for all batches at once.
    """

    def __init__(self, objective: Objective) -> None:
        self.dtype, self.device = objective.layout.dtype, objective.layout.device
        self.shape = (objective.layout.size, objective.layout.size)
        self.parameter_slices = objective.parameter_slices
        self._split = objective.layout.split
        self._leaves = {name: p.detach().clone().requires_grad_() for name, p in objective.parameters.items()}
        self._gradients: list[tuple[Tensor, ...]] = []
        with plain_torch(objective.layout.device):
            for batch in objective.batches():
                loss = batch.weight * objective.evaluate(batch.batch, self._leaves).loss
                leaves = tuple(self._leaves.values())
                self._gradients.append(
                    torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                )

    def __matmul__(self, V: Tensor) -> Tensor:
        """Of shape (P, K) for V of that shape."""
        with full_float32(self.device):
            return torch.stack([self._product(column) for column in V.T], dim=1)

    def _product(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        direction = self._split(v.contiguous())
        for gradients in self._gradients:
            # The gradient of a parameter that enters linearly, or not at all, has no graph.
            pairs = [(g, d) for g, d in zip(gradients, direction.values(), strict=True) if g.requires_grad]
            if not pairs:
                continue
            outputs, weights = zip(*pairs, strict=True)
            parts = torch.autograd.grad(
                outputs, tuple(self._leaves.values()), weights, retain_graph=True, materialize_grads=True
            )
            total += torch.cat([part.reshape(-1) for part in parts])
        return total
