"""Backward passes that are no derivatives, sizes that the data decide, gradients and sparse tensors inside a model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from external_models import WIDTH, Dense, Square, built
from test_external import assert_equals, is_partly_native, operator_of
from torch import Tensor

import flatcore as fc
from flatcore.capture.external import External
from flatcore.errors import FlatcoreWarning


class Clipped(torch.autograd.Function):
    """The identity, with a backward that is linear for small gradients only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.clamp(-3, 3)


class Detaching(torch.autograd.Function):
    """sin(x) + x; the backward detaches half of the gradient it is given, so its transpose is not J."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin() + x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.detach() * ctx.saved_tensors[0].cos() + dy


@pytest.mark.parametrize("function", [Clipped, Detaching])
def test_a_backward_that_is_no_transpose(function: Any) -> None:
    model, batch = built(lambda h, w: function.apply(h * w))
    objective = fc.Objective(model, F.cross_entropy, batch)
    with (
        pytest.warns(FlatcoreWarning, match=r"\.apply in module 'inner': its backward is not linear"),
        pytest.raises(ValueError, match=r"expected a backward pass that is linear .* no Gauss-Newton matrix"),
    ):
        fc.GGN(objective).plan()
    if function is Clipped:  # of the gradients of this loss it clips none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlatcoreWarning)
            assert_equals(fc.Hessian(objective), Dense(model, F.cross_entropy, batch).hessian())


def test_a_backward_that_mixes_gradient_and_data_in_single_precision() -> None:
    def exponential(h: Tensor, w: Tensor) -> Tensor:
        return (torch.matrix_exp(h[:, :, None] * w) @ h[..., None])[..., 0]

    model, (x, y) = built(exponential)
    dense = Dense(model, F.cross_entropy, (x, y)).hessian()
    H = operator_of(fc.Hessian, model.float(), F.cross_entropy, (x.float(), y))
    assert is_partly_native(H)
    # Rounding errors of a few hundred additions, in exponentials of matrices of norm less than ten.
    assert_equals(H, dense, tolerance=1e4 * torch.finfo(torch.float32).eps)


class SavedInside(torch.autograd.Function):
    """sin(x), saving a tensor made inside: torch takes it for a constant and has no second derivative of x in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.cos())
        return x.sin()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class Kinked(torch.autograd.Function):
    """max(x, 0) + sin(x), tried where x is at the kink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0) + x.sin()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * ((x > 0).to(x) + x.cos())


def test_a_second_derivative_that_torch_lacks_is_said() -> None:
    model, batch = built(lambda h, w: SavedInside.apply(h * w))
    H = fc.Hessian(fc.Objective(model, F.cross_entropy, batch))
    with pytest.warns(
        FlatcoreWarning,
        match=r"SavedInside\.apply \(torch's second derivative of it is not .* no better than these derivatives",
    ):
        plan = H.plan()
    assert "is not the derivative of its first" in str(plan)
    for function in (lambda h, w: Kinked.apply((h * w).relu()), lambda h, w: Square.apply(h * w, 0.7)):
        model, batch = built(function)
        H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
        assert is_partly_native(H)
        assert "not the derivative" not in str(H.plan())


class KeepsGraph(torch.autograd.Function):
    """sin(x), with a gradient that comes with its own graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            return torch.autograd.grad(x.sin(), x, dy, create_graph=True)[0]


def test_products_carry_no_graph() -> None:
    model, batch = built(lambda h, w: KeepsGraph.apply(h * w))
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())
    function = External("keeps", KeepsGraph.apply, (3,), torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    (dx,) = function.adjoint([x], [None], None, x[None], [True])
    assert not dx.requires_grad


def test_tensors_hidden_from_the_trace() -> None:
    model, batch = built(lambda h, w: h * w + h.data)
    H = fc.Hessian(fc.Objective(model, F.cross_entropy, batch))
    with pytest.warns(FlatcoreWarning, match="cannot capture the model: it hides tensors from the trace"):
        assert H.plan().native_fraction == 0
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())


def chosen_rows(h: Tensor, w: Tensor) -> Tensor:
    """Rows picked by the data: how many is a size in the graph that no decomposition removes."""
    out = torch.zeros_like(h)
    for k in range(2):
        (rows,) = torch.where(h[:, 0] > 0 if k else h[:, 0] <= 0)
        out = out.index_add(0, rows, h[rows] * w ** (k + 1))
    return out


def test_sizes_that_the_data_decide_end_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    run = torch.export.ExportedProgram.run_decompositions

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(args)
        assert len(calls) < 10
        return run(self, *args, **named)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    model, batch = built(chosen_rows)
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert is_partly_native(H)
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())


def penalised(h: Tensor, w: Tensor, create_graph: bool = True) -> Tensor:
    if not h.requires_grad:  # where the shapes are looked at
        return h * w
    y = (h * w).sin()
    (g,) = torch.autograd.grad(y.square().sum(), h, create_graph=create_graph, retain_graph=True)
    return y + g


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_that_the_model_takes_itself(create_graph: bool) -> None:
    model, batch = built(lambda h, w: penalised(h, w, create_graph))
    model.inner.function = lambda h, w: penalised(h.requires_grad_(), w, create_graph)
    H = fc.Hessian(fc.Objective(model, F.cross_entropy, batch))
    if create_graph:
        assert H.plan().native_fraction == 1
    else:
        with pytest.warns(
            FlatcoreWarning, match="without create_graph in module 'inner': stops the gradient"
        ):
            assert H.plan().native_fraction == 0
    dense = Dense(model, F.cross_entropy, batch)
    assert_equals(H, dense.hessian())
    assert_equals(fc.GGN(H.objective), dense.ggn())


@pytest.mark.parametrize("mode", ["sparse matrix", "sparse values"])
def test_sparse_tensors_inside_the_model(mode: str) -> None:
    def product(h: Tensor, w: Tensor) -> Tensor:
        if mode == "sparse values":
            return h * w + (h * w).to_sparse().to_dense()
        return torch.sparse.mm(torch.eye(WIDTH, dtype=h.dtype).mul(2).to_sparse(), (h * w).T).T

    model, batch = built(product)
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert H.plan().peak_bytes(1) > 0
    assert len(H.plan().reason) < 400
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())


def test_torch_func_inside_the_model() -> None:
    def derivatives(h: Tensor, w: Tensor) -> Tensor:
        return h + torch.vmap(torch.func.jacrev(lambda row: (row * w).sin()))(h).sum(-1)

    model, batch = built(derivatives)
    H = operator_of(fc.Hessian, model, F.cross_entropy, batch)
    assert H.plan().peak_bytes(1) > 0
    assert_equals(H, Dense(model, F.cross_entropy, batch).hessian())
