"""Hessian, GGN and GradientCovariance against dense references by torch.func in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from untouched import one_thread, untouched

import flatcore as fc
from flatcore import native
from flatcore.errors import CaptureError, FlatcoreWarning
from flatcore.vectors import to_rows

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

# float64 against torch.func: both are backward stable, the models have a few layers of a few dozen terms.
RTOL = 1e-10

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.BatchNorm2d(2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


def classes(n: int) -> Tensor:
    return torch.randint(0, 3, (n,))


def ignoring(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 1, -100, classes(n))


def values(n: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64)


# name -> model, loss, targets
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "mlp-ce": (mlp, nn.CrossEntropyLoss(), classes),
    "mlp-mse": (mlp, nn.MSELoss(), values),
    "mlp-ignore": (mlp, F.cross_entropy, ignoring),
    "mlp-weighted": (mlp, nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 2.5]).double()), classes),
    "cnn-ce": (cnn, nn.CrossEntropyLoss(), classes),
    "tied-ce": (Tied, nn.CrossEntropyLoss(), classes),
}
SIZES = (5, 2, 5)
OPERATORS = [fc.Hessian, fc.GGN, fc.GradientCovariance]


def build(name: str, sizes: Sequence[int] = SIZES) -> tuple[nn.Module, Callable[..., Tensor], list[Batch]]:
    torch.manual_seed(0)
    make, loss, targets = PROBLEMS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, loss, [(torch.randn(n, 4, dtype=torch.float64), targets(n)) for n in sizes]


def joined(batches: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def flat_parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflatten(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def reference(operator: type, model: nn.Module, loss: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The dense matrix from one batch with every example, by torch.func, reverse over reverse."""
    x, y = batch
    model = copy.deepcopy(model)  # torch's functional_call leaves its tensors in a module with two names
    flat = flat_parameters(model)

    def output(flat: Tensor, x: Tensor = x) -> Tensor:
        return functional_call(model, unflatten(model, flat), (x,))

    if operator is fc.Hessian:
        return jacrev(grad(lambda flat: loss(output(flat), y)), chunk_size=1)(flat)
    z = output(flat).detach()
    J = jacrev(output, chunk_size=1)(flat).flatten(0, -2)
    if operator is fc.GGN:
        return J.T @ jacrev(grad(lambda z: loss(z.view(-1, 3), y)), chunk_size=1)(z.reshape(-1)) @ J
    n = len(x)
    dz = grad(lambda z: loss(z, y))(z)
    g = n * torch.einsum("nc,ncp->np", dz, J.view(n, -1, J.shape[1]))
    centred = g - g.mean(0)
    return centred.T @ centred / n


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= RTOL * expected.abs().max()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_batch_against_torch_func(name: str, operator: type) -> None:
    model, loss, batches = build(name)
    batch = joined(batches)
    A = operator(fc.Objective(model, loss, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = A.to_dense()
    assert A.plan().native_fraction == 1
    assert_close(dense, reference(operator, model, loss, batch))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_ragged_batches_equal_one_big_batch(name: str, operator: type) -> None:
    model, loss, batches = build(name)
    objective = fc.Objective(model, loss, batches)
    assert objective.examples == sum(SIZES)
    assert sum(objective.weights) == pytest.approx(1)
    assert_close(operator(objective).to_dense(), reference(operator, model, loss, joined(batches)))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_autograd_against_torch_func(name: str, operator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batches = build(name)
    A = without_engine(monkeypatch, operator, fc.Objective(model, loss, batches))
    assert A.plan().native_fraction == 0
    assert_close(A.to_dense(), reference(operator, model, loss, joined(batches)))


def without_engine(monkeypatch: pytest.MonkeyPatch, operator: type, objective: fc.Objective) -> fc.Hessian:
    def refuse(*_: object, **__: object) -> None:
        raise CaptureError("not today")

    monkeypatch.setattr(native, "capture", refuse)
    A = operator(objective)
    with pytest.warns(FlatcoreWarning, match="not today"):
        A.plan()
    return A


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_loss_of_model_and_batch_gives_the_same(operator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batches = build("mlp-ignore")
    expected = operator(fc.Objective(model, loss, batches)).to_dense()
    by_model = fc.ModelLoss(lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    mappings = [{"x": x, "y": y} for x, y in batches]
    assert_close(operator(fc.Objective(model, by_model, mappings)).to_dense(), expected)
    A = without_engine(monkeypatch, operator, fc.Objective(model, by_model, mappings))
    assert_close(A.to_dense(), expected)


@pytest.mark.parametrize("backend", ["native", "autograd"])
def test_hf_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batches = build("mlp-ce")

    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor, labels: Tensor) -> Output:
            return Output(loss(self.body(x), labels))

    data = [{"x": x, "labels": y} for x, y in batches]
    objective = fc.Objective(Labelled(), fc.hf_loss(), data)
    A = fc.GGN(objective) if backend == "native" else without_engine(monkeypatch, fc.GGN, objective)
    assert_close(A.to_dense(), reference(fc.GGN, model, loss, joined(batches)))


@pytest.mark.parametrize("centered", [True, False])
def test_covariance_centred_or_not_differs_by_the_mean_gradient(centered: bool) -> None:
    model, loss, batches = build("mlp-ce")
    objective = fc.Objective(model, loss, batches)
    x, y = joined(batches)
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
    expected = reference(fc.GradientCovariance, model, loss, (x, y)) + (0 if centered else torch.outer(g, g))
    assert_close(fc.GradientCovariance(objective, centered=centered).to_dense(), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_symmetric_columns_independent_and_repeatable(operator: type) -> None:
    model, loss, batches = build("mlp-ce")
    A = operator(fc.Objective(model, loss, batches))
    V = torch.randn(A.shape[0], 7, dtype=A.dtype)
    Y = A @ V
    dense = A.to_dense()
    assert_close(dense, dense.T)
    assert_close(Y, dense @ V)
    for k in range(7):
        assert_close(A @ V[:, k], Y[:, k])
    assert torch.equal(A @ V, Y)
    assert torch.equal(operator(fc.Objective(model, loss, batches)) @ V, Y)
    assert (A @ torch.full((A.shape[0], 1), float("nan"), dtype=A.dtype)).isnan().any()
    assert torch.equal(A @ V, Y), "a product left something behind"


def test_forms_of_vectors() -> None:
    model, loss, batches = build("cnn-ce")
    H = fc.Hessian(fc.Objective(model, loss, batches))
    dense, P = H.to_dense(), H.shape[0]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    V = torch.randn(P, 3, dtype=H.dtype)
    mapping = {name: V[part].reshape(*shapes[name], 3) for name, part in H.parameter_slices.items()}
    single = {name: block[..., 1].contiguous() for name, block in mapping.items()}
    Y = H @ V
    assert Y.shape == (P, 3)
    assert Y.stride() == (1, P)
    assert_close(Y, dense @ V)
    for name, block in (H @ mapping).items():
        assert torch.equal(block, Y[H.parameter_slices[name]].reshape(*shapes[name], 3))
    for name, block in (H @ single).items():
        assert block.shape == shapes[name]
        assert_close(block.reshape(-1), (dense @ V[:, 1])[H.parameter_slices[name]])
    assert (H @ V[:, :0]).shape == (P, 0)
    strided = torch.randn(P, 6, dtype=H.dtype)[:, ::2]
    assert_close(H @ strided, dense @ strided)
    padded = torch.randn(3, P + 5, dtype=H.dtype)[:, :P].T  # columns contiguous, a gap between them
    assert_close(H @ padded, dense @ padded)
    one = torch.randn(P, 1, dtype=H.dtype).expand(P, 3)
    assert_close(H @ one, dense @ one)
    assert_close(H @ V.requires_grad_(), dense @ V.detach())
    with torch.inference_mode():
        assert_close(H @ V.detach().clone(), dense @ V.detach())


def test_columns_stored_one_after_another_are_not_copied() -> None:
    model, loss, batches = build("mlp-ce")
    layout = fc.Objective(model, loss, batches).layout
    V = torch.randn(3, layout.size, dtype=torch.float64).T
    rows, restore = to_rows(V, layout, 0)
    assert rows.data_ptr() == V.data_ptr()
    assert restore(rows).stride() == (1, layout.size)


def test_to_scipy_and_attributes() -> None:
    model, loss, batches = build("mlp-ce")
    H = fc.Hessian(fc.Objective(model, loss, batches))
    P = H.shape[0]
    assert H.shape == (P, P) == (len(flat_parameters(model)),) * 2
    assert H.dtype == torch.float64
    assert H.device == torch.device("cpu")
    assert list(H.parameter_slices) == [name for name, _ in model.named_parameters()]
    wrapped = H.to_scipy()
    dense = H.to_dense().numpy()
    V = np.random.default_rng(0).standard_normal((P, 2))
    np.testing.assert_allclose(wrapped @ V, dense @ V, rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(wrapped.T @ V[:, 0], dense @ V[:, 0], rtol=RTOL, atol=RTOL)
    top = eigsh(wrapped, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), np.linalg.eigvalsh(dense)[-2:], rtol=1e-8)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [1, 20_000, None])
def test_a_memory_budget_changes_no_number(operator: type, memory: int | None) -> None:
    model, loss, batches = build("mlp-ce")
    objective = fc.Objective(model, loss, batches, memory=memory)
    V = torch.randn(objective.layout.size, 9, dtype=torch.float64)
    A = operator(objective)
    assert_close(A @ V, reference(operator, model, loss, joined(batches)) @ V)
    assert torch.equal(A @ V, A @ V)
    if memory == 1:
        assert A.plan().directions == 1


def test_plan_counts() -> None:
    model, loss, batches = build("mlp-ce")
    H = fc.Hessian(fc.Objective(model, loss, batches))
    plan = H.plan()
    assert plan.flops(4) == pytest.approx(4 * plan.flops(1), rel=0.05)
    assert plan.flops(1) == pytest.approx(sum(row.flops for row in plan.rows))
    assert 0 < plan.peak_bytes(1) < plan.peak_bytes(8)
    assert [row.kind for row in plan.rows if row.path == "0"] == ["linear"]
    for word in ("native", "linear", "cross_entropy", f"{len(flat_parameters(model))}"):
        assert word in str(plan)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["native", "autograd"])
def test_nothing_of_the_users_changes(operator: type, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batches = build("cnn-ce")
    model.register_forward_hook(lambda *_: None)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with untouched(model, *(t for batch in batches for t in batch)):
        objective = fc.Objective(model, loss, batches)
        A = operator(objective) if backend == "native" else without_engine(monkeypatch, operator, objective)
        P = A.shape[0]
        A @ torch.ones(P, dtype=A.dtype)
        A @ torch.ones(P, 3, dtype=A.dtype)
        A.to_dense()
        str(A.plan())
        A.to_scipy() @ np.ones(P)
        objective.loss()
        repr(A)
