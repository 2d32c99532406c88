"""Hutch++, XTrace, XDiag, deflation: held to their definitions over dense matrices, and to their error bars."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch

from flatcore import _C
from flatcore.automatic import growth_cost, share_outside
from flatcore.errors import FlatcoreWarning
from flatcore.trace import diagonal, trace

P = 120
DTYPES = [torch.float64, torch.float32]
LONG = os.environ.get("FLATCORE_LONG") == "1"
METHODS = ["hutchinson", "hutch++", "xtrace", "auto"]


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    A = (Q * values) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


def spectra(P: int) -> dict[str, np.ndarray]:
    i, rng = np.arange(P), np.random.default_rng(5)
    return {
        "exponential": 0.8**i,
        "power": (1.0 + i) ** -1.5,
        "slow": 1 / (1.0 + i),
        "indefinite": rng.standard_normal(P) + 1,
        "decaying, both signs": 0.85**i * np.where(i % 3 == 2, -1, 1),
        "outliers": np.concatenate(
            [[1e3, 300, 200, 100, 50, 40, 30, 20], np.abs(rng.standard_normal(P - 8))]
        ),
        "rank 5": np.concatenate([np.arange(1.0, 6), np.zeros(P - 5)]),
        "condition 1e12": 10.0 ** np.linspace(0, -12, P),
        "zero": np.zeros(P),
    }


def signs(seed: int, first: int, count: int, P: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return _C.krylov.rademacher(seed, first, count, P, torch.empty(0, dtype=dtype))


class WithSlices:
    def __init__(self, A: torch.Tensor, slices: dict[str, slice]) -> None:
        self.A, self.parameter_slices, self.products = A, slices, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.products += V.shape[1]
        return self.A @ V


def left_out(A: torch.Tensor, probes: torch.Tensor, i: int, others: set[int]) -> torch.Tensor:
    """Probe i's estimate of diag A with the range of the probes not in ``others``, from the definition."""
    kept = [j for j in range(len(probes)) if j not in others]
    U, sizes, _ = torch.linalg.svd(A @ probes[kept].T, full_matrices=False)
    U = U[:, sizes > 1e-10 * sizes[0].clamp_min(1e-300)]
    N = torch.eye(len(A), dtype=A.dtype) - U @ U.T
    B = N @ A @ N
    return (A - B).diag() + probes[i] * (B @ probes[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", spectra(P))
def test_leave_one_out_is_the_definition(name: str, dtype: torch.dtype) -> None:
    """Estimates, variances with the covariance's unbiased estimate, per slice and entry by entry; blocks of
    unequal size; ranks below the number of probes."""
    m, exact = 11, with_spectrum(spectra(P)[name])
    A, probes = exact.to(dtype), signs(3, 0, m, P)
    slices = [(0, 50), (50, 70)]
    estimator = _C.estimators.LeaveOneOut(lambda X: X @ A, torch.empty(0, dtype=dtype), P, 3, slices)
    for first, last in ((0, 8), (8, 11)):
        estimator.extend(probes[first:last].to(dtype) @ A)
    a = torch.stack([left_out(exact, probes, i, {i}) for i in range(m)])
    d = torch.zeros(m, m, P, dtype=torch.float64)
    for i in range(m):
        for j in set(range(m)) - {i}:
            d[i, j] = a[i] - left_out(exact, probes, i, {i, j})
    # Sums of P terms of size |A|, each rounded to eps, over projections that lose a few digits.
    allowed = 64 * torch.finfo(dtype).eps * m * P**0.5 * float(np.abs(spectra(P)[name]).max(initial=1e-300))
    found = estimator.estimates(True)
    for row, part in zip(found, [slice(0, P), slice(0, 50), slice(50, P)], strict=True):
        sums, common = a[:, part].sum(dim=1), d[:, :, part].sum(dim=2)
        both = float((common * common.T).sum())
        variance = float(((sums - sums.mean()) ** 2).sum() + max(both, 0)) / (m * (m - 1))
        assert abs(float(row[0] - sums.mean())) <= allowed
        assert abs(float(row[1]) ** 0.5 - variance**0.5) <= allowed**0.5 * variance**0.5 + allowed
    mean, variance = estimator.diagonal()
    assert (mean - a.mean(dim=0)).abs().max() <= allowed
    spread = ((a - a.mean(dim=0)) ** 2).sum(dim=0)
    pairs = [(i, (i + shift) % m) for shift in range(1, 5) for i in range(m)]
    both = sum(float((d[i, j] * d[j, i]).sum()) for i, j in pairs) / len(pairs)
    factor = 1 + max(both, 0) * m * (m - 1) / float(spread.sum()) if float(spread.sum()) > allowed**2 else 1.0
    expected = (factor * spread / (m * (m - 1))).sqrt()
    assert (variance.sqrt() - expected).abs().max() <= allowed**0.5 * float(expected.max()) + allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", spectra(P))
def test_basis_and_remainder(name: str, dtype: torch.dtype) -> None:
    """Q Qᵀ = I beyond the rank too; known diagonal and remainder are those of the dense projections."""
    A = with_spectrum(spectra(P)[name], dtype)
    basis = _C.estimators.RangeBasis(lambda X: X @ A, torch.empty(0, dtype=dtype), P, 1)
    for _ in range(3):
        basis.sketch(5)
    Q, exact = basis.vectors.double(), A.double()
    rounding = 32 * torch.finfo(dtype).eps * P**0.5
    norm = float(np.abs(spectra(P)[name]).max(initial=1e-300))
    assert basis.rows == 15
    assert (Q @ Q.T - torch.eye(15, dtype=torch.float64)).abs().max() <= rounding
    N = torch.eye(P, dtype=torch.float64) - Q.T @ Q
    B, V = N @ exact @ N, signs(0, 0, 4, P, dtype)
    assert (basis.known_diagonal() - (exact - B).diag()).abs().max() <= rounding * norm
    assert (basis.remainder(V, V @ A).double() - V.double() @ B).abs().max() <= 4 * rounding * norm * P**0.5


@pytest.mark.parametrize("name", ["exponential", "power", "slow", "indefinite"])
def test_variance_of_leave_one_out_is_unbiased(name: str) -> None:
    """Over 400 sets of 12 probes the stated variance averages the true one; the plain spread does not."""
    A, estimates, variances = with_spectrum(spectra(P)[name]), [], []
    for seed in range(400):
        estimator = _C.estimators.LeaveOneOut(lambda X: X @ A, A[:0], P, seed, [])
        estimator.extend(signs(seed, 0, 12, P) @ A)
        value, variance = estimator.estimates(False)[0].tolist()
        estimates.append(value)
        variances.append(variance)
    true = float(np.var(estimates, ddof=1))
    assert abs(np.mean(estimates) - spectra(P)[name].sum()) <= 4 * (true / 400) ** 0.5
    # The variance of 400 samples deviates by sqrt((kurtosis - 1) / 400), the mean of the stated ones too.
    kurtosis = float(np.mean((np.array(estimates) - np.mean(estimates)) ** 4)) / true**2
    allowed = 4 * (((kurtosis - 1) + np.var(variances) / true**2) / 400) ** 0.5
    # The covariance's estimate is cut off at 0, which raises the mean where it is noise.
    assert -allowed <= np.mean(variances) / true - 1 <= allowed + 0.15


def covered(A: torch.Tensor, method: str, rtol: float, seeds: int) -> float:
    """Share of the seeds whose truth lies within 2 stderr, stopping adaptively."""
    inside, truth = 0, float(A.trace())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        for seed in range(seeds):
            found = trace(A, method=method, rtol=rtol, seed=seed, max_matvecs=1000)
            rounding = 1e-12 * float(A.norm())
            inside += abs(found.value - truth) <= 2 * found.stderr + rounding
    return inside / seeds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "rtol"), [("exponential", 0.05), ("slow", 0.04), ("outliers", 0.1)])
def test_coverage(name: str, rtol: float, method: str) -> None:
    """200 seeds with a stopping rule: at least 90 % within 2 stderr, less 2 deviations of such a count
    (2 sqrt(0.9 * 0.1 / 200) = 4.2 %)."""
    assert covered(with_spectrum(spectra(200)[name]), method, rtol, 200) >= 0.9 - 0.042


@pytest.mark.skipif(not LONG, reason="3 minutes; set FLATCORE_LONG=1")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.02])
@pytest.mark.parametrize("name", spectra(300))
def test_coverage_everywhere(name: str, rtol: float, method: str) -> None:
    """The same for all spectra (3 minutes; FLATCORE_LONG=1)."""
    assert covered(with_spectrum(spectra(300)[name]), method, rtol, 200) >= 0.9 - 0.042


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("support", [2, 3, 300])
def test_one_spike(method: str, support: int) -> None:
    """One eigenvalue of 1e3 among zeros, along few coordinates or all: where random signs miss it altogether
    half of the time, an error bar must not come out small."""
    v = torch.zeros(300, dtype=torch.float64)
    v[:support] = torch.from_numpy(np.random.default_rng(2).choice([-1.0, 1.0], support)) / support**0.5
    A, inside = 1e3 * torch.outer(v, v), 0
    for seed in range(100):
        found = trace(A, method=method, rtol=0.3, seed=seed)
        error = abs(found.value - 1e3)
        assert error <= 5 * found.stderr + 1e-9
        inside += error <= 2 * found.stderr + 1e-9
    assert inside >= 90 - 6  # 2 deviations of a count of 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rank 5", "condition 1e12", "exponential"])
def test_precision_of_float32(name: str, dtype: torch.dtype) -> None:
    """The downdating loses nothing: a rank below the sketch is exact, a wide spectrum within its bar."""
    values = spectra(400)[name]
    A = with_spectrum(values, dtype)
    rounding = 32 * torch.finfo(dtype).eps * 400**0.5
    for method in ("xtrace", "hutch++"):
        found = trace(A, method=method, rtol=1e-3)
        assert found.status == "converged"
        error = abs(found.value - values.sum())
        assert error <= 4 * found.stderr + rounding * values.max()
        if name == "rank 5":
            assert error <= rounding * values.max()
            assert found.matvecs == 32
        diag = diagonal(A, method=method, rtol=0.05)
        assert (diag.value - A.double().diag()).norm() <= 4 * diag.stderr.norm() + rounding * values.max()


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "auto"])
@pytest.mark.parametrize("function", [trace, diagonal])
def test_parts_and_products(function: object, method: str) -> None:
    A = with_spectrum(spectra(300)["power"])
    operator = WithSlices(A, {"a": slice(0, 100), "b": slice(100, 300)})
    found = function(operator, method=method, rtol=0.03)
    assert found.status == "converged"
    assert found.matvecs == operator.products
    assert (
        found.method == {trace: "xtrace", diagonal: "xdiag"}[function] if method != "hutch++" else "hutch++"
    )
    parts, rounding = found.by_parameter, 1e-12
    if function is trace:
        assert abs(parts["a"].value + parts["b"].value - found.value) <= rounding
        for name, part in operator.parameter_slices.items():
            assert abs(parts[name].value - float(A.diag()[part].sum())) <= 4 * parts[name].stderr
    else:
        assert torch.equal(torch.cat([parts["a"].value, parts["b"].value]), found.value)
        squares = ((found.value - A.diag()) / found.stderr) ** 2
        assert float(squares.mean()) <= 2  # 1 but for the entries' common directions


def test_diagonal_sums_to_the_trace() -> None:
    A = with_spectrum(spectra(300)["power"])
    with pytest.warns(FlatcoreWarning):
        one = trace(A, method="xtrace", rtol=1e-9, max_matvecs=40, seed=1)
    with pytest.warns(FlatcoreWarning):
        other = diagonal(A, method="xdiag", rtol=1e-9, max_matvecs=40, seed=1)
    assert abs(one.value - float(other.value.sum())) <= 1e-12


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "auto"])
@pytest.mark.parametrize("budget", [1, 2, 7, 16, 17, 33, 50])
def test_budget_is_kept(method: str, budget: int) -> None:
    operator = WithSlices(with_spectrum(spectra(300)["indefinite"]), {})
    if method == "xtrace" and budget < 4:
        with pytest.raises(
            ValueError, match=f"max_matvecs: expected at least 4 for leave-one-out .*, got {budget}"
        ):
            trace(operator, method=method, max_matvecs=budget)
        return
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs or rtol"):
        found = trace(operator, method=method, rtol=1e-6, max_matvecs=budget)
    assert found.matvecs == operator.products <= budget


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_exact_where_that_is_cheaper(method: str) -> None:
    A = with_spectrum(spectra(100)["indefinite"])
    found = trace(A, method=method, rtol=1e-9)
    assert found.method == "exact"
    assert abs(found.value - float(A.trace())) <= 1e-12 * 100


@pytest.mark.parametrize("name", ["exponential", "power", "slow", "indefinite", "outliers"])
@pytest.mark.parametrize("rtol", [0.1, 0.02])
def test_auto_costs_at_most_a_pilot_more(name: str, rtol: float) -> None:
    """In the median of 11 seeds, against each method: no more than the pilot's 16 second products above
    Hutchinson's method, and than 32 above the best."""
    A = with_spectrum(spectra(300)[name])

    def cost(method: str) -> float:
        found = [
            trace(A, method=method, rtol=rtol, seed=seed, max_matvecs=4000).matvecs for seed in range(11)
        ]
        return float(np.median(found))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        auto, costs = cost("auto"), [cost(m) for m in ("hutchinson", "hutch++", "xtrace")]
    assert auto <= costs[0] + 16
    assert auto <= min(*costs, 300) + 32


def test_auto_on_a_flat_spectrum_takes_no_second_products() -> None:
    A = with_spectrum(spectra(300)["indefinite"])
    found = trace(A, rtol=0.02)
    assert found.method == "hutchinson"
    assert 16 < found.matvecs == trace(A, method="hutchinson", rtol=0.02).matvecs


def test_auto_probes_the_remainder_with_fresh_probes() -> None:
    """Four outliers and a flat rest: a larger basis stops paying. The probes that follow must not be those
    the basis was made of, which its remainder does not see."""
    flat = np.random.default_rng(3).uniform(0.5, 1.5, 800) * np.where(np.arange(800) % 2, 1, -0.4)
    A, seen = with_spectrum(np.concatenate([np.full(4, 300.0), flat])), []

    class Recording(WithSlices):
        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            seen.extend(tuple(v.tolist()) for v in V.T if bool((v.abs() == 1).all()))
            return super().__matmul__(V)

    methods = []
    for seed in range(6):
        seen.clear()
        found = trace(Recording(A, {}), rtol=0.0025, seed=seed)
        methods.append(found.method)
        assert len(set(seen)) == len(seen)
        assert abs(found.value - float(A.trace())) <= 4 * found.stderr + 1e-9
    assert "hutch++" in methods, methods


def test_share_outside() -> None:
    """A flat spectrum leaves nearly all outside, a low rank nothing, and the power of a power law shows."""
    flat, _ = share_outside(signs(0, 0, 16, 300) @ with_spectrum(np.ones(300)))
    assert flat == pytest.approx((1 - 15 / 300) ** 0.5, rel=0.02)
    low, _ = share_outside(signs(0, 0, 16, 300) @ with_spectrum(spectra(300)["rank 5"]))
    assert low <= 1e-6
    assert growth_cost(16, 64, 0.0) == 2 * (64 - 16)
    assert growth_cost(16, 256, 0.5) == pytest.approx(2 * (64 - 16))
    assert growth_cost(16, 4, 1.0) == 16


@pytest.mark.parametrize("method", METHODS)
def test_product_that_is_not_finite_is_named(method: str) -> None:
    class Failing(WithSlices):
        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            Y = super().__matmul__(V)
            if self.products > 24:
                Y[3, 2] = float("nan")
            return Y

    with pytest.raises(ValueError, match=r"not finite .* in product 27"):
        trace(Failing(with_spectrum(spectra(300)["power"]), {}), method=method, rtol=0.02)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_not_symmetric(method: str) -> None:
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 300)))
    with pytest.raises(ValueError, match="A is not symmetric"):
        trace(A, method=method)


def test_same_seed_same_bits() -> None:
    A = with_spectrum(spectra(300)["power"], torch.float32)
    for method in METHODS:
        one, two, other = (trace(A, method=method, rtol=0.05, seed=s).value for s in (3, 3, 4))
        assert one == two != other
