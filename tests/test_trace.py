"""Probes, trace and diagonal: the generator's definition, no bias, honest errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flatcore as fc
from flatcore import _C
from flatcore.errors import FlatcoreWarning
from flatcore.trace import diagonal, trace

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def symmetric(P: int, seed: int = 0, dtype: torch.dtype = torch.float64, shift: float = 0.0) -> torch.Tensor:
    X = np.random.default_rng(seed).standard_normal((P, P))
    return torch.from_numpy((X + X.T) / 2 + shift * np.eye(P)).to(dtype)


class WithSlices:
    """A dense operator that names the parameters its rows belong to."""

    def __init__(self, A: torch.Tensor, slices: dict[str, slice]) -> None:
        self.A, self.parameter_slices = A, slices
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device
        self.products = 0

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.products += V.shape[1]
        return self.A @ V


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def sign(seed: int, probe: int, element: int) -> int:
    """The definition, in Python's integers."""
    key = mix((mix(mix((seed + GOLDEN) & MASK)) + (probe + 1) * GOLDEN) & MASK)
    word = mix((key + (element // 64 + 1) * GOLDEN) & MASK)
    return 1 if word >> (element % 64) & 1 else -1


def rademacher(seed: int, first: int, K: int, P: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return _C.krylov.rademacher(seed, first, K, P, torch.empty(0, dtype=dtype))


def test_mixing_function() -> None:
    """The first outputs of SplitMix64 from state 0, as published with the reference implementation."""
    assert [mix(i * GOLDEN & MASK) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("P", [1, 63, 64, 65, 131])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_probes_are_the_definition(P: int, seed: int) -> None:
    expected = [[sign(seed, 5 + k, e) for e in range(P)] for k in range(3)]
    assert rademacher(seed, 5, 3, P).tolist() == expected
    assert rademacher(seed, 5, 3, P, torch.float32).tolist() == expected


def test_probes_do_not_depend_on_block_or_threads() -> None:
    P = 200_000
    whole = rademacher(1, 0, 4, P)
    assert torch.equal(whole[2:], rademacher(1, 2, 2, P))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, rademacher(1, 0, 4, P))
    finally:
        torch.set_num_threads(threads)


def test_probes_are_uncorrelated() -> None:
    """Means and inner products of 64 rows of 20 000 signs, of two seeds, stay within 5 deviations."""
    V = torch.cat([rademacher(0, 0, 32, 20_000), rademacher(1, 0, 32, 20_000)])
    gram = V @ V.T / 20_000**0.5
    assert (gram - torch.diag(gram.diag())).abs().max() <= 5
    assert (V.sum(dim=1) / 20_000**0.5).abs().max() <= 5
    assert (V.sum(dim=0) / 64**0.5).abs().max() <= 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact(dtype: torch.dtype) -> None:
    A = symmetric(70, dtype=dtype)
    operator = WithSlices(A, {"a": slice(0, 11), "b": slice(11, 70)})
    found = trace(operator, method="exact")
    assert found.method == "exact"
    assert found.stderr == 0
    assert found.matvecs == operator.products == 70
    assert abs(found.value - float(A.double().trace())) <= 1e-13 * 70
    assert abs(found.by_parameter["b"].value - float(A.double().diag()[11:].sum())) <= 1e-13 * 70
    diag = diagonal(operator, method="exact")
    assert torch.equal(diag.value, A.double().diag())
    assert not diag.stderr.any()
    assert torch.equal(diag.by_parameter["a"].value, A.double().diag()[:11])


@pytest.mark.parametrize("P", [1, 2, 5, 64])
def test_auto_is_exact_for_small(P: int) -> None:
    found = trace(symmetric(P))
    assert found.method == "exact"
    assert found.matvecs == P
    assert found.by_parameter is None


def test_auto_changes_to_exact_where_cheaper() -> None:
    """An indefinite 300 x 300 matrix whose trace nearly vanishes: the probes see that columns are cheaper."""
    A = symmetric(300)
    operator = WithSlices(A, {"all": slice(0, 300)})
    found = trace(operator)
    assert found.method == "exact"
    assert found.matvecs == operator.products == 316
    assert abs(found.value - float(A.trace())) <= 1e-12 * 300
    assert trace(symmetric(300, shift=30.0)).method == "hutchinson"


@pytest.mark.parametrize("seed", range(5))
def test_hutchinson_is_within_four_standard_errors(seed: int) -> None:
    A = symmetric(400, seed=seed, shift=10.0)
    operator = WithSlices(A, {"a": slice(0, 100), "b": slice(100, 400)})
    found = trace(operator, method="hutchinson", rtol=0.005, seed=seed)
    assert found.status == "converged"
    assert found.matvecs == operator.products >= 16
    assert found.stderr <= 0.005 * abs(found.value)
    assert abs(found.value - float(A.trace())) <= 4 * found.stderr
    parts = found.by_parameter
    assert abs(parts["a"].value + parts["b"].value - found.value) <= 1e-10 * abs(found.value)
    for name, part in operator.parameter_slices.items():
        assert abs(parts[name].value - float(A.diag()[part].sum())) <= 4 * parts[name].stderr


def test_standard_error_is_the_sample_deviation() -> None:
    """Against the formula written out: n - 1 in the variance, n in the mean, Student's factor; of a trace moderated by
    what the entries tell, as 16 degrees of freedom."""
    student = 1 + 5 / (4 * 36)
    A = symmetric(100, shift=5.0)
    with pytest.warns(FlatcoreWarning):
        found = trace(A, method="hutchinson", rtol=1e-9, max_matvecs=37, seed=2)
    V = rademacher(2, 0, 37, 100)
    samples = ((V @ A) * V).sum(dim=1)
    assert abs(found.value - float(samples.mean())) <= 1e-10
    blocks = [2 * float((part @ A * part).var(dim=0).sum()) * len(part) for part in V.split(8)]
    variance = (36 * float(samples.var()) + 16 * sum(blocks) / 37) / (36 + 16)
    assert abs(found.stderr - student * (variance / 37) ** 0.5) <= 1e-10
    with pytest.warns(FlatcoreWarning):
        diag = diagonal(A, method="hutchinson", rtol=1e-9, max_matvecs=37, seed=2)
    entries = (V @ A) * V
    assert torch.allclose(diag.value, entries.mean(dim=0), rtol=0, atol=1e-12)
    expected = student * entries.std(dim=0, correction=1) / 37**0.5
    assert torch.allclose(diag.stderr, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probes", [4, 8])
def test_few_probes_of_one_large_eigenvalue(probes: int) -> None:
    """The sample deviation alone of a squared normal number's few samples holds the truth 79 % and 84 % of the time."""
    values = torch.full((200,), 0.01, dtype=torch.float64)
    values[0] = 100
    Q = torch.linalg.qr(
        torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    A, inside, runs = (Q * values) @ Q.T, 0, 400
    for seed in range(runs):
        with pytest.warns(FlatcoreWarning):
            found = trace(A, method="hutchinson", rtol=1e-9, max_matvecs=probes, seed=seed)
        inside += abs(found.value - float(values.sum())) <= 2 * found.stderr
    assert inside / runs >= 0.9 - 2 * (0.9 * 0.1 / runs) ** 0.5


def test_unbiased_with_honest_coverage() -> None:
    """400 seeds of 32 probes: no bias, and 95.4 % within two standard errors (t with 31 degrees, whose
    factor 1 + 5 / (4 * 31) makes them 2.08 deviations of the sample)."""
    A = symmetric(50, seed=3)
    truth, inside, values, variances = float(A.trace()), 0, [], []
    for seed in range(400):
        with pytest.warns(FlatcoreWarning):
            found = trace(A, method="hutchinson", rtol=1e-9, max_matvecs=32, seed=seed)
        values.append(found.value)
        variances.append((found.stderr / (1 + 5 / (4 * 31))) ** 2)
        inside += abs(found.value - truth) <= 2 * found.stderr
    true_variance = 2 * float((A**2).sum() - (A.diag() ** 2).sum()) / 32  # Hutchinson's formula
    assert abs(np.mean(values) - truth) <= 4 * (true_variance / 400) ** 0.5
    # The relative deviation of a variance from 31 degrees of freedom is sqrt(2 / 31), of the mean of 400 a
    # twentieth of it.
    assert (
        abs(np.mean(variances) / true_variance - 1) <= 4 * (2 / 31 / 400) ** 0.5 * 1.5
    )  # 1.5: kurtosis above normal
    assert abs(inside / 400 - 0.954) <= 4 * (0.954 * 0.046 / 400) ** 0.5


def test_diagonal_within_its_errors() -> None:
    A = symmetric(300, shift=20.0)
    found = diagonal(A, method="hutchinson", rtol=0.05)
    assert found.status == "converged"
    assert found.value.shape == found.stderr.shape == (300,)
    error = (found.value - A.diag()) / found.stderr
    # The squared ratios average 1; 300 nearly independent ones deviate by sqrt(2 / 300) (kurtosis of t: a
    # little more).
    assert abs(float((error**2).mean()) - 1) <= 4 * (2 / 300) ** 0.5 * 1.5
    assert float(found.stderr.norm()) <= 0.05 * float(found.value.norm())


@pytest.mark.parametrize("function", [trace, diagonal])
def test_not_reached_is_said(function: object) -> None:
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs or rtol"):
        found = function(symmetric(300), method="hutchinson", rtol=1e-3, max_matvecs=40)
    assert found.matvecs == 40
    assert "above rtol" in found.status


def test_one_probe_has_no_error_bar() -> None:
    with pytest.warns(FlatcoreWarning):
        assert np.isnan(trace(symmetric(100), method="hutchinson", max_matvecs=1).stderr)


def test_zero_and_diagonal_operators() -> None:
    """Random signs are exact for a diagonal matrix: every sample is the trace."""
    zero = trace(torch.zeros(100, 100), method="hutchinson")
    assert zero.value == 0
    assert zero.stderr == 0
    assert zero.status == "converged"
    assert zero.matvecs == 16
    found = trace(torch.diag(torch.arange(100.0)), method="hutchinson")
    assert found.value == 4950
    assert found.stderr == 0


def test_same_seed_same_value() -> None:
    A = symmetric(200, shift=9.0)
    assert trace(A, seed=3).value == trace(A, seed=3).value != trace(A, seed=4).value


@pytest.mark.parametrize("name", ["example", "xdiag", "nonsense"])
def test_methods_offered(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"method: this operator offers auto, exact, hutchinson, hutch\+\+, xtrace, got"
    ):
        trace(symmetric(10), method=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0}, "rtol: expected a positive number"),
        ({"max_matvecs": 0}, "max_matvecs: expected at least 1"),
        ({"method": "exact", "max_matvecs": 9}, "the exact trace takes P = 10 products, got 9"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_refused_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(symmetric(10), **arguments)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22])
def test_products_whose_squares_are_lost(scale: float) -> None:
    """Quadratures would go on with norms of zero, and say that they have converged."""
    A = scale * torch.eye(20)
    for estimate in (trace, lambda A: fc.soft_rank(A, scale, method="lanczos"), lambda A: fc.eigsh(A, 2)):
        with pytest.raises(
            ValueError, match=r"^A: expected products of 1e-19 to 9e\+18 times .*multiply the loss"
        ):
            estimate(A)
    assert trace(1e-18 * torch.eye(20)).value == pytest.approx(20e-18, rel=1e-6)
    assert trace(torch.zeros(20, 20)).value == 0


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_products_not_finite(method: str) -> None:
    A = symmetric(20)
    A[3, 4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        trace(A, method=method)
