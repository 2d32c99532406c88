"""Products of other packages, as they ship, on one batch held in memory.

Each is prepared once and then maps flat directions (K, P) to products (K, P): what it can keep between products
(PyHessian: the gradient's graph) it keeps. Their checks of the model are switched off, as no product needs them. A
package that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.bench.bare_torch import joined, split
from flatcore.bench.workloads import Batch, Loss

FlatWay = Callable[[Tensor], Tensor]


class _Mean(nn.Module):
    """A loss that says of itself that it is a mean, which curvlinops asks for."""

    reduction = "mean"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target)


def curvlinops_operator(operator: str, model: nn.Module, loss: Loss, batch: Batch) -> Any:
    """One of the package's linear operators."""
    import curvlinops

    return getattr(curvlinops, operator)(
        model,
        _Mean(loss),
        list(model.parameters()),
        [batch],
        check_deterministic=False,
        num_data=batch[0].shape[0],
    )


def _curvlinops(operator: str, model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    A = curvlinops_operator(operator, model, loss, batch)
    return lambda V: (A @ V.T).T


def curvlinops_hessian(model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    return _curvlinops("HessianLinearOperator", model, loss, batch)


def curvlinops_ggn(model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    return _curvlinops("GGNLinearOperator", model, loss, batch)


def pyhessian(model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    H = hessian(model, loss, data=batch, cuda=batch[0].is_cuda)
    model.zero_grad()

    def product(V: Tensor) -> Tensor:
        rows = [[v[0] for v in split(row[None], tuple(H.params))] for row in V]
        products = [hessian_vector_product(H.gradsH, H.params, row) for row in rows]
        return joined(tuple(torch.stack(columns) for columns in zip(*products, strict=True)))

    return product


def eigenthings_hessian(model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    from hessian_eigenthings import HessianOperator, supervised_loss

    H = HessianOperator(model, [batch], supervised_loss(loss))
    return lambda V: torch.stack([H.matvec(v) for v in V])


def eigenthings_ggn(model: nn.Module, loss: Loss, batch: Batch) -> FlatWay:
    from hessian_eigenthings import GGNOperator

    G = GGNOperator(
        model,
        [batch],
        forward_fn=lambda model, batch: model(batch[0]),
        loss_of_output_fn=lambda output, batch: loss(output, batch[1]),
    )
    return lambda V: torch.stack([G.matvec(v) for v in V])


# Operator -> name of the package as imported -> how it is prepared.
PEERS: dict[str, dict[str, Callable[[nn.Module, Loss, Batch], FlatWay]]] = {
    "hessian": {
        "curvlinops": curvlinops_hessian,
        "pyhessian": pyhessian,
        "hessian_eigenthings": eigenthings_hessian,
    },
    "ggn": {"curvlinops": curvlinops_ggn, "hessian_eigenthings": eigenthings_ggn},
}


def installed(operator: str) -> list[str]:
    return [name for name in PEERS[operator] if importlib.util.find_spec(name) is not None]
