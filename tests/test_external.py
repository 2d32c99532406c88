"""Operations without a rule: run one by one through torch autograd inside the native program, right and said."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from external_models import ROWWISE, TOGETHER, Dense, Once, built
from torch import Tensor, nn

import flatcore as fc
from flatcore.capture.external import External
from flatcore.errors import FlatcoreWarning

TOLERANCE = 1e-9
DECOMPOSED = ("bilinear", "cosine_similarity")  # which leaves nothing without a rule
Function = Callable[[Tensor, Tensor], Tensor]


def operator_of(
    kind: type, model: nn.Module, loss: Callable[..., Tensor], batch: object, **options: object
) -> fc.Hessian:
    """The operator with its program made, and what it said of it left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        A = kind(fc.Objective(model, loss, batch), **options)
        A.plan()
    return A


def assert_equals(A: fc.Hessian, dense: Tensor, tolerance: float = TOLERANCE) -> None:
    assert dense.norm() > 1e-6
    for K in (1, 3):
        V = torch.randn(A.shape[0], K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
        expected = dense @ V
        assert ((A @ V.to(A.dtype)).double() - expected).norm() <= tolerance * expected.norm()


def is_partly_native(A: fc.Hessian) -> bool:
    plan = A.plan()
    return plan.backend == "native" and 0 < plan.native_fraction < 1


@pytest.mark.parametrize("name", [*ROWWISE, *TOGETHER])
def test_products(name: str) -> None:
    model, batch = built({**ROWWISE, **TOGETHER}[name])
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    dense = Dense(model, F.cross_entropy, batch)
    assert is_partly_native(H) or name in DECOMPOSED
    assert_equals(H, dense.hessian())
    assert_equals(fc.GGN(H.objective), dense.ggn())
    if name in ROWWISE:
        assert_equals(fc.GradientCovariance(H.objective, centered=False), dense.covariance())


def sigmoid_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), F.one_hot(y, 3).to(z)) + 0.1 * z.cummax(1)[0].square().mean()


@pytest.mark.parametrize("function", [lambda h, w: h * w, ROWWISE["cumprod"]])
@pytest.mark.parametrize("twice", [False, True])
def test_behind_the_cut_and_with_shared_weights(function: Function, twice: bool) -> None:
    model, batch = built(function, twice=twice)
    H = operator_of(fc.Hessian, model, sigmoid_loss, batch)
    dense = Dense(model, sigmoid_loss, batch)
    assert is_partly_native(H)
    assert_equals(H, dense.hessian())
    assert_equals(fc.GGN(H.objective), dense.ggn())
    assert_equals(fc.GradientCovariance(H.objective, centered=False), dense.covariance())


@pytest.mark.parametrize("params", [["inner.w"], ["first.*"], ["last.weight", "inner.w"]])
@pytest.mark.parametrize("name", ["scatter_add", "function", "twice the same"])
def test_any_inputs_active(name: str, params: list[str]) -> None:
    model, batch = built(ROWWISE[name])
    for parameter in model.parameters():  # an argument that is selected counts, whatever it says of itself
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)
        H = fc.Hessian(fc.Objective(model, F.cross_entropy, batch, params=params))
        product = H @ torch.ones(H.shape[0], dtype=H.dtype)
    assert not any(p.requires_grad for p in model.parameters())
    assert is_partly_native(H)
    dense = Dense(model, F.cross_entropy, batch)
    every = fc.Objective(model, F.cross_entropy, batch, params="*").parameter_slices
    places = torch.cat([torch.arange(every[n].start, every[n].stop) for n in H.parameter_slices])
    expected = dense.hessian()[places][:, places].sum(1)
    assert (product - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("name", ["topk indices", "own mask", "function of two outputs"])
def test_at_other_parameters_and_in_several_batches(name: str) -> None:
    model, (x, y) = built({**ROWWISE, **TOGETHER}[name])
    batches = [(x, y), (x[:3] + 1, y[:3])]
    H = operator_of(fc.Hessian, model, F.cross_entropy, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    parts = [Dense(model, F.cross_entropy, batch).hessian() * len(batch[0]) / 8 for batch in batches]
    assert_equals(H, parts[0] + parts[1])


def test_single_precision() -> None:
    model, (x, y) = built(ROWWISE["sort"])
    dense = Dense(model, F.cross_entropy, (x, y)).hessian()
    H = operator_of(fc.Hessian, model.float(), F.cross_entropy, (x.float(), y))
    # Rounding errors of a few hundred additions, in a sum that cancels by less than two digits.
    assert_equals(H, dense, tolerance=1e4 * torch.finfo(torch.float32).eps)


def test_casts_inside_are_those_of_the_model() -> None:
    model, batch = built(lambda h, w: h * (h * w).float().cumprod(1).double())
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert is_partly_native(H)
    assert_equals(
        H, Dense(model, F.cross_entropy, batch).hessian(), math.sqrt(torch.finfo(torch.float32).eps)
    )


def test_second_thread_and_inference_mode() -> None:
    model, batch = built(ROWWISE["function"])
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    V = torch.randn(H.shape[0], 3, dtype=torch.float64)
    expected, found = H @ V, []

    def work() -> None:
        found.append(H @ V)
        with torch.no_grad():
            found.append(H @ V)
        with torch.inference_mode():
            found.append(H @ V.clone())
            found.append(operator_of(fc.Hessian, model, F.cross_entropy, batch) @ V)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 4
    assert all(torch.equal(product, expected) for product in found)


@pytest.mark.parametrize("method", ["tangent", "adjoint"])
def test_exceptions_arrive_as_they_are(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built(ROWWISE["sort"])
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    V = torch.randn(H.shape[0], 3, dtype=torch.float64)
    expected = H @ V

    def fails(*_: object) -> None:
        raise KeyError("by the function")

    with monkeypatch.context() as patch:
        patch.setattr(External, method, fails)
        with pytest.raises(KeyError, match="by the function"):
            H @ V
    assert torch.equal(H @ V, expected)


def test_first_derivatives_only_where_no_more_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built(ROWWISE["sort"])
    G = operator_of(fc.GGN, model, sigmoid_loss, batch)
    seen: dict[str, set[bool]] = {}
    adjoint = External.adjoint

    def noting(
        self: External, inputs: object, tangents: object, dy: object, *rest: object
    ) -> list[Tensor | None]:
        seen.setdefault(self.name, set()).add(dy is not None)
        return adjoint(self, inputs, tangents, dy, *rest)

    G @ torch.ones(G.shape[0], dtype=G.dtype)
    monkeypatch.setattr(External, "adjoint", noting)
    G @ torch.ones(G.shape[0], dtype=G.dtype)
    assert seen == {
        "aten.sort.default": {False},
        "aten.binary_cross_entropy.default": {True},
        "aten.cummax.default": {True},
    }


def test_results_are_memory_of_their_own() -> None:
    identity = External("identity", lambda x: x, (3,), torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    y = identity.forward([x])
    y.zero_()
    (dx,) = identity.adjoint([x], [None], None, x[None], [True])
    dx.zero_()
    assert torch.equal(x, torch.ones(3, dtype=torch.float64))


def test_it_is_said_once_and_stands_in_the_plan() -> None:
    model, batch = built(lambda h, w: (h * w).sort(1)[0] * h.cumprod(1))
    objective = fc.Objective(model, F.cross_entropy, batch)
    H = fc.Hessian(objective)
    with pytest.warns(FlatcoreWarning) as caught:
        H @ torch.ones(H.shape[0], dtype=H.dtype)
    fc.GGN(objective).plan()  # any warning now is an error
    plan = H.plan()
    assert [str(w.message) for w in caught] == [
        "2 operations run through torch autograd inside the native program: aten.sort.default in 'inner', "
        "aten.cumprod.default in 'inner'; the results are right, and products slower than without"
    ]
    assert caught[0].filename == __file__
    assert [(row.kind, row.path) for row in plan.rows if not row.native] == [
        ("aten.sort.default", "inner"),
        ("aten.cumprod.default", "inner"),
    ]
    assert 0 < plan.native_fraction < 1
    assert "through autograd: aten.sort.default in 'inner', aten.cumprod.default in 'inner'" in str(plan)
    simple = operator_of(fc.Hessian, built(lambda h, w: h * w)[0], F.cross_entropy, batch).plan()
    assert plan.peak_bytes(8) > simple.peak_bytes(8) + 2 * 40 * 8  # at least the two outputs, saved


def test_what_is_not_twice_differentiable() -> None:
    model, batch = built(lambda h, w: Once.apply(h * w))
    objective = fc.Objective(model, F.cross_entropy, batch)
    for kind in (fc.Hessian, fc.GGN):
        with pytest.raises(
            ValueError,
            match=r"Once\.apply in module 'inner': torch cannot .* once only.*ask for the gradient covariance",
        ):
            kind(objective).to_dense()
    with pytest.warns(
        FlatcoreWarning, match=r"Once\.apply in module 'inner'.*; so products .* example by example"
    ):
        C = fc.GradientCovariance(objective, centered=False).to_dense()
    dense = Dense(model, F.cross_entropy, batch).covariance()
    assert (C - dense).norm() <= TOLERANCE * dense.norm()


def test_torch_has_no_second_derivative() -> None:
    model, batch = built(
        lambda h, w: h + torch.cdist(h * w, h, compute_mode="donot_use_mm_for_euclid_dist").sum(1)[:, None]
    )
    with pytest.raises(
        ValueError, match=r"aten\._cdist_forward\.default in module 'inner'.*is not implemented"
    ):
        fc.Hessian(fc.Objective(model, F.cross_entropy, batch)).to_dense()


class Skewed(torch.autograd.Function):
    """The derivative by the first half depends on the second, and not the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.cat([dy[:, :4] * x[:, 4:], dy[:, 4:]], 1)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        return x * table.mul_(2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clone(), None


def by_hand(h: Tensor, w: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def hidden(h: Tensor, w: Tensor) -> Tensor:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * w

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * w

    return Hidden.apply(h)


def numeric(h: Tensor, w: Tensor) -> Tensor:
    return h * float(numpy.sum(h.detach().numpy() > 0))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_hand, "cannot capture module 'inner': its control flow depends on tensor values"),
        (numeric, r"cannot capture module 'inner': torch\.export refused it"),
        (
            lambda h, w: Doubling.apply(h * w, h.new_ones(8)),
            r"Doubling\.apply in module 'inner': writes into its",
        ),
        (
            lambda h, w: h * h.sum().item(),
            r"_local_scalar_dense\.default in module 'inner': stops the gradient",
        ),
    ],
)
def test_what_leaves_the_whole_model_to_autograd(function: Function, reason: str) -> None:
    model, batch = built(function)
    H = fc.Hessian(fc.Objective(model, F.cross_entropy, batch))
    with pytest.warns(
        FlatcoreWarning, match=reason + ".*; so products of the whole model run through torch autograd"
    ):
        plan = H.plan()
    assert plan.native_fraction == 0
    assert "\n" not in plan.reason
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())


def test_a_function_that_hides_a_parameter_is_refused() -> None:
    model, batch = built(hidden)
    with (
        pytest.warns(
            FlatcoreWarning, match=r"Hidden\.apply in module 'inner': reads a parameter that is not among"
        ),
        pytest.raises(ValueError, match="not symmetric"),  # so its gradient is no gradient
    ):
        fc.Hessian(fc.Objective(model, F.cross_entropy, batch)).to_dense()


def test_a_second_derivative_that_is_not_symmetric_is_refused() -> None:
    model, batch = built(lambda h, w: Skewed.apply(h * w))
    with (
        pytest.warns(FlatcoreWarning, match=r"Skewed\.apply in module 'inner': .* not symmetric"),
        pytest.raises(ValueError, match="not symmetric"),
    ):
        fc.Hessian(fc.Objective(model, F.cross_entropy, batch)).to_dense()
