"""Models of kinds that people have and that were wrong once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc


class Graph(nn.Module):
    """A layer of a graph network: a sparse adjacency as a buffer, or from the batch."""

    def __init__(self, adjacency: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        return torch.sparse.mm(self.adjacency if adjacency is None else adjacency, self.layer(x))


@pytest.mark.filterwarnings("ignore")  # of torch on sparse tensors, and that autograd takes the model
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "batch"])
def test_sparse_tensors(buffer: bool, layout: torch.layout) -> None:
    torch.manual_seed(0)
    dense = torch.rand(5, 5).double().bernoulli() + torch.eye(5).double()
    x, target, adjacency = torch.randn(5, 4).double(), torch.randint(3, (5,)), dense.to_sparse(layout=layout)
    model = Graph(adjacency if buffer else None)
    batch = (x, target) if buffer else (x, adjacency, target)
    V = torch.randn(15, 2).double()
    product = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), batch)) @ V
    expected = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), (x, dense, target))) @ V
    assert (product - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("channels", [1, 3, 8, 12])
@pytest.mark.parametrize("stride", [2, (1, 3)], ids=str)
def test_kernels_of_one_pixel_with_strides(channels: int, stride: int | tuple[int, int]) -> None:
    """oneDNN 3.12 writes outside its memory for some, which a process without luck does not survive."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3),
        nn.Tanh(),
        nn.Conv2d(channels, 5, 1, stride),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    x, target = torch.randn(4, 2, 9, 8), torch.randint(3, (4,))
    model(x)
    V = torch.randn(sum(p.numel() for p in model.parameters()), 2)
    product = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), (x, target))) @ V
    wide = fc.Objective(model.double(), nn.CrossEntropyLoss(), (x.double(), target))
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(
        wide.loss_function(model(x.double()), target), parameters, create_graph=True
    )
    flat = torch.cat([g.flatten() for g in gradient])
    for v, y in zip(V.double().T, product.T, strict=True):
        exact = torch.cat([h.flatten() for h in torch.autograd.grad(flat @ v, parameters, retain_graph=True)])
        # Sums of up to some thousand roundings.
        assert (y - exact).norm() <= 1000 * torch.finfo(torch.float32).eps * exact.norm()
