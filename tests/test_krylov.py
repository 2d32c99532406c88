"""Block Lanczos and eigsh, held to the factorisation they state and to dense eigensolvers."""

from __future__ import annotations

import functools
import signal
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from flatcore import _C, progress
from flatcore.eigsh import eigsh
from flatcore.errors import FlatcoreWarning
from tests.spectra import SPECTRA, eps, spread, wanted, with_spectrum

DTYPES = [torch.float64, torch.float32]
WHICH = ["LM", "LA", "SA", "BE"]


def factorise(A: torch.Tensor, block: int, steps: int, keep: int, seed: int) -> tuple[torch.Tensor, ...]:
    """V, T, C, Q of a basis in full precision, nothing locked."""
    head, tail = A.new_empty((steps + 2) * block, len(A)), A.new_empty(0, len(A))
    found = _C.krylov.factorise(lambda X: X @ A, head, tail, 1.0, block, steps, keep, 0, seed)
    assert not any(found[4])
    return found[:4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("block", "steps", "keep"), [(1, 1, 0), (1, 9, 0), (3, 1, 0), (3, 7, 0), (4, 6, 5), (8, 8, 0)]
)
def test_factorisation(name: str, dtype: torch.dtype, block: int, steps: int, keep: int) -> None:
    """V A = T V + C Q, [V; Q] [V; Q]ᵀ = I, T = V A Vᵀ at several depths, across deflation and a restart."""
    A = with_spectrum(SPECTRA[name], dtype)
    V, T, C, Q = factorise(A, block, steps, keep, 3)
    norm = max(float(np.abs(SPECTRA[name]).max()), 1e-300)
    everything = torch.cat([V, Q]).double()
    V, Q, A = V.double(), Q.double(), A.double()
    # Each entry: a few roundings of sums of P terms, a deflated row adds 8 eps |A|.
    allowed = 32 * eps(dtype) * 60**0.5
    assert (
        everything @ everything.T - torch.eye(len(everything), dtype=torch.float64)
    ).abs().max() <= allowed
    assert (V @ A - T @ V - C @ Q).abs().max() <= allowed * norm
    assert (V @ A @ V.T - T).abs().max() <= allowed * norm
    assert torch.equal(T, T.T)
    if keep == 0:
        assert len(V) == block * steps or len(V) == 60


def test_projected_matrix_is_block_tridiagonal() -> None:
    A = with_spectrum(SPECTRA["indefinite"])
    _, T, C, _ = factorise(A, 3, 6, 0, 0)
    outside = torch.ones(18, 18).triu(6).bool()  # beyond the neighbouring block whatever the place in it
    assert T[outside].abs().max() <= 32 * eps(torch.float64) * 60**0.5 * np.abs(SPECTRA["indefinite"]).max()
    assert torch.count_nonzero(C[:-3]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("k", "block"), [(1, None), (6, None), (7, 3), (12, 4)])
def test_agrees_with_dense(name: str, which: str, dtype: torch.dtype, k: int, block: int | None) -> None:
    """Every copy of every wanted value, vectors that are eigenvectors, residuals that are the residuals."""
    A = with_spectrum(SPECTRA[name], dtype)
    exact = A.double()
    norm = float(np.abs(SPECTRA[name]).max())
    tol = 1e-8 if dtype == torch.float64 else 1e-5
    pairs = eigsh(A, k, which=which, tol=tol, block_size=block)
    assert pairs.status == "converged"
    assert bool(pairs.converged.all())
    # Weyl: a Ritz value is within its residual of an eigenvalue of the rounded A, itself within eps sqrt(P)
    # |A| of the exact.
    allowed = max(tol, 4 * eps(dtype) * 60**0.5) * norm
    np.testing.assert_allclose(pairs.values.numpy(), wanted(SPECTRA[name], k, which), rtol=0, atol=allowed)
    V = pairs.vectors.double()
    rounding = 32 * eps(dtype) * 60**0.5
    assert (V.T @ V - torch.eye(k, dtype=torch.float64)).abs().max() <= rounding
    residuals = (exact @ V - V * pairs.values).norm(dim=0)
    assert (residuals - pairs.residuals).abs().max() <= rounding * norm
    assert (pairs.residuals <= tol * pairs.scale).all()


@pytest.mark.parametrize("which", WHICH)
def test_restarts(which: str) -> None:
    """A spectrum too hard for one basis: restarts happen and change nothing."""
    values = np.linspace(-1, 1, 400) ** 3
    pairs = eigsh(with_spectrum(values), 4, which=which, tol=1e-7, block_size=2)
    assert pairs.restarts > 0
    assert pairs.status == "converged"
    # LM: equal sizes of both signs tie, so sizes are compared.
    found, true = pairs.values.numpy(), wanted(values, 4, which)
    if which == "LM":
        found, true = np.abs(found), np.abs(true)
    np.testing.assert_allclose(found, true, atol=1e-7)


def test_copies_need_fresh_directions() -> None:
    """Nine copies, a block of two: a Krylov space of two rows holds two, the rest come from fresh rows."""
    values = np.concatenate([np.full(9, 2.0), np.linspace(-1, 1, 291)])
    for seed in range(3):
        pairs = eigsh(with_spectrum(values, seed=seed), 10, which="LA", tol=1e-6, block_size=2, seed=seed)
        assert pairs.status == "converged"
        np.testing.assert_allclose(pairs.values.numpy(), wanted(values, 10, "LA"), atol=2e-6)


def test_graded_to_twelve_orders() -> None:
    """tol is relative to the largest: each value is right to tol |A|, the large ones to all digits."""
    values = 10.0 ** np.linspace(12, 0, 50)
    A = torch.diag(torch.from_numpy(values))
    pairs = eigsh(A, 6, tol=1e-14)
    np.testing.assert_allclose(pairs.values.numpy(), values[:6], rtol=0, atol=64 * eps(torch.float64) * 1e12)
    assert pairs.matvecs <= 50 + 6 + 8


@pytest.mark.parametrize("P", [2, 3, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny(P: int, dtype: torch.dtype) -> None:
    """Fewer rows than the block: the basis becomes the whole space."""
    values = spread(P)
    for k in range(1, P):
        pairs = eigsh(with_spectrum(values, dtype), k, which="SA", tol=1e-5, block_size=8)
        np.testing.assert_allclose(
            pairs.values.numpy(), np.sort(values)[:k], atol=32 * eps(dtype) * np.abs(values).max()
        )
        assert pairs.matvecs == P + k


def test_forms_of_operator() -> None:
    """Dense tensor, array, scipy operator, anything with .shape and @; matvecs counts every product."""

    class Counting:
        shape, dtype, device = (60, 60), torch.float64, torch.device("cpu")

        def __init__(self, A: torch.Tensor) -> None:
            self.A, self.products = A, 0

        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            self.products += V.shape[1]
            return self.A @ V

    A = with_spectrum(SPECTRA["indefinite"])
    counting = Counting(A)
    forms = [A, A.numpy(), aslinearoperator(A.numpy()), counting]
    found = [eigsh(form, 4, tol=1e-9) for form in forms]
    assert counting.products == found[-1].matvecs
    for pairs in found[1:]:
        assert torch.allclose(pairs.values, found[0].values, rtol=0, atol=1e-12)


def test_operator_keeping_its_result() -> None:
    """The recurrence overwrites products: an operator that returns its own buffer or its input is safe."""
    kept: list[torch.Tensor] = []

    class Keeping:
        shape, dtype, device = (20, 20), torch.float64, torch.device("cpu")
        diagonal = torch.arange(20, dtype=torch.float64)[:, None]

        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            kept.append((self.diagonal * V).T.contiguous().T)
            kept.append(kept[-1].clone())
            return kept[-2]

    pairs = eigsh(Keeping(), 3, tol=1e-9)
    np.testing.assert_allclose(pairs.values.numpy(), [19, 18, 17], atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(kept[::2], kept[1::2], strict=True))

    class Identity(Keeping):
        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            return V

    np.testing.assert_allclose(eigsh(Identity(), 3).values.numpy(), 1, atol=1e-14)


def test_start_vector() -> None:
    """Warm start: from its own answer the method needs fewer products; v0 stays as it was."""
    A = with_spectrum(np.concatenate([[9.0, 8.0, 7.0], spread(197)]))
    cold = eigsh(A, 3, tol=1e-6)
    start = cold.vectors.clone()
    warm = eigsh(A, 3, tol=1e-5, v0=start)
    assert torch.equal(start, cold.vectors)
    assert warm.matvecs < cold.matvecs
    assert torch.allclose(warm.values, cold.values, atol=1e-5 * 9)
    # An eigenvector that is not wanted must not end the search.
    wrong = torch.linalg.eigh(A).eigenvectors[:, 100]
    for block in (1, None):
        found = eigsh(A, 1, tol=1e-6, v0=wrong, block_size=block)
        assert abs(float(found.values[0]) - 9) <= 1e-5
    # Neither a zero vector nor repeated ones are directions.
    for v0 in (torch.zeros(200, 2), torch.ones(200, 3)):
        assert torch.allclose(eigsh(A, 3, tol=1e-6, v0=v0).values, cold.values, atol=1e-5 * 9)


def test_same_seed_same_bits() -> None:
    A = with_spectrum(SPECTRA["indefinite"], torch.float32)
    one, two, other = eigsh(A, 5, seed=4), eigsh(A, 5, seed=4), eigsh(A, 5, seed=5)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, other.vectors)


def test_not_converged_is_said() -> None:
    A = with_spectrum(np.linspace(-1, 1, 500))
    with pytest.warns(FlatcoreWarning, match="raise max_matvecs"):
        pairs = eigsh(A, 4, tol=1e-10, max_matvecs=60)
    assert not pairs.converged.all()
    assert pairs.status != "converged"
    assert pairs.matvecs <= 60
    true = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(true, pairs.residuals, atol=1e-13)
    with pytest.warns(FlatcoreWarning, match="float32"):
        assert not eigsh(with_spectrum(spread(40), torch.float32), 4, tol=1e-9).converged.all()


def test_without_vectors() -> None:
    assert eigsh(with_spectrum(spread(30)), 2, return_eigenvectors=False).vectors is None


class Failing:
    shape, dtype, device = (50, 50), torch.float64, torch.device("cpu")

    def __init__(self, fail: BaseException | float | None, after: int = 2) -> None:
        self.fail, self.left = fail, after

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        W = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * V
        if self.left < 0:
            if isinstance(self.fail, BaseException):
                raise self.fail
            W[7, 0] = self.fail
        return W


@pytest.mark.parametrize(("error", "after"), [(RuntimeError("mine"), 2), (KeyboardInterrupt(), 0)])
def test_exceptions_pass_through(error: BaseException, after: int) -> None:
    with pytest.raises(type(error)) as caught:
        eigsh(Failing(error, after), 3, block_size=2, tol=1e-9)
    assert caught.value is error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        eigsh(Failing(value), 3, block_size=2, tol=1e-9)


@pytest.mark.parametrize("block", [1, 4])
def test_not_symmetric_is_noticed(block: int) -> None:
    A = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 30)))
    with pytest.raises(ValueError, match="not symmetric"):
        eigsh(A, 3, block_size=block)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 20}, ValueError, "k: expected fewer than P = 20"),
        ({"k": 2.5}, TypeError, "k: expected a whole number"),
        ({"tol": 0.0}, ValueError, "tol: expected a positive number"),
        ({"tol": float("nan")}, ValueError, "tol: expected a positive number"),
        ({"which": "SM"}, ValueError, "which: expected one of LM, LA, SA, BE, got 'SM'"),
        ({"block_size": 0}, ValueError, "block_size: expected at least 1"),
        ({"max_matvecs": 3}, ValueError, "max_matvecs: expected at least 12"),
        ({"seed": -1}, ValueError, "seed: expected at least 0"),
        ({"v0": torch.ones(19)}, ValueError, r"v0: expected shape \(20,\)"),
        ({"v0": torch.ones(20, 20)}, ValueError, r"v0: expected shape \(20,\)"),
        ({"v0": torch.full((20,), float("nan"))}, ValueError, "v0: expected finite entries"),
        ({"v0": torch.ones(20, dtype=torch.int64)}, TypeError, "v0: expected a floating-point"),
    ],
)
def test_refused_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    arguments = {"k": 6, **arguments}
    with pytest.raises(error, match=message):
        eigsh(with_spectrum(spread(20)), **arguments)


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, "expected a square operator"),
        (torch.ones(0, 0), ValueError, "at least one row"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "float32 or float64, got torch.int64"),
        (np.ones((3, 3), dtype=complex), TypeError, "float32 or float64, got complex128"),
        ([[1.0]], TypeError, "expected an operator with .shape and @, got list"),
    ],
)
def test_refused_operators(A: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eigsh(A, 1)


def test_wrong_product_shape() -> None:
    class Wrong(Failing):
        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            return V[:-1]

    with pytest.raises(ValueError, match=r"expected A @ V of shape \(50, 2\)"):
        eigsh(Wrong(None), 3)


class Alarm(Exception):
    pass


def test_signals_end_a_run() -> None:
    """Ctrl-C works within a run without a line of Python: the product is a bound torch function."""

    def handler(number: int, frame: object) -> None:
        raise Alarm

    class Diagonal:
        shape, dtype, device = (2000, 2000), torch.float64, torch.device("cpu")
        entries = torch.linspace(-1, 1, 2000, dtype=torch.float64)[:, None]
        __matmul__ = functools.partial(torch.mul, entries)

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Alarm):
            eigsh(
                Diagonal(), 2, which="SA", tol=1e-300, block_size=2, max_matvecs=10**12, memory=2000 * 8 * 24
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_progress_is_quiet_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    eigsh(with_spectrum(spread(50)), 3, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing before two seconds have passed, a bar after."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress.progress_bar("working", total=10) as bar:
        bar.update(1, "first")
        assert capsys.readouterr().err == ""
        now[0] = 2.5
        bar.update(7, "seventh")
    assert "working" in capsys.readouterr().err


def test_no_warning_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigsh(with_spectrum(spread(50)), 3)
