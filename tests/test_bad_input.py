"""Every fault gets one sentence that names the argument, what was expected and what came; nothing is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untouched import one_thread, untouched

import flatcore as fc

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.randn(5, 4), torch.randint(0, 3, (5,))
CE = nn.CrossEntropyLoss()


def mlp(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Linear(6, 3)).eval()


def check(error: BaseException, *words: str) -> None:
    message = str(error)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert len(message) < 400


def refused(
    model: Any, loss: Any, data: Any, *words: str, params: Any = None, **options: Any
) -> BaseException:
    guard = untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with guard, pytest.raises((ValueError, TypeError)) as caught:
        fc.Objective(model, loss, data, params, **options)
    check(caught.value, *words)
    return caught.value


# --- model and parameters ---


def test_model_is_not_a_module() -> None:
    refused(lambda x: x, CE, (X, Y), "model:", "torch.nn.Module", "function")
    refused(nn.Linear, CE, (X, Y), "model:", "the class Linear", "make one of it")
    refused(mlp(), nn.CrossEntropyLoss, (X, Y), "loss:", "the class CrossEntropyLoss", "make one of it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 3))]
)
def test_model_of_jit(compiled: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got one of torch\.jit"):
        fc.Objective(compiled(nn.Linear(3, 2)), nn.MSELoss(), (torch.ones(1, 3), torch.ones(1, 2)))
    inside = nn.Sequential(compiled(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match=r"got one of torch\.jit as '0', whose"):
        fc.Objective(inside, nn.MSELoss(), (torch.ones(1, 3), torch.ones(1, 2)))


def test_no_trainable_parameter() -> None:
    refused(mlp().requires_grad_(False), CE, (X, Y), "model:", "requires_grad", "none of 4", "params=")


def test_model_without_parameters() -> None:
    refused(nn.Tanh(), CE, (X, Y), "model:", "none of 0")
    refused(nn.CrossEntropyLoss(), mlp(), (X, Y), "model:", "CrossEntropyLoss without", "the model first")
    refused(mlp().to("meta"), CE, (X, Y), "model:", "device meta", "to_empty()")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("0.wieght", ["params:", "'0.wieght'", "did you mean '0.weight'"]),
        ("0", ["params:", "'0'", "did you mean '0.*'"]),
        (["0.weight", "3.*"], ["params:", "glob", "'3.*'"]),
        ([], ["params:", "at least one", "none"]),
        (lambda name, p: False, ["params:", "callable", "none of 4"]),
        (3, ["params:", "int"]),
        ([3], ["params:", "strings", "int"]),
    ],
)
def test_selection(params: Any, words: list[str]) -> None:
    refused(mlp(), CE, (X, Y), *words, params=params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_dtype_of_parameters(dtype: torch.dtype) -> None:
    model = mlp()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    refused(model, CE, (X.to(dtype), Y), "model:", "float32 or float64", str(dtype), "'0.weight'")


def test_integer_parameters() -> None:
    model = mlp()
    model.steps = nn.Parameter(torch.arange(3), requires_grad=False)
    refused(model, CE, (X, Y), "model:", "torch.int64", "'steps'", params="steps")


def test_several_dtypes() -> None:
    model = mlp()
    model[1].double()
    refused(model, CE, (X, Y), "model:", "one dtype", "'0.weight'", "'1.weight'")


def test_several_devices() -> None:
    model = mlp()
    model[1].to("meta")
    refused(model, CE, (X, Y), "model:", "one device", "meta", "'1.weight'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_not_finite(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[1].bias[1] = value
    refused(model, CE, (X, Y), "model:", "finite", "1 of 3", "'1.bias'")


def test_parameters_that_become_not_finite() -> None:
    model = mlp()
    H = fc.Hessian(fc.Objective(model, CE, (X, Y)))
    with torch.no_grad():
        model[1].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*'1\.bias'"):
        H @ torch.ones(H.shape[0])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Dropout(0.2), ["'1'", "Dropout", "p = 0.2"]),
        (nn.BatchNorm1d(6), ["'1'", "BatchNorm1d"]),
        (nn.AlphaDropout(0.5), ["'1'", "AlphaDropout"]),
        (nn.Sequential(nn.RReLU()), ["'1.0'", "RReLU"]),
    ],
)
def test_layers_left_in_train_mode(layer: nn.Module, words: list[str]) -> None:
    refused(mlp(layer).train(), CE, (X, Y), "model:", "train mode", "model.eval()", *words)


def test_dropout_of_nothing_and_layers_in_eval_mode_are_fine() -> None:
    fc.Objective(mlp(nn.Dropout(0.0)).train(), CE, (X, Y))
    model = mlp(nn.Dropout(0.3), nn.BatchNorm1d(6)).train()
    model[1].eval()
    model[2].eval()
    fc.Objective(model, CE, (X, Y))


def test_train_mode_after_construction() -> None:
    model = mlp(nn.Dropout(0.2))
    H = fc.Hessian(fc.Objective(model, CE, (X, Y)))
    model.train()
    with pytest.raises(ValueError, match=r"train mode.*'1'"):
        H @ torch.ones(H.shape[0])


class GaussianNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_loss_that_differs_between_two_evaluations() -> None:
    refused(mlp(GaussianNoise()), CE, (X, Y), "model:", "same loss", "'1' (GaussianNoise)")
    refused(mlp().train(), lambda z, y: CE(F.dropout(z), y), (X, Y), "model:", "same loss", "train mode")
    refused(
        mlp(), lambda z, y: CE(z + torch.randn_like(z), y), (X, Y), "model:", "same loss", "draw them once"
    )


def test_covariance_with_normalisation_over_the_batch() -> None:
    objective = fc.Objective(mlp(nn.BatchNorm1d(6, track_running_stats=False)), CE, (X, Y))
    with pytest.raises(ValueError) as caught:
        fc.GradientCovariance(objective)
    check(caught.value, "model:", "interact", "'1'", "BatchNorm1d")


# --- loss ---


def test_loss_is_not_callable() -> None:
    refused(mlp(), 1.0, (X, Y), "loss:", "callable", "float")


def test_loss_is_not_scalar() -> None:
    refused(
        mlp(),
        nn.CrossEntropyLoss(reduction="none"),
        (X, Y),
        "loss:",
        "one number",
        "(5,)",
        'reduction="mean"',
    )


def test_loss_is_not_a_tensor() -> None:
    refused(mlp(), lambda z, y: CE(z, y).item(), (X, Y), "loss:", "tensor", "float")


def test_loss_does_not_depend_on_the_parameters() -> None:
    refused(mlp(), lambda z, y: CE(z.detach(), y), (X, Y), "loss:", "depend", "detach()")


def test_loss_is_not_finite() -> None:
    refused(mlp(), lambda z, y: CE(z, y) / 0, (X, Y), "loss:", "finite", "inf")
    refused(mlp(), CE, [(X, Y), (X * float("nan"), Y)], "loss:", "finite", "nan", "batch 1")


def test_sum_over_several_batches() -> None:
    words = ("loss:", "2 batches", 'reduction="sum"', 'reduction="mean"')
    refused(mlp(), nn.CrossEntropyLoss(reduction="sum"), [(X, Y), (X, Y)], *words)
    refused(mlp(), lambda z, y: F.mse_loss(z, z.detach() + 1, reduction="sum"), [(X, Y), (X, Y)], *words)
    fc.Objective(mlp(), nn.CrossEntropyLoss(reduction="sum"), [(X, Y)])


def test_hf_loss_without_labels() -> None:
    refused(mlp(), fc.hf_loss(), (X,), "data:", ".loss", "labels")


@pytest.mark.parametrize("operator", [fc.GGN, fc.GradientCovariance])
def test_no_gauss_newton_where_the_loss_sees_the_parameters(operator: type) -> None:
    model = mlp()
    penalised = fc.ModelLoss(lambda m, b: CE(m(b[0]), b[1]) + sum(p.square().sum() for p in m.parameters()))
    A = operator(fc.Objective(model, penalised, (X, Y)))
    if operator is fc.GGN:
        with untouched(model), pytest.raises(ValueError) as caught:
            A @ torch.ones(A.shape[0])
        check(caught.value, "loss:", "Gauss-Newton")
    else:
        with pytest.warns(fc.errors.FlatcoreWarning):  # example by example
            A @ torch.ones(A.shape[0])


# --- data ---


class Empty:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def exhausted() -> Iterator[Any]:
    generator = iter([(X, Y)])
    list(generator)
    return generator


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ["None"]),
        ([], ["at least one batch", "none"]),
        (Empty(), ["at least one batch", "none"]),
        ((), ["at least one tensor", "empty tuple"]),
        ({}, ["at least one tensor", "empty dict"]),
        (((X, Y) for _ in range(2)), ["one-shot", "generator", "list(data)"]),
        (exhausted(), ["one-shot", "list(data)"]),
        (3, ["int", "a list of batches"]),
        ([(X[:0], Y[:0])], ["at least one example", "batch 0"]),
        ([(X, torch.full((5,), -100))], ["not ignored"]),
    ],
)
def test_no_data(data: Any, words: list[str]) -> None:
    refused(mlp(), CE, data, "data:", *words)


def test_a_batch_of_the_wrong_form() -> None:
    refused(mlp(), CE, (X,), "batch:", "(inputs..., target)")
    refused(mlp(), CE, [X, X], "batch:", "(inputs..., target)", "Tensor")
    refused(mlp(), CE, {"x": X, "z": Y}, "batch:", "target", "x, z")


def test_a_batch_the_model_rejects() -> None:
    error = refused(
        mlp(), CE, [(X, Y), (X[:, :3], Y)], "data:", "rejected", "batch 1", "(5, 3)", "RuntimeError", "mat1"
    )
    assert isinstance(error.__cause__, RuntimeError)
    error = refused(mlp(), CE, (X, torch.full((5,), 7)), "data:", "rejected", "out of bounds")
    assert isinstance(error.__cause__, IndexError)
    refused(mlp(), CE, (X.double(), Y), "data:", "rejected", "dtype")


class Shrinking:
    """Gives one batch less on every pass."""

    def __init__(self) -> None:
        self.left = 5

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        return iter([(X, Y)] * self.left)


def test_a_loader_that_does_not_repeat() -> None:
    refused(mlp(), CE, Shrinking(), "data:", "4 batches: 5, 5, 5, 5", "3 batches: 5, 5, 5", memory=100)


@pytest.mark.parametrize("memory", [0, -1, 1.5, True])
def test_memory(memory: Any) -> None:
    refused(mlp(), CE, (X, Y), "memory:", "positive", repr(memory), memory=memory)


# --- operators and vectors ---


def test_operator_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective, got Sequential"):
        fc.Hessian(mlp())  # type: ignore[arg-type]


P = 51


def parts(**changes: Any) -> dict[str, Any]:
    return {name: torch.ones_like(p) for name, p in mlp().named_parameters()} | changes


VECTORS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("length", lambda: torch.ones(P + 1), ["V:", f"({P},)", f"({P + 1},)"]),
    ("transposed", lambda: torch.ones(3, P), ["V:", f"(3, {P})", "V.T"]),
    ("three axes", lambda: torch.ones(P, 2, 2), ["V:", f"({P}, 2, 2)"]),
    ("no axis", lambda: torch.ones(()), ["V:", "()"]),
    ("dtype", lambda: torch.ones(P, dtype=torch.float64), ["V:", "torch.float32", "torch.float64", ".to("]),
    ("integers", lambda: torch.ones(P, dtype=torch.int64), ["V:", "torch.int64"]),
    ("device", lambda: torch.ones(P, device="meta"), ["V:", "cpu", "meta"]),
    ("sparse", lambda: torch.ones(P).to_sparse(), ["V:", "dense", "torch.sparse_coo", ".to_dense()"]),
    ("sparse part", lambda: parts(**{"0.bias": torch.ones(6).to_sparse()}), ["V['0.bias']:", "dense"]),
    ("list", lambda: [1.0] * P, ["V:", "torch.Tensor", "list"]),
    ("number", lambda: 2.0, ["V:", "torch.Tensor", "float"]),
    ("unknown name", lambda: parts(wieght=torch.ones(3)), ["V:", "'wieght'"]),
    ("missing name", lambda: {"0.weight": torch.ones(6, 4)}, ["V:", "'0.bias'"]),
    ("shape of a part", lambda: parts(**{"0.bias": torch.ones(5)}), ["V['0.bias']:", "(6,)", "(5,)"]),
    ("columns of a part", lambda: parts(**{"0.bias": torch.ones(6, 2)}), ["V['0.bias']:", "(6, 2)"]),
    (
        "dtype of a part",
        lambda: parts(**{"0.bias": torch.ones(6).double()}),
        ["V['0.bias']:", "torch.float64"],
    ),
    ("kind of a part", lambda: parts(**{"0.bias": 1.0}), ["V['0.bias']:", "float"]),
]


@pytest.mark.parametrize(("make", "words"), [v[1:] for v in VECTORS], ids=[v[0] for v in VECTORS])
def test_vectors(make: Callable[[], Any], words: list[str]) -> None:
    model = mlp()
    H = fc.Hessian(fc.Objective(model, CE, (X, Y)))
    with untouched(model), pytest.raises((ValueError, TypeError)) as caught:
        H @ make()
    check(caught.value, *words)


def test_dense_matrix_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatcore import operators

    H = fc.Hessian(fc.Objective(mlp(), CE, (X, Y)))
    monkeypatch.setattr(operators, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"to_dense: expected .* P = 51.* GiB"):
        H.to_dense()
