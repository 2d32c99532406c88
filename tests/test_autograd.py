"""Products through torch autograd where there is no program, and what is refused because torch would answer wrongly."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_operators import OPERATORS, assert_close, build, flat_parameters, joined, reference, without_engine
from torch import Tensor, nn
from untouched import one_thread, untouched

import flatcore as fc
from flatcore.errors import FlatcoreWarning

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


class Branching(nn.Module):
    """Control flow that depends on values stands for anything that no program can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h) if bool(h.abs().sum() > 0) else h)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_has_no_program_runs_through_autograd_and_says_so_once(operator: type) -> None:
    _, loss, batches = build("mlp-ce")
    model = Branching().double()
    objective = fc.Objective(model, loss, batches)
    with pytest.warns(FlatcoreWarning, match="through torch autograd") as caught:
        dense = operator(objective).to_dense()
    assert len(caught) == 1
    fc.Hessian(objective).to_dense()  # any warning now is an error
    assert_close(dense, reference(operator, model, loss, joined(batches)))
    plan = operator(objective).plan()
    assert plan.native_fraction == 0
    assert "autograd" in str(plan)


class Recurrent(nn.Module):
    """Recurrent layers keep their parameters in a list of their own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.view(-1, 2, 2))[0][:, -1])


def test_recurrent_layers() -> None:
    torch.manual_seed(0)
    model, (x, y) = Recurrent().double(), joined(build("mlp-ce")[2])
    own = list(model.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), own, create_graph=True)
    v = torch.randn(len(flat_parameters(model)), dtype=torch.float64)
    product = torch.autograd.grad(torch.cat([g.reshape(-1) for g in gradient]) @ v, own)
    with warnings.catch_warnings(), untouched(model, x, y):
        warnings.simplefilter("ignore", FlatcoreWarning)
        assert_close(
            fc.Hessian(fc.Objective(model, F.cross_entropy, (x, y))) @ v,
            torch.cat([h.reshape(-1) for h in product]),
        )


def test_a_wrong_second_derivative_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 differentiates weight_norm wrongly the second time; finite differences agree with the engine."""
    _, loss, batches = build("mlp-ce")
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    A = without_engine(monkeypatch, fc.Hessian, fc.Objective(model, loss, batches))
    with pytest.raises(ValueError, match=r"^model: torch's second derivative of the loss is not symmetric"):
        A.to_dense()


def test_what_torch_cannot_differentiate_twice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))

    batches = build("mlp-ce")[2]
    objective = fc.Objective(Model(4, 3).double(), F.cross_entropy, batches)
    with pytest.raises(
        ValueError, match=r"^model: expected a loss that torch can differentiate twice, got .*terms of others"
    ):
        without_engine(monkeypatch, fc.Hessian, objective)


def test_covariance_example_by_example_where_the_output_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batches = build("mlp-mse")
    # halved twice: the loss is not the direct result of one loss function
    scaled = fc.ModelLoss(lambda model, batch: 2 * loss(model(batch[0]), batch[1]) / 2)
    A = without_engine(monkeypatch, fc.GradientCovariance, fc.Objective(model, scaled, batches))
    assert_close(A.to_dense(), reference(fc.GradientCovariance, model, loss, joined(batches)))


@pytest.mark.filterwarnings("ignore")
def test_no_covariance_where_an_example_alone_has_no_loss() -> None:
    """The standard deviation of one is not a number, and neither may the product be."""

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        z = model(batch[0])
        z = (z - z.mean(0)) / z.std(0)
        return z[:, 0].pow(4).mean() + (z.T @ z / len(z)).square().sum()

    objective = fc.Objective(nn.Linear(4, 3), fc.ModelLoss(loss), (torch.randn(5, 4),))
    with pytest.raises(ValueError, match=r"^loss: the gradient covariance needs .* nan as the mean"):
        fc.GradientCovariance(objective) @ torch.ones(15)
