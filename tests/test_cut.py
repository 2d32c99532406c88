"""Where the model ends and the loss begins: what GGN and gradient covariance are made of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import Reference
from torch import nn

import flatcore as fc


@pytest.mark.parametrize("order", ["examples", "tokens"])
def test_covariance_whatever_the_order_of_the_rows(order):
    """Rows of the logits that are not in the order of the examples must not be taken for theirs."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 6, 4).double(), torch.randint(0, 3, (5, 6))

    def loss(m, batch):
        a, b = (batch["x"], batch["y"]) if order == "examples" else (batch["x"].transpose(0, 1), batch["y"].T)
        return nn.functional.cross_entropy(m(a).flatten(0, 1), b.flatten())

    gradients = []
    for n in range(5):
        one = nn.functional.cross_entropy(model(x[n]), y[n])
        gradients.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(one, list(model.parameters()))])
        )
    g = torch.stack(gradients)
    C = fc.GradientCovariance(fc.Objective(model, fc.ModelLoss(loss), {"x": x, "y": y}), centered=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.errors.FlatcoreWarning)
        dense = C.to_dense()
        assert C.plan().backend == ("native" if order == "examples" else "autograd")
    torch.testing.assert_close(dense, g.T @ g / 5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["loss of output", "loss of model"])
def test_log_probabilities_for_another_loss_are_the_output(axis, kind):
    """Only in front of nll_loss is a log-softmax part of the loss; for others the cut lies behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(axis)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    loss = fc.ModelLoss(lambda m, b: F.mse_loss(m(b[0]), b[1])) if kind == "loss of model" else nn.MSELoss()
    G = fc.GGN(fc.Objective(model, loss, (x, y)))
    torch.testing.assert_close(G.to_dense(), Reference(model, nn.MSELoss(), (x, y), "output_target").ggn())
