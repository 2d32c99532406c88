"""Probes of each example's own, and exact sums over the outputs, against dense matrices from products (which
test_engine.py holds to torch.func), for every case of the table.

A pass over K probes gives a mean and the standard error of that mean. Means must lie within 4 standard errors, seeds
are fixed; the standard error must be that of the spread of independent passes: with 256 of them it is known to
1 / sqrt(2 * 256) = 4.4 %, three times which is asked for.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore.errors import FlatcoreWarning
from flatcore.example_sweeps import ExampleSweeps, sweeps_for
from tests.cases import CASES, Case
from tests.test_engine import objective_of

PROBES = 512


def sweeps_of(objective: fc.Objective) -> ExampleSweeps | str:
    return sweeps_for(objective, objective.snapshot())


def dense(A: fc.Hessian | fc.GGN | fc.GradientCovariance) -> Tensor:
    return A.to_dense().diagonal().double()


def by_parameter(diagonal: Tensor, objective: fc.Objective, sweeps: ExampleSweeps) -> Tensor:
    """The sum over all parameters with probes, then over each."""
    sums = [diagonal[objective.parameter_slices[name]].sum() for name in sweeps.probed]
    return torch.stack([torch.stack(sums).sum(), *sums])


def objective_with_sweeps(case: Case) -> tuple[fc.Objective, ExampleSweeps]:
    objective = objective_of(case)[0]
    sweeps = sweeps_of(objective)
    if isinstance(sweeps, str):
        pytest.skip(f"no sum over examples: {sweeps}")
    return objective, sweeps


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_unbiased_for_every_parameter(case: Case):
    objective, sweeps = objective_with_sweeps(case)
    if not sweeps.probed:
        pytest.skip("no parameter has a use that a probe stands for")
    H = dense(fc.Hessian(objective))
    modes = {"hessian": H}
    if case.loss_kind == "output_target":
        G = dense(fc.GGN(objective))
        modes |= {"ggn": G, "remainder": H - G}
    # What rounding leaves where a trace is zero.
    rounding = 1e-9 * float(H.abs().sum()) + 1e-300
    for mode, diagonal in modes.items():
        truth = by_parameter(diagonal, objective, sweeps)
        samples = sweeps.probe(mode, objective.snapshot(), 0, 0, PROBES)
        assert ((samples.mean - truth).abs() <= 4 * samples.variance.sqrt() + rounding).all(), mode


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_diagonals_entry_by_entry(case: Case):
    objective, sweeps = objective_with_sweeps(case)
    names = [name for name in sweeps.probed if name not in sweeps.repeated]
    if not names:
        pytest.skip("no parameter has one use that a probe stands for")
    H = dense(fc.Hessian(objective))
    samples = sweeps.probe("hessian", objective.snapshot(), 1, 0, PROBES, diagonal=True)
    assert samples.diagonal is not None
    assert samples.diagonal_variance is not None
    z = []
    rounding = 1e-9 * float(H.abs().sum()) + 1e-300
    for name in names:
        part = objective.parameter_slices[name]
        error = (samples.diagonal[part] - H[part]).abs()
        stderr = samples.diagonal_variance[part].sqrt()
        certain = stderr <= rounding
        assert (error[certain] <= 10 * rounding).all(), name
        z.append((error / stderr)[~certain])
    z = torch.cat(z)
    # Of m normal numbers one exceeds this with probability 1e-3.
    assert len(z) == 0 or float(z.max()) <= math.sqrt(2 * math.log(1000 * len(z)))
    assert len(z) < 50 or abs(float(z.square().mean()) - 1) < 0.5  # entries of one weight go together


@pytest.mark.parametrize("case", [c for c in CASES if c.loss_kind == "output_target"], ids=str)
@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
def test_sums_over_outputs_are_exact(case: Case):
    objective, sweeps = objective_with_sweeps(case)
    if not sweeps.outputs:
        pytest.skip("outputs do not give this one")
    G = dense(fc.GGN(objective))
    totals, diagonal = sweeps.exact_ggn(objective.snapshot(), diagonal=True)
    assert diagonal is not None
    torch.testing.assert_close(totals, by_parameter(G, objective, sweeps), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(diagonal, G, rtol=1e-9, atol=1e-11 * float(G.abs().max()))
    C = fc.GradientCovariance(objective, centered=True)
    estimate = fc.trace(C, method="exact")
    assert estimate.matvecs == 1
    assert estimate.value == pytest.approx(float(dense(C).sum()), rel=1e-9, abs=1e-14)
    torch.testing.assert_close(
        fc.diagonal(C, method="exact").value, dense(C), rtol=1e-8, atol=1e-12 * float(dense(C).abs().max())
    )


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(examples: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(examples, 5, dtype=torch.float64), torch.randint(0, 3, (examples,))


@pytest.fixture
def objective() -> fc.Objective:
    torch.manual_seed(0)
    return fc.Objective(tanh_net(), nn.CrossEntropyLoss(), data())


@pytest.mark.parametrize("mode", ["hessian", "ggn", "remainder"])
def test_standard_errors_are_those_of_independent_passes(objective: fc.Objective, mode: str):
    sweeps = sweeps_of(objective)
    assert isinstance(sweeps, ExampleSweeps)
    passes = [sweeps.probe(mode, objective.snapshot(), seed, 0, 4) for seed in range(256)]
    observed = torch.stack([p.mean for p in passes]).std(0)
    reported = torch.stack([p.variance for p in passes]).mean(0).sqrt()
    kept = observed > 1e-12
    assert ((reported / observed)[kept] - 1).abs().max() < 0.15


def test_the_same_probes_however_the_data_are_cut(objective: fc.Objective):
    x, y = data()
    torch.manual_seed(0)
    cut = fc.Objective(tanh_net(), nn.CrossEntropyLoss(), [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])])
    values = [
        fc.trace(fc.Hessian(o), method="example", seed=4, max_matvecs=8, rtol=1.0) for o in (objective, cut)
    ]
    assert values[0].value == pytest.approx(values[1].value, rel=1e-12)
    assert values[0].stderr == pytest.approx(values[1].stderr, rel=1e-9)


def test_examples_that_interact_share_their_probes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    objective = fc.Objective(model, nn.CrossEntropyLoss(), data(), allow_train_mode=True)
    assert "mixes the examples" in sweeps_of(objective)
    H = fc.Hessian(objective)
    with pytest.warns(
        FlatcoreWarning, match="mixes the examples of a batch; so all examples share their probes"
    ):
        estimate = fc.trace(H, method="example", rtol=0.2)
    assert estimate.method == "hutchinson"
    truth = float(dense(H).sum())
    assert abs(estimate.value - truth) <= 4 * estimate.stderr
    coupled = fc.Objective(tanh_net(), lambda z, y: nn.functional.cross_entropy(z - z.mean(0), y), data())
    assert "mixes the examples" in sweeps_of(coupled)
    squared = fc.Objective(tanh_net(), lambda z, y: nn.functional.cross_entropy(z, y) ** 2, data())
    assert isinstance(sweeps_of(squared), str)


def test_rows_of_other_examples_are_noticed():
    """An index that only the data know."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x))[order] + torch.tanh(self.one(x)))

    torch.manual_seed(0)
    x, y = data(6)
    model = Shuffled().double()
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), (x, torch.tensor([1, 0, 2, 3, 4, 5]), y)))
    truth = float(dense(H).sum())
    with pytest.warns(FlatcoreWarning, match="share their probes"):
        estimate = fc.trace(H, method="example", rtol=0.05)
    assert abs(estimate.value - truth) <= 4 * estimate.stderr
    assert estimate.method == "hutchinson"


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.LeakyReLU(0.1)])
def test_piecewise_linear_nets_are_exact(relu: nn.Module):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), relu, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    model = model.double().eval()
    batch = torch.randn(9, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (9,))
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), batch))
    truth = dense(H)
    estimate = fc.trace(H, method="exact")
    assert (estimate.method, estimate.stderr, estimate.matvecs) == ("exact", 0.0, 3)
    assert estimate.value == pytest.approx(float(truth.sum()), rel=1e-10)
    entries = fc.diagonal(H, method="exact")
    torch.testing.assert_close(entries.value, truth, rtol=1e-9, atol=1e-12)
    assert not entries.stderr.any()
    assert fc.trace(H).method == "exact"


def test_parameters_without_a_use_that_probes_stand_for_are_added():
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Linear(5, 4)
            self.c = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(x) @ (self.a @ self.a)))

    torch.manual_seed(1)
    H = fc.Hessian(fc.Objective(Left().double(), nn.CrossEntropyLoss(), data()))
    truth = dense(H)
    estimate = fc.trace(H, method="example", rtol=0.02)
    assert abs(estimate.value - float(truth.sum())) <= 4 * estimate.stderr
    assert estimate.by_parameter is not None
    assert set(estimate.by_parameter) == {"a", "b.weight", "b.bias", "c.weight", "c.bias"}
    for name, part in estimate.by_parameter.items():
        exact = float(truth[H.parameter_slices[name]].sum())
        assert abs(part.value - exact) <= 4 * part.stderr + 1e-12, name
    entries = fc.diagonal(H, method="example", rtol=0.1)
    assert ((entries.value - truth).abs() <= 6 * entries.stderr + 1e-12).all()


@pytest.mark.parametrize("kind", [fc.Hessian, fc.GGN])
def test_auto_takes_sums_over_outputs_near_a_minimum(kind):
    torch.manual_seed(0)
    model, batch = tanh_net(), data(60)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimiser.step()
    A = kind(fc.Objective(model, nn.CrossEntropyLoss(), batch))
    truth = dense(A)
    estimate = fc.trace(A, rtol=0.01)
    assert estimate.method == ("exact" if kind is fc.GGN else "ggn+example")
    assert abs(estimate.value - float(truth.sum())) <= 4 * estimate.stderr + 1e-10 * estimate.value
    assert estimate.stderr <= 0.01 * estimate.value


def test_relative_probes_give_relative_flatness(objective: fc.Objective):
    """sum_ss' <w_s, w_s'> tr H_ss' of each weight (Petzka et al. 2021)."""
    sweeps = sweeps_of(objective)
    assert isinstance(sweeps, ExampleSweeps)
    H = fc.Hessian(objective).to_dense()
    samples = sweeps.probe("hessian", objective.snapshot(), 0, 0, PROBES, relative=True)
    for i, name in enumerate(sweeps.probed):
        if not name.endswith("weight"):
            assert float(samples.mean[1 + i]) == 0
            continue
        W = objective.snapshot().values[name]
        part = objective.parameter_slices[name]
        blocks = H[part, part].reshape(*W.shape, *W.shape)
        traces = torch.einsum("saua->su", blocks)
        truth = float(((W @ W.T) * traces).sum())
        assert abs(float(samples.mean[1 + i]) - truth) <= 4 * float(samples.variance[1 + i].sqrt()), name


def test_relative_probes_leave_out_weights_with_several_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    objective = fc.Objective(Twice().double(), nn.CrossEntropyLoss(), data())
    sweeps = sweeps_of(objective)
    assert isinstance(sweeps, ExampleSweeps)
    assert sweeps.repeated == ("a.weight", "a.bias")
    samples = sweeps.probe("hessian", objective.snapshot(), 0, 0, 4, relative=True)
    assert float(samples.mean[1 + sweeps.probed.index("a.weight")]) == 0
    assert float(samples.mean[1 + sweeps.probed.index("b.weight")]) != 0


def test_arguments():
    with pytest.raises(ValueError, match="method: this operator offers auto, exact, hutchinson"):
        fc.trace(torch.eye(3), method="example")
    H = fc.Hessian(fc.Objective(tanh_net(), nn.CrossEntropyLoss(), data()))
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs or rtol"):
        assert fc.trace(H, method="example", max_matvecs=2, rtol=1e-6).status != "converged"


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss of the caller's own: there is no cut between it and the model."""
    return (model(batch[0]) - batch[1]).square().mean()


def times_a_mean(output: Tensor, target: Tensor) -> Tensor:
    """A product of two numbers: no axis that examples could lie along."""
    return nn.functional.mse_loss(output, target) * nn.functional.l1_loss(output, target)


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
@pytest.mark.parametrize("loss", [fc.ModelLoss(squares), times_a_mean], ids=["no cut", "product of numbers"])
def test_sums_where_there_is_no_cut_or_no_sum_over_examples(loss: object, method: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    data = (torch.randn(5, 8).double(), torch.randn(5, 2).double())
    H = fc.Hessian(fc.Objective(model, loss, data))
    diagonal = dense(H)
    for function, wanted in ((fc.trace, diagonal.sum()), (fc.diagonal, diagonal)):
        found = function(H, method=method, rtol=0.5, max_matvecs=400)
        error = (torch.as_tensor(found.value, dtype=torch.float64) - wanted).norm() / wanted.norm()
        # Of four standard errors; of rounding where there is none.
        allowed = 4 * torch.as_tensor(found.stderr, dtype=torch.float64).norm() / wanted.norm()
        assert error <= max(float(allowed), 1e-12)
        assert "exact" not in method or not allowed


def test_no_gauss_newton_matrix_without_a_cut():
    model = nn.Linear(8, 2)
    G = fc.GGN(fc.Objective(model, fc.ModelLoss(squares), (torch.randn(5, 8), torch.randn(5, 2))))
    for work in (fc.trace, fc.diagonal, lambda A: A @ torch.ones(18)):
        with pytest.raises(ValueError, match=r"^loss: the Gauss-Newton matrix needs a cut"):
            work(G)


class Mixed(nn.Module):
    """Rows of other examples come in through a buffer, or a parameter, that lets none through at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("A", torch.eye(5))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return self.A[: len(x), : len(x)] @ z + self.gate * z.mean(0)


@pytest.mark.filterwarnings("ignore::flatcore.errors.FlatcoreWarning")
@pytest.mark.parametrize("change", ["buffer", "parameter"])
def test_rows_that_begin_to_mix_are_noticed(change: str):
    torch.manual_seed(0)
    model = Mixed().double()
    objective = fc.Objective(
        model, nn.CrossEntropyLoss(), (torch.randn(5, 4).double(), torch.randint(3, (5,)))
    )
    C, v = fc.GradientCovariance(objective), torch.randn(objective.layout.size).double()
    C @ v
    with torch.no_grad():
        model.A.fill_(0.5) if change == "buffer" else model.gate.fill_(0.5)
    with pytest.raises(ValueError, match=r"^loss: the gradient covariance needs"):
        C @ v
    with torch.no_grad():
        model.A.copy_(torch.eye(5))
        model.gate.zero_()
    C @ v
