"""Normalisation by the batch's own statistics, where the user asks for it: right, native, and buffers untouched.

The reference is the dense float64 operator by torch.func of the same model without running statistics to update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from reference import Reference
from torch import Tensor, nn
from untouched import untouched

import flatcore as fc
from flatcore.cli import main
from flatcore.errors import CaptureError, FlatcoreWarning

CE = nn.CrossEntropyLoss()
NORMS = nn.modules.batchnorm._NormBase


class Block(nn.Module):
    """A residual block; the momentum None and the missing affine part are among its layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels, momentum=None)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, affine=False, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x))))) + x)


class Twice(nn.Module):
    """One normalisation layer called twice, on inputs of different statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 5), nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=0.3)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.second(torch.tanh(self.norm(self.first(x)))))))


class ByHand(nn.Module):
    """Normalises with the function, and keeps running statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(F.batch_norm(self.first(x), self.mean, self.var, training=self.training)))


def images(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *layers, nn.Flatten(), nn.Linear(48, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        (7, 4),
    ),
    "sequences": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
        ),
        (5, 2, 5),
    ),
    "images": (lambda: images(nn.BatchNorm2d(3, eps=0.1), nn.SiLU()), (5, 2, 4, 4)),
    "volumes": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm3d(4), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        (3, 4, 2, 2, 2),
    ),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Block(3), nn.Flatten(), nn.Linear(48, 3)),
        (5, 2, 4, 4),
    ),
    "twice": (Twice, (6, 4)),
    "output": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (7, 4)),
    "input": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (7, 4)),
    "across processes": (lambda: images(nn.SyncBatchNorm(3), nn.SiLU()), (5, 2, 4, 4)),
    "per example": (
        lambda: images(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
        (5, 2, 4, 4),
    ),
    "by the function": (ByHand, (7, 4)),
    "without statistics": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3)
        ),
        (7, 4),
    ),
}


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = make()
        with torch.no_grad():  # no term shall vanish because a bias is zero or a scale is one
            for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.add_(0.3 * torch.rand_like(tensor))
        batch = torch.randn(shape, dtype=dtype), torch.randint(3, shape[:1])
    return model.to(dtype).train(), batch


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Reference:
    """Of a copy whose layers have no running statistics, and so nothing to update."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, NORMS):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
        if isinstance(module, ByHand):
            module.mean = module.var = None
    dense = Reference(plain, CE, batch, "output_target")
    assert torch.equal(dense(dense.flat), CE(copy.deepcopy(model)(batch[0]), batch[1]))
    return dense


def no_program(*args: object, **options: object) -> None:
    raise CaptureError("for a test")


def check(model: nn.Module, batch: tuple[Tensor, Tensor], backend: str) -> None:
    dense = reference(model, batch)
    with untouched(model, *batch):
        objective = fc.Objective(model, CE, batch, allow_train_mode=True)
        assert objective.loss() == pytest.approx(float(dense(dense.flat)), rel=1e-13)
        for operator, expected in ((fc.Hessian, dense.hessian()), (fc.GGN, dense.ggn())):
            A = operator(objective)
            for K in (1, 3):
                V = torch.randn(
                    A.shape[0], K, dtype=torch.float64, generator=torch.Generator().manual_seed(K)
                )
                torch.testing.assert_close(
                    A @ V, expected @ V, rtol=0, atol=1e-10 * float((expected @ V).abs().max())
                )
            assert A.plan().backend == backend
            assert A.plan().native_fraction == float(backend == "native")


@pytest.mark.parametrize("name", MODELS)
def test_products(name: str) -> None:
    check(*built(name), "native")


@pytest.mark.parametrize("name", ["rows", "residual", "twice", "by the function"])
def test_products_through_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatcore.native.capture", no_program)
    with pytest.warns(FlatcoreWarning, match="for a test"):
        check(*built(name), "autograd")


@pytest.mark.parametrize("name", ["rows", "residual"])
def test_single_precision(name: str) -> None:
    """At most twice the error of autograd in float32, both measured against float64 at the same parameters."""
    model, (x, y) = built(name, torch.float32)
    V = torch.randn(sum(p.numel() for p in model.parameters()), 3, generator=torch.Generator().manual_seed(0))
    H = fc.Hessian(fc.Objective(model, CE, (x, y), allow_train_mode=True))
    single = reference(model, (x, y)).hessian() @ V
    exact = reference(copy.deepcopy(model).double(), (x.double(), y)).hessian() @ V.double()
    ours, theirs = (float((product - exact).norm() / exact.norm()) for product in (H @ V, single))
    assert ours <= max(2 * theirs, 2e-6)


def test_several_batches_are_the_mean_of_their_losses() -> None:
    model, (x, y) = built("rows")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    one = fc.Objective(model, CE, (x, y), allow_train_mode=True)
    two = fc.Objective(model, CE, batches, allow_train_mode=True)
    parts = [reference(model, batch) for batch in batches]
    assert two.loss() == pytest.approx(sum(len(p.batch[1]) * float(p(p.flat)) for p in parts) / 7, rel=1e-13)
    assert abs(one.loss() - two.loss()) > 1e-3  # the examples interact within a batch alone
    expected = sum(len(p.batch[1]) * p.hessian() for p in parts) / 7
    torch.testing.assert_close(fc.Hessian(two).to_dense(), expected, rtol=0, atol=1e-10)


def test_estimators_leave_everything_as_it_is() -> None:
    model, batch = built("residual")
    exact = reference(model, batch).hessian()
    with untouched(model, *batch):
        objective = fc.Objective(model, CE, batch, allow_train_mode=True)
        H = fc.Hessian(objective)
        top = fc.eigsh(H, 2, which="LA", tol=1e-8)
        torch.testing.assert_close(
            top.values.sort().values, torch.linalg.eigvalsh(exact)[-2:], rtol=1e-6, atol=0
        )
        assert fc.trace(H, method="exact").value == pytest.approx(float(exact.trace()), rel=1e-9)
        torch.testing.assert_close(
            fc.diagonal(H, method="exact").value, exact.diagonal(), rtol=1e-9, atol=1e-12
        )
        fc.spectral_density(H, probes=2, steps=10)
        held_out = batch[0].flip(0)[:3].contiguous(), batch[1].flip(0)[:3].contiguous()
        report = fc.report(objective, k=1, rtol=0.5, test=held_out)
    assert report.native_fraction == 1
    assert report.test.loss == pytest.approx(CE(copy.deepcopy(model)(held_out[0]), held_out[1]).item())


def test_a_change_of_mode_is_noticed() -> None:
    """In eval mode the layer normalises by other numbers, so it is another program and another loss."""
    model, batch = built("rows")
    objective = fc.Objective(model, CE, batch, allow_train_mode=True)
    H = fc.Hessian(objective)
    torch.testing.assert_close(H.to_dense(), reference(model, batch).hessian(), rtol=0, atol=1e-10)
    evaluated = Reference(model.eval(), CE, batch, "output_target")
    torch.testing.assert_close(H.to_dense(), evaluated.hessian(), rtol=0, atol=1e-10)
    assert objective.loss() == pytest.approx(float(evaluated(evaluated.flat)))
    covariance = fc.GradientCovariance(objective, centered=False)
    torch.testing.assert_close(covariance.to_dense(), evaluated.covariance(7), rtol=0, atol=1e-10)
    model.train()
    with pytest.raises(ValueError, match=r"do not interact, got '1' \(BatchNorm1d\) in train mode"):
        covariance @ torch.ones(H.shape[0], dtype=torch.float64)


def test_a_training_step_is_noticed() -> None:
    model, batch = built("images")
    H = fc.Hessian(fc.Objective(model, CE, batch, allow_train_mode=True))
    H.to_dense()
    CE(model(batch[0]), batch[1]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(H.to_dense(), reference(model, batch).hessian(), rtol=0, atol=1e-10)


def test_without_running_statistics_in_eval_mode() -> None:
    """Such a layer normalises by the batch in either mode; that needs no leave."""
    model, batch = built("without statistics")
    H = fc.Hessian(fc.Objective(model.eval(), CE, batch))
    assert H.plan().native_fraction == 1
    torch.testing.assert_close(H.to_dense(), reference(model, batch).hessian(), rtol=0, atol=1e-10)


FACTORY = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(11, 4), torch.randint(3, (11,)))
"""


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    refused = CliRunner().invoke(main, ["plan", f"{path}:factory"])
    assert refused.exit_code == 2
    assert "in train mode: '1' (BatchNorm1d)" in refused.output
    for command in (["plan"], ["spectrum", "-k", "1"], ["report", "--rtol", "0.5", "--out", str(tmp_path)]):
        done = CliRunner().invoke(main, [*command, f"{path}:factory", "--allow-train-mode"])
        assert done.exit_code == 0, done.output


# --- what is refused ---


def test_covariance_of_examples_that_interact() -> None:
    objective = fc.Objective(*((m := built("rows"))[0], CE, m[1]), allow_train_mode=True)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) in train mode.*no example has a gradient"):
        fc.GradientCovariance(objective)


class Centred(nn.Linear):
    """Makes the examples interact in a way that no layer's name gives away."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(super().forward(x))
        return y / y.square().mean(0).sqrt()


@pytest.mark.parametrize("native", [True, False])
def test_covariance_of_examples_that_interact_in_a_function(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("flatcore.native.capture", no_program)
    model, batch = Centred(4, 3), (torch.randn(5, 4), torch.arange(5) % 3)
    covariance = fc.GradientCovariance(fc.Objective(model, CE, batch))
    with (
        pytest.warns(FlatcoreWarning, match="other rows" if native else "for a test"),
        pytest.raises(ValueError, match="a loss that is the mean over the examples"),
    ):
        covariance @ torch.ones(covariance.shape[0])


def test_covariance_of_instance_normalisation() -> None:
    """It normalises every example by itself, in train mode too."""
    model, batch = built("per example")
    covariance = fc.GradientCovariance(fc.Objective(model, CE, batch, allow_train_mode=True), centered=False)
    torch.testing.assert_close(
        covariance.to_dense(), reference(model, batch).covariance(5), rtol=0, atol=1e-10
    )


def test_dropout_stays_refused() -> None:
    model, batch = built("rows")
    model.add_module("drop", nn.Dropout(0.25))
    with pytest.raises(
        ValueError, match=r"got layers in train mode: 'drop' \(Dropout, p = 0\.25\); call eval\(\)"
    ):
        fc.Objective(model, CE, batch, allow_train_mode=True)
    model.drop.p = 0.0
    assert fc.Hessian(fc.Objective(model, CE, batch, allow_train_mode=True)).plan().native_fraction == 1


class RandomInTrainMode(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=self.training)


def test_a_loss_that_becomes_random() -> None:
    model = RandomInTrainMode(4, 3).eval()
    H = fc.Hessian(fc.Objective(model, CE, (torch.randn(5, 4), torch.arange(5) % 3)))
    model.train()
    with pytest.raises(ValueError, match="same loss from two evaluations"):
        H @ torch.ones(H.shape[0])


class Counter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_other_buffers_may_not_change() -> None:
    objective = fc.Objective(Counter(), CE, (torch.randn(5, 4), torch.arange(5) % 3), allow_train_mode=True)
    with pytest.warns(FlatcoreWarning, match="changes 'calls'"):
        assert fc.Hessian(objective).plan().backend == "autograd"


def test_the_way_out_is_named() -> None:
    model, batch = built("rows")
    with pytest.raises(
        ValueError, match=r"'1' \(BatchNorm1d\); call model\.eval\(\), or pass allow_train_mode"
    ):
        fc.Objective(model, CE, batch)


def test_one_row_is_too_few() -> None:
    model, (x, y) = built("rows")
    with pytest.raises(ValueError, match=r"rejected batch 0.*more than 1 value per channel"):
        fc.Objective(model, CE, (x[:1], y[:1]), allow_train_mode=True)
