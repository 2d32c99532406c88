"""Traces and diagonals by example of models and losses at the edge of what sweeps over examples are for, against dense
matrices from products."""

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore.errors import FlatcoreWarning
from tests.test_example_probes import data, dense, tanh_net


@pytest.fixture
def objective() -> fc.Objective:
    torch.manual_seed(0)
    return fc.Objective(tanh_net(), nn.CrossEntropyLoss(), data())


@pytest.mark.parametrize("build", [nn.Tanh, nn.ReLU])
def test_outputs_along_another_axis_than_the_hidden_examples_are_not_taken_apart(build: type[nn.Module]):
    """Of as many examples as positions, transposed on the way in and back at the end."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 5), build(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    batch = torch.randn(6, 6, 4, dtype=torch.float64), torch.randint(0, 3, (6, 6))
    objective = fc.Objective(
        TimeFirst().double(), lambda z, y: nn.functional.cross_entropy(z.transpose(1, 2), y), batch
    )
    for A in (fc.Hessian(objective), fc.GGN(objective), fc.GradientCovariance(objective)):
        truth = dense(A)
        for method in ("auto", "exact"):
            estimate, entries = fc.trace(A, method=method), fc.diagonal(A, method=method)
            assert abs(estimate.value - float(truth.sum())) <= 4 * estimate.stderr + 1e-10
            assert ((entries.value - truth).abs() <= 5 * entries.stderr + 1e-10).all()


@pytest.mark.parametrize("kind", [fc.Hessian, fc.GGN])
def test_targets_of_negative_weight(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    A = kind(fc.Objective(model, lambda z, y: -nn.functional.cross_entropy(z, y), data()))
    truth = dense(A)
    estimate = fc.trace(A, method="exact")
    assert estimate.matvecs == 3
    assert estimate.value == pytest.approx(float(truth.sum()), rel=1e-10)
    torch.testing.assert_close(fc.diagonal(A, method="exact").value, truth, rtol=1e-9, atol=1e-12)
    sampled = fc.trace(A, method="example", rtol=0.05)
    assert abs(sampled.value - float(truth.sum())) <= 4 * sampled.stderr


def test_a_covariance_by_example_is_no_gauss_newton_matrix(objective: fc.Objective):
    C = fc.GradientCovariance(objective)
    estimate = fc.trace(C, method="example")
    assert (estimate.method, estimate.matvecs) == ("exact", 1)
    assert estimate.value == pytest.approx(float(dense(C).sum()), rel=1e-9)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    C = fc.GradientCovariance(fc.Objective(Twice().double(), nn.CrossEntropyLoss(), data()))
    truth = float(dense(C).sum())
    with pytest.warns(FlatcoreWarning, match="not got in one sweep from the model's output"):
        estimate = fc.trace(C, method="example", rtol=0.1)
    assert abs(estimate.value - truth) <= 4 * estimate.stderr
    assert abs(fc.trace(C).value - truth) <= 4 * fc.trace(C).stderr + 1e-10


def test_few_examples_take_so_many_probes_that_their_spread_is_seen():
    """<v, H v> takes two values here: two probes agree every other time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh()).double()
    batch = torch.randn(1, 1, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64)
    H = fc.Hessian(fc.Objective(model, nn.MSELoss(), batch))
    truth = float(dense(H).sum())
    found = [fc.trace(H, method="example", rtol=0.1, seed=seed) for seed in range(50)]
    inside = sum(abs(e.value - truth) <= 2 * e.stderr for e in found)
    assert inside >= 45
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
        assert fc.trace(H, method="example", max_matvecs=2, rtol=0.5).status != "converged"


def test_a_loss_that_picks_rows_of_other_examples():
    """Only the index, a constant of the batch, tells that examples meet: found on the way, then by shared probes."""
    torch.manual_seed(0)
    x, _ = data(6)
    loss = lambda z, y: ((z * z.flip(0)) * y).sum(-1).mean()  # noqa: E731
    H = fc.Hessian(fc.Objective(tanh_net(), loss, (x, torch.randn(6, 3, dtype=torch.float64))))
    truth = float(dense(H).sum())
    with pytest.warns(FlatcoreWarning, match="flip.*mixes the examples of a batch; so all examples share"):
        estimate = fc.trace(H, method="example", rtol=0.2)
    assert abs(estimate.value - truth) <= 4 * estimate.stderr
    assert fc.trace(H, method="exact").value == pytest.approx(truth, rel=1e-9)


def test_small_budgets_are_told():
    """Sums over outputs without a probe of the remainder are no Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), data()))
    truth = float(dense(H).sum())
    for budget in range(2, 9):
        with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
            estimate = fc.trace(H, max_matvecs=budget)
        assert estimate.stderr > 0
        assert abs(estimate.value - truth) <= 4 * estimate.stderr


def test_one_probe_has_no_spread():
    H = fc.Hessian(fc.Objective(nn.Linear(5, 3).double(), nn.CrossEntropyLoss(), data()))
    with pytest.warns(FlatcoreWarning, match="the standard error of the trace is nan"):
        assert fc.trace(H, max_matvecs=1).matvecs == 1
    with pytest.raises(
        ValueError, match="max_matvecs: expected at least 2 for probes of each example's own, got 1"
    ):
        fc.trace(H, method="example", max_matvecs=1)
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
        assert fc.trace(H, method="example", max_matvecs=3, rtol=1e-9).matvecs <= 3


def test_all_columns_where_probes_would_take_more():
    """Also after sums over the outputs, whose remainder turns out to be large."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)
    ).double()
    for p in model.parameters():
        p.data *= 2
    batch = torch.randn(4, 8, dtype=torch.float64), torch.randint(3, (4,))
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), batch))
    for function in (fc.trace, fc.diagonal):
        found = function(H, rtol=1e-3)
        assert (found.method, found.status) == ("exact", "converged")
        assert found.matvecs <= 2 * H.shape[0]


@pytest.mark.parametrize("empty", [False, True])
def test_nothing_to_probe(empty: bool):
    """A parameter without entries; logits that are the same for all examples."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(0, 5) if empty else torch.randn(3))
            if empty:
                self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (
                torch.cat([self.head(x), x @ self.p.T], 1)
                if empty
                else torch.tanh(self.p).expand(24, 3) * 1.0
            )

    torch.manual_seed(0)
    H = fc.Hessian(fc.Objective(Odd().double(), nn.CrossEntropyLoss(), data()))
    estimate = fc.trace(H, method="example", rtol=0.05)
    assert abs(estimate.value - float(dense(H).sum())) <= 4 * estimate.stderr + 1e-12


def test_examples_without_curvature_do_not_make_a_spread_believed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = data(20)
    y[1:] = -100
    G = fc.GGN(fc.Objective(model, nn.CrossEntropyLoss(), (x, y)))
    truth = float(dense(G).sum())
    for seed in range(40):
        estimate = fc.trace(G, method="example", rtol=0.2, seed=seed)
        assert abs(estimate.value - truth) <= 4 * estimate.stderr
