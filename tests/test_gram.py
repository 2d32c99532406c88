"""Functionals of Gauss-Newton matrices through their Gram matrices, held to all eigenvalues of the dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from case_transformers import LanguageModel
from reference import Reference
from torch import Tensor, nn

import flatcore as fc
from flatcore import gram
from flatcore.errors import FlatcoreWarning, NoRowsError
from flatcore.linear import as_full_operator
from flatcore.output_rows import OutputRows

Problem = tuple[nn.Module, Any, list[Any]]
SIZES = (5, 2)


def mlp(out: int = 4, *last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, out), *last)


def batches(target: Callable[[int], Tensor], width: int = 6) -> list[Any]:
    return [(torch.randn(n, width), target(n)) for n in SIZES]


def batch(target: Callable[[int], Tensor]) -> list[Any]:
    return batches(target)[:1]


def classes(n: int) -> Tensor:
    return torch.randint(4, (n,))


def tokens(weight: bool = False) -> Problem:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.flatten(), ignore_index=-100)

    data = []
    for n, length in ((2, 4), (1, 3)):
        text = torch.randint(7, (n, length))
        target = torch.randint(7, (n, length))
        target[0, 0] = -100
        data.append((text, target))
    return LanguageModel(tokens=7), loss, data


class Pixels(nn.Module):
    """Scores of classes along axis 1, as `cross_entropy` takes them for images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.unflatten(1, (2, 6)).unflatten(2, (6, 1)).expand(-1, -1, -1, 6))
        return out


class Two(nn.Module):
    """Two outputs, of which the loss reads both together, and one that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h), h.exp()


def in_place(z: Tensor, target: Tensor) -> Tensor:
    """A loss that writes into the model's output."""
    return z.sub_(target).square().mean()


def coupled(z: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return ((z[0].sum(1) * z[1].square().sum(1) - target) ** 2).mean()


def interacting(z: Tensor, target: Tensor) -> Tensor:
    """A loss that couples the examples of a batch."""
    return (z - z.mean(0) - target).square().mean() * z.square().mean()


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "cross-entropy": lambda: (mlp(), nn.CrossEntropyLoss(weight=torch.rand(4) + 0.5), batches(classes)),
    "probabilities": lambda: (
        mlp(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        batch(lambda n: torch.rand(n, 4).softmax(1)),
    ),
    "log-probabilities": lambda: (mlp(4, nn.LogSoftmax(dim=1)), nn.NLLLoss(), batch(classes)),
    "squares": lambda: (mlp(), nn.MSELoss(), batches(lambda n: torch.randn(n, 4))),
    "one number": lambda: (mlp(1, nn.Flatten(0)), nn.MSELoss(), batch(torch.randn)),
    "binary": lambda: (mlp(), nn.BCEWithLogitsLoss(), batches(lambda n: torch.rand(n, 4))),
    "tokens": tokens,
    "pixels": lambda: (Pixels(), nn.CrossEntropyLoss(), batches(lambda n: torch.randint(3, (n, 2, 2)), 12)),
    "two outputs": lambda: (Two(), coupled, batch(torch.randn)),
    "batch statistics": lambda: (
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 2)),
        nn.MSELoss(),
        batches(lambda n: torch.randn(n, 2))[:2],
    ),
    "interacting": lambda: (mlp(), interacting, batch(lambda n: torch.randn(n, 4))),
    "model loss": lambda: (
        mlp(),
        fc.ModelLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])),
        batch(classes),
    ),
    "in place": lambda: (mlp(), in_place, batch(lambda n: torch.randn(n, 4))),
    "no curvature": lambda: (mlp(), lambda z, y: (z * y).mean(), batch(lambda n: torch.randn(n, 4))),
}
INDEFINITE = ("two outputs",)


def problem(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> fc.GGN:
    torch.manual_seed(1)
    model, loss, data = PROBLEMS[name]()
    model = model.to(dtype)
    if isinstance(loss, nn.Module):
        loss = loss.to(dtype)
    data = [tuple(t.to(dtype) if t.is_floating_point() else t for t in part) for part in data]
    train = name == "batch statistics"
    return fc.GGN(fc.Objective(model.train(train), loss, data, allow_train_mode=train, **options))


def spectrum(A: Any) -> np.ndarray:
    dense = A.to_dense().double().numpy()
    return np.linalg.eigvalsh((dense + dense.T) / 2)


def rounding(values: np.ndarray, dtype: torch.dtype = torch.float64) -> float:
    """Both matrices are sums of P or of nC terms, with rounding errors of eps |A| each."""
    return torch.finfo(dtype).eps * len(values) * float(np.abs(values).max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_eigenvalues(name: str) -> None:
    A = problem(name)
    found = gram.gram_of(A, as_full_operator(A), asked=True)
    assert found is not None
    values, true = found.eigenvalues(), spectrum(A)
    assert (true.min() < -1e-3 * true.max()) == (name in INDEFINITE)
    assert len(values) == A.shape[0]
    assert np.abs(values - true).max() <= rounding(true)
    trace, square = found.power_sums()
    assert trace == pytest.approx(true.sum(), abs=len(true) * rounding(true))
    assert square == pytest.approx((true**2).sum(), rel=1e-10)
    # A zero for every parameter beyond the outputs, and for every output without curvature.
    rank = int((np.abs(values) > rounding(true)).sum())
    assert rank <= found.rows.extent.most < len(values)


def test_against_a_jacobian() -> None:
    """Nothing of flatcore in the twin: J by torch.func, the curvature of the cross-entropy written down."""
    torch.manual_seed(2)
    model, data = mlp().double(), (torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,)))
    A = fc.GGN(fc.Objective(model, nn.CrossEntropyLoss(), data))
    reference = Reference(model, nn.CrossEntropyLoss(), data, "output_target")
    J = torch.func.jacrev(reference.output)(reference.flat)  # (7, 4, P)
    p = reference.output(reference.flat).softmax(1).detach()
    S = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 7
    x = np.linalg.eigvalsh(torch.einsum("ncp,ncd,ndq->pq", J, S, J).detach().numpy())
    for call, true in functionals(x):
        estimate = call(A, method="gram")
        assert estimate.value == pytest.approx(true, rel=1e-9)
        assert (estimate.stderr, estimate.status, estimate.method) == (0, "converged", "gram")
        assert estimate.matvecs == 1


def functionals(x: np.ndarray) -> list[tuple[Callable[..., Any], float]]:
    d = 1e-3
    return [
        (lambda A, **k: fc.logdet(A, d, **k), np.log(x + d).sum()),
        (lambda A, **k: fc.soft_rank(A, d, **k), (x / (x + d)).sum()),
        (lambda A, **k: fc.effective_dimension(A, d, **k), (x / (x + d)).sum()),
        (lambda A, **k: fc.schatten(A, 1.5, **k), (np.abs(x) ** 1.5).sum() ** (1 / 1.5)),
        (lambda A, **k: fc.functional(A, np.exp, **k), np.exp(x).sum()),
        (fc.frobenius, math.sqrt((x**2).sum())),
        (fc.participation_ratio, x.sum() ** 2 / (x**2).sum()),
    ]


def test_float32() -> None:
    """Eigenvalues of float32 rows are those of the float64 net to float32's rounding, and the rank is bounded."""
    A, exact = problem("tokens", torch.float32), problem("tokens")
    found = gram.gram_of(A, as_full_operator(A), asked=True)
    assert found is not None
    true = spectrum(exact)
    assert np.abs(found.eigenvalues() - true).max() <= rounding(true, torch.float32)
    damping = 64 * torch.finfo(torch.float32).eps * true.max()  # the least that is beyond rounding
    rank = fc.soft_rank(A, damping, method="gram").value
    assert rank <= min(found.rows.extent.most, A.shape[0])
    assert rank == pytest.approx((true / (true + damping)).sum(), rel=1e-3)


def test_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit are computed again, and products are taken in strips and panels, to the same matrix."""
    A = problem("cross-entropy")
    found = gram.gram_of(A, as_full_operator(A), asked=True)
    assert found is not None
    whole = found._matrix()
    monkeypatch.setattr(gram, "_STRIP", 2)
    monkeypatch.setattr(gram, "_PANEL", 200)
    K, _ = found._matrix()
    assert np.abs(K - whole[0]).max() <= rounding(whole[0])
    units = []
    monkeypatch.setattr(OutputRows, "_rows", lambda *a, old=OutputRows._rows: units.append(1) or old(*a))
    for rows, swept in ((9, 7 + 4 + 1), (4, sum(range(1, 8)))):
        units.clear()
        free = 2 * (3 * 8 * found.rows.extent.most**2 + (rows + 4) * A.shape[0] * 8)
        monkeypatch.setattr(gram, "free_bytes", lambda device, free=free: free)
        K, signs = found._matrix()
        assert len(units) == swept  # 3 rows a unit
        assert np.abs(K - whole[0]).max() <= rounding(whole[0])
        assert np.array_equal(signs, whole[1])


def test_through_autograd_and_without_vectorised_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * (1.0 - float(g.sum().isnan().item()))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(self.layers(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    A = fc.GGN(
        fc.Objective(Net().double(), nn.MSELoss(), (torch.randn(5, 6).double(), torch.rand(5, 4).double()))
    )
    with pytest.warns(FlatcoreWarning, match="through torch autograd"):
        true = spectrum(A)
    found = gram.gram_of(A, as_full_operator(A), asked=True)
    assert found is not None
    assert np.abs(found.eigenvalues() - true).max() <= rounding(true)
    assert not found.rows._batched


def test_chosen_by_cost() -> None:
    """At once where that is 64 products' worth, later where sampling to rtol would cost more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 2))
    for n, rtol, method in (
        (2, 0.05, "gram"),
        (64, 0.2, "stochastic Lanczos quadrature"),
        (64, 1e-4, "gram"),
    ):
        A = fc.GGN(fc.Objective(net, nn.MSELoss(), (torch.randn(n, 40), torch.randn(n, 2))))
        estimate = fc.soft_rank(A, 1e-3, rtol=rtol)
        assert estimate.method == method
    assert estimate.matvecs > 1  # the samples that showed it
    assert fc.soft_rank(A, 1e-3, method="exact").method == "gram"
    x = spectrum(A)
    assert estimate.value == pytest.approx((x / (x + 1e-3)).sum(), rel=1e-4)


def test_rows_that_are_not_the_operators_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    A = problem("squares")
    true = fc.soft_rank(A, 1e-3, method="gram").value
    pull = OutputRows._pull
    monkeypatch.setattr(OutputRows, "_pull", lambda self, *a: 1.001 * pull(self, *a))
    with pytest.raises(NoRowsError, match=r"differs from A's by 0\.00"):
        fc.soft_rank(A, 1e-3, method="gram")
    with pytest.warns(FlatcoreWarning, match='soft_rank: not by method "gram"'):
        estimate = fc.soft_rank(A, 1e-3, method="exact")
    assert estimate.method == "exact"
    assert estimate.value == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fc.Hessian(problem("squares").objective), r"A \(Hessian\) is known by its products"),
        (lambda: torch.eye(5), r"A \(Tensor\) is known"),
        (
            lambda: fc.GGN(fc.Objective(nn.Linear(2, 3), nn.MSELoss(), (torch.rand(3, 2), torch.rand(3, 3)))),
            r"the model has 9 outputs on all data, no fewer than the P = 9 parameters",
        ),
        (
            lambda: fc.GGN(
                fc.Objective(
                    mlp(),
                    fc.ModelLoss(lambda m, b: m(b[0]).square().mean() * 2),
                    (torch.randn(3, 6), torch.rand(3)),
                )
            ),
            "needs a cut between model and loss",
        ),
    ],
)
def test_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        fc.frobenius(make(), method="gram")
    assert "\n" not in str(caught.value)


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "free_bytes", lambda device: 10_000)
    with pytest.raises(
        ValueError, match=r"the Gram matrix of 28 outputs takes .* more than half of what is free"
    ):
        fc.logdet(problem("squares"), 1.0, method="gram")
    assert fc.logdet(problem("squares"), 1.0).method != "gram"


def test_a_singular_matrix_is_not_told_to_become_a_ggn() -> None:
    with pytest.raises(ValueError, match=r"raise damping$"):
        fc.logdet(problem("squares"), 0.0, method="gram")


def test_in_inference_mode() -> None:
    A = problem("cross-entropy")
    with torch.inference_mode():
        inside = fc.soft_rank(A, 0.1, method="gram").value
    assert inside == fc.soft_rank(A, 0.1, method="gram").value
