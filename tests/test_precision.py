"""Products with operands rounded to bfloat16: which numbers are rounded, how far off they are, what is said of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import flatcore as fc
from flatcore import precision
from flatcore._C import engine, krylov
from flatcore.bench.memory import peak_bytes

available = pytest.mark.skipif(
    not engine.bf16_available(), reason="the processor has no instructions for bfloat16"
)
OPERATORS = [fc.Hessian, fc.GGN, fc.GradientCovariance]

# Of bfloat16: 8 bits, so a rounded number is off by half a unit in the last of them.
UNIT = 2.0**-8
EXAMPLES, INPUTS, HIDDEN, CLASSES = 64, 70, 96, 80
# A product with a direction passes at most four matrix products of this net, two forward and two back, each with two
# rounded operands.
FACTORS = 8


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*layers))[:-1]


def problem(*sizes: int, dtype: torch.dtype = torch.float32) -> fc.Objective:
    sizes = sizes or (INPUTS, HIDDEN, CLASSES)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, sizes[0], generator=random).to(dtype)
    y = torch.randint(sizes[-1], (EXAMPLES,), generator=random)
    return fc.Objective(net(*sizes).to(dtype), nn.CrossEntropyLoss(), (x, y))


def directions(A: fc.Hessian, K: int = 3) -> Tensor:
    return torch.randn(K, A.shape[0], generator=torch.Generator().manual_seed(2)).to(A.dtype).T


def twin(operator: type, objective: fc.Objective, v: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The product written out for two layers, in float64, each operand of a matrix product through `rounded`."""

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return rounded(a) @ rounded(b)

    parts = {name: t.double() for name, t in objective.layout.split(v).items()}
    V1, b1, V2, b2 = parts["0.weight"], parts["0.bias"], parts["2.weight"], parts["2.bias"]
    W1, W2 = (objective.parameters[f"{i}.weight"].detach().double() for i in (0, 2))
    c1, c2 = (objective.parameters[f"{i}.bias"].detach().double() for i in (0, 2))
    batch = next(iter(objective.batches())).batch
    x, y = batch[0].double(), batch[1]
    h = torch.tanh(x @ W1.T + c1)
    p = torch.softmax(h @ W2.T + c2, 1)
    dz = (p - F.one_hot(y, CLASSES)) / EXAMPLES
    slope, dh = 1 - h * h, dz @ W2
    second = float(operator is fc.Hessian)  # the terms that hold a second derivative of the model

    th = slope * (mm(x, V1.T) + b1)
    tz = mm(th, W2.T) + mm(h, V2.T) + b2
    if operator is fc.GradientCovariance:
        tdz = EXAMPLES * dz * (dz * tz).sum(1, keepdim=True)
    else:
        tdz = p * (tz - (p * tz).sum(1, keepdim=True)) / EXAMPLES
    tdh = mm(tdz, W2) + second * mm(dz, V2)
    curve = -2 * h * slope * (mm(x, V1.T) + b1)
    tda = slope * tdh + second * curve * dh
    Y2 = mm(tdz.T, h) + second * mm(dz.T, th)
    Y1 = mm(tda.T, x)
    return torch.cat([Y1.flatten(), tda.sum(0), Y2.flatten(), tdz.sum(0)])


def made(operator: type, objective: fc.Objective, **options: str) -> fc.Hessian:
    """Without the mean gradient, which no precision touches."""
    if operator is fc.GradientCovariance:
        return operator(objective, centered=False, **options)
    return operator(objective, **options)


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operands_of_products_are_rounded_and_nothing_else(operator: type) -> None:
    """The twin rounds in float64 what the engine rounds in float32. Errors of 2^-22 put some 2^-13 of the operands on
    the other side of a tie, which moves a result by the square root of that times a unit.
    """
    objective = problem()
    full, lower = made(operator, objective), made(operator, objective, precision="bf16")
    V = directions(full)
    exact, bf16 = full @ V, lower @ V
    for k in range(V.shape[1]):
        plain = twin(operator, objective, V[:, k], lambda t: t)
        rounded = twin(operator, objective, V[:, k], lambda t: t.bfloat16().double())
        assert relative(exact[:, k], plain) < 1e-5
        assert relative(bf16[:, k], rounded) < UNIT / 90
        assert UNIT / 8 < relative(rounded, plain) < FACTORS * UNIT


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_error_is_that_of_a_few_roundings(operator: type) -> None:
    single, double = problem(), problem(dtype=torch.float64)
    A, B = operator(double), operator(single, precision="bf16")
    V = directions(B)
    assert UNIT / 8 < relative(B @ V, A @ V.double()) < FACTORS * UNIT


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_small_products_stay_as_they_are(operator: type) -> None:
    objective = problem(20, 30, 10)
    A, B = operator(objective), operator(objective, precision="bf16")
    V = directions(A, 5)
    assert torch.equal(B @ V, A @ V)
    assert (B.plan().precision, B.plan().bf16_fraction) == ("bf16", 0.0)
    assert B.precision_error().max == 0


class Attending(nn.Module):
    """Products of two activations, with a batch axis, and of an activation with a matrix that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(72, 72) / 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.tanh(torch.matmul(x, self.mix)) @ x.transpose(1, 2)
        return torch.sigmoid(scores) @ torch.matmul(x, self.mix)


@available
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN])
def test_matmul(operator: type) -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(4, 80, 72)
    objective = fc.Objective(model, nn.MSELoss(), (x, torch.randn(4, 80, 72)))
    A, B = operator(objective), operator(objective, precision="bf16")
    V = directions(A)
    assert UNIT / 8 < relative(B @ V, A @ V) < 3 * FACTORS * UNIT  # three products on the longest path
    assert B.plan().bf16_fraction > 0.9


class Head(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(48, 64), nn.Linear(64, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_vocabularies(operator: type) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 48), torch.randint(3000, (40,))
    objective = fc.Objective(Head(3000), nn.CrossEntropyLoss(), (x, y))
    A, B = operator(objective), operator(objective, precision="bf16")
    assert "linear_cross_entropy" in [row.kind for row in B.plan().rows]
    V = directions(A)
    assert UNIT / 8 < relative(B @ V, A @ V) < FACTORS * UNIT
    assert B.plan().bf16_fraction > 0.9


class Images(nn.Sequential):
    def __init__(self, channels: int) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1)
        super().__init__(
            nn.Conv2d(3, channels, 3), nn.Tanh(), conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)
        )
        self(torch.zeros(1, 3, 18, 18))


@available
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("channels", [8, 24])
def test_convolutions(operator: type, channels: int) -> None:
    """The first has three channels and stays as it is. Results are rounded as well, a third factor."""
    random = torch.Generator().manual_seed(0)
    batch = (torch.randn(8, 3, 18, 18, generator=random), torch.arange(8) % 4)
    objective = fc.Objective(Images(channels), nn.CrossEntropyLoss(), batch)
    A, B = operator(objective), operator(objective, precision="bf16")
    V = directions(A)
    convolutions = sum(row.flops for row in A.plan().rows if row.path == "2")
    if channels == 8:
        assert torch.equal(A @ V, B @ V)
        assert B.plan().bf16_fraction == 0
    else:
        assert UNIT / 8 < relative(B @ V, A @ V) < 6 * UNIT
        assert B.plan().bf16_fraction == pytest.approx(convolutions / A.plan().flops(1))
    assert torch.equal(B @ V, B @ V)


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_vector_gives_the_same_bits(operator: type) -> None:
    objective = problem()
    B = operator(objective, precision="bf16")
    V = directions(B, 4)
    first = B @ V
    for _ in range(3):
        assert torch.equal(B @ V, first)
    assert torch.equal(operator(problem(), precision="bf16") @ V, first)


@available
def test_two_precisions_at_once_do_not_disturb_each_other() -> None:
    objective = problem()
    A, B = fc.Hessian(objective), fc.Hessian(objective, precision="bf16")
    V = directions(A, 4)
    alone = [A @ V, B @ V]
    assert not torch.equal(*alone)

    def repeated(which: int) -> bool:
        return all(torch.equal((A, B)[which] @ V, alone[which]) for _ in range(20))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeated, [0, 1, 0, 1]))


@available
def test_loss_and_gradient_are_in_full_precision() -> None:
    """The gradient covariance subtracts the mean gradient, which is the engine's."""
    objective = problem()
    lower = fc.GradientCovariance(objective, precision="bf16")
    V = directions(lower)
    mean = made(fc.GradientCovariance, objective, precision="bf16") @ V - lower @ V
    leaves = {n: p.detach().double().requires_grad_() for n, p in objective.parameters.items()}
    x, y = next(iter(objective.batches())).batch
    loss = F.cross_entropy(functional_call(net(INPUTS, HIDDEN, CLASSES).double(), leaves, (x.double(),)), y)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(leaves.values()))])
    assert relative(mean, torch.outer(g, g @ V.double())) < 1e-3  # a small difference of large numbers


# --- the measured error ---


@available
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_measured_error_is_that_of_the_products(operator: type) -> None:
    objective = problem()
    A, B = operator(objective), operator(objective, precision="bf16")
    error = B.precision_error(5, seed=7)
    V = krylov.rademacher(7, 0, 5, A.shape[0], torch.empty(0)).T
    direct = ((B @ V).double() - (A @ V).double()).norm(dim=0) / (A @ V).double().norm(dim=0)
    torch.testing.assert_close(error.errors, direct, rtol=1e-6, atol=0)  # the difference is taken in float32
    assert (error.max, error.mean) == (float(error.errors.max()), float(error.errors.mean()))
    assert (error.precision, error.matvecs, error.seed) == ("bf16", 10, 7)
    assert UNIT / 8 < error.mean <= error.max < FACTORS * UNIT
    # Of the same size as the error, of which it is a part: |B - B^T| <= |B - A| + |A^T - B^T|.
    assert 0 < error.asymmetry < 2 * FACTORS * UNIT
    assert A.precision_error().max == 0
    assert A.precision_error().precision == "full"
    assert 0 < A.precision_error().asymmetry < 1e-5
    assert math.isnan(B.precision_error(1).asymmetry)


def test_the_measured_asymmetry_is_that_of_the_matrix() -> None:
    """Its square is a mean over 480 pairs, those among 16 of the 64 vectors each: right to a few hundredths."""
    random = torch.Generator().manual_seed(0)
    A = torch.randn(200, 200, generator=random)
    B = (A + A.T) / 2 + 0.01 * (A - A.T)
    like = torch.empty(200)
    error = precision.measured(lambda V: V @ B.T, lambda V: V @ (A + A.T) / 2, like, "bf16", 64, 0)
    assert error.asymmetry == pytest.approx(float((B - B.T).norm() / B.norm()), rel=0.1)
    assert error.mean == pytest.approx(float((A - A.T).norm() / (A + A.T).norm()) * 0.02, rel=0.1)


def test_the_error_of_no_product() -> None:
    zero = precision.measured(lambda V: 0 * V, lambda V: 0 * V, torch.empty(9), "bf16", 3, 0)
    assert (zero.max, zero.asymmetry) == (0, 0)
    infinite = precision.measured(lambda V: V, lambda V: 0 * V, torch.empty(9), "bf16", 3, 0)
    assert infinite.max == math.inf


@pytest.mark.parametrize(("vectors", "seed"), [(0, 0), (-1, 0), (2, -1)])
def test_numbers_of_vectors_and_seeds(vectors: int, seed: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        fc.Hessian(problem(20, 30, 10)).precision_error(vectors, seed=seed)


# --- what stands on top ---


@available
def test_plan_says_what_is_rounded() -> None:
    objective = problem()
    full, lower = fc.Hessian(objective).plan(), fc.Hessian(objective, precision="bf16").plan()
    linear = sum(row.flops for row in lower.rows if row.kind == "linear")
    assert lower.bf16_fraction == pytest.approx(linear / lower.flops(1))
    assert 0.8 < lower.bf16_fraction < 1
    assert (full.precision, full.bf16_fraction) == ("full", 0)
    assert f"{100 * lower.bf16_fraction:.0f} % in bf16" in str(lower)
    assert "bf16" not in str(full)
    assert (repr(fc.Hessian(objective, precision="bf16")), "bf16" in repr(fc.Hessian(objective))) == (
        f"Hessian(P = {objective.layout.size}, torch.float32, bf16, cpu)",
        False,
    )


@available
@pytest.mark.parametrize("K", [1, 8])
def test_planned_memory_holds_the_rounded_operands(K: int) -> None:
    B = fc.Hessian(problem(600, 700, 800), precision="bf16")
    V = directions(B, K)
    B @ V  # the first product makes the state, which stays
    planned = B.plan().peak_bytes(K)
    held = peak_bytes(lambda: B @ V) - V.numel() * V.element_size()
    assert fc.Hessian(B.objective).plan().peak_bytes(K) < held <= planned


@available
def test_eigenvalues() -> None:
    objective = problem()
    A, B = fc.GGN(objective), fc.GGN(objective, precision="bf16")
    exact, rough = fc.eigsh(A, 1, tol=1e-4), fc.eigsh(B, 1, tol=1e-2)
    assert rough.status == "converged"
    # A symmetric perturbation moves an eigenvalue by at most its norm (Weyl); the rest is the asked tolerance.
    assert float(rough.values[0]) == pytest.approx(float(exact.values[0]), rel=FACTORS * UNIT + 1e-2)
