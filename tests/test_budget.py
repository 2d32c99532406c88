"""How many directions go through at once: as many as the budget holds, and no more."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatcore as fc
from flatcore.bench.memory import peak_bytes


class Attention(nn.Module):
    """Tiles that do not grow with the directions, and a layer that does: the peak is one, then the other."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        heads: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return heads.tanh()


def objective(memory: int | None = None) -> fc.Objective:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 64, 16, generator=random), torch.randn(4, 64, 64, generator=random)
    torch.manual_seed(0)
    return fc.Objective(Attention(), nn.MSELoss(), (x, y), memory=memory)


@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN])
@pytest.mark.parametrize("share", [1, 1_600_000, 4_000_000, 10_000_000])
def test_as_many_directions_as_the_budget_holds(operator: type[fc.Hessian], share: int) -> None:
    plan, unbounded = operator(objective(4 * share)).plan(), operator(objective()).plan()
    assert plan.directions == 1 or unbounded.peak_bytes(plan.directions) <= share
    assert unbounded.peak_bytes(plan.directions + 1) > share


@pytest.mark.parametrize("share", [2_500_000, 10_000_000])
def test_a_product_stays_within_the_budget(share: int) -> None:
    H = fc.Hessian(objective(4 * share))
    V = torch.randn(64, H.shape[0], generator=torch.Generator().manual_seed(0)).T
    assert 1 < H.plan().directions < 64
    H @ V  # the first product makes the state, which stays
    gc.collect()
    assert peak_bytes(lambda: H @ V) - V.numel() * V.element_size() <= share
