"""The table of scalar functions (csrc/kernels/functions.h): value, first and second derivative against autograd.

Each function runs through a program of one `unary` op on a parameter, so that value, gradient and Hessian diagonal
of sum(f(z)) are f, f' and f''.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flatcore._C import engine

# name -> (constants, torch's function, points where it is smooth)
SIGNED = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64) + 0.013
POSITIVE = torch.linspace(0.05, 6.0, 67, dtype=torch.float64)
FUNCTIONS = {
    "relu": ({}, F.relu, SIGNED),
    "leaky_relu": ({"a": 0.07}, lambda z: F.leaky_relu(z, 0.07), SIGNED),
    "elu": ({"a": 1.3, "b": 1.1, "c": 0.8}, lambda z: torch.ops.aten.elu(z, 1.3, 1.1, 0.8), SIGNED),
    "gelu": ({}, F.gelu, SIGNED),
    "gelu_tanh": ({}, lambda z: F.gelu(z, approximate="tanh"), SIGNED),
    "silu": ({}, F.silu, SIGNED),
    "tanh": ({}, torch.tanh, SIGNED),
    "sigmoid": ({}, torch.sigmoid, SIGNED),
    "softplus": ({"a": 1.7, "b": 5.0}, lambda z: F.softplus(z, 1.7, 5.0), SIGNED),
    "square": ({}, torch.square, SIGNED),
    "abs": ({}, torch.abs, SIGNED),
    "smooth_l1": (
        {"a": 0.6},
        lambda z: F.smooth_l1_loss(z, torch.zeros_like(z), beta=0.6, reduction="none"),
        SIGNED,
    ),
    "huber": (
        {"a": 0.6},
        lambda z: F.huber_loss(z, torch.zeros_like(z), delta=0.6, reduction="none"),
        SIGNED,
    ),
    "exp": ({}, torch.exp, SIGNED),
    "log": ({}, torch.log, POSITIVE),
    "sqrt": ({}, torch.sqrt, POSITIVE),
    "rsqrt": ({}, torch.rsqrt, POSITIVE),
    "reciprocal": ({}, torch.reciprocal, SIGNED),
    "pow": ({"a": 2.5}, lambda z: z**2.5, POSITIVE),
    "sin": ({}, torch.sin, SIGNED),
    "cos": ({}, torch.cos, SIGNED),
    "clamp": ({"a": -1.5, "b": 2.5}, lambda z: z.clamp(-1.5, 2.5), SIGNED),
    "hardtanh": ({"a": -1.5, "b": 2.5}, lambda z: F.hardtanh(z, -1.5, 2.5), SIGNED),
    "hardsigmoid": ({}, lambda z: F.relu6(z + 3) / 6, SIGNED),  # torch has no second derivative of its own
    "hardswish": ({}, F.hardswish, SIGNED),
    "mish": ({}, F.mish, SIGNED),
    "erf": ({}, torch.erf, SIGNED),
    "log1p": ({}, torch.log1p, POSITIVE),
    "expm1": ({}, torch.expm1, SIGNED),
    "step": ({}, lambda z: (z > 0).to(z) + 0 * z, SIGNED),
}


def derivatives(name, constants, z):
    """f, f' and f'' at the points z, through the engine."""
    n = z.numel()
    program = engine.Program(
        [("parameter", [n]), ("activation", [n]), ("activation", [])],
        [
            ("unary", [0], 1, {"function": name, **constants}, "f"),
            ("sum", [1], 2, {"dims": [0], "keepdim": False, "scale": 1.0}, "sum"),
        ],
        {0: 0},
        n,
        2,
        [1],
    )
    state = engine.Linearization(program, {0: z}, 1.0)
    first, second = torch.empty_like(z), torch.empty(1, n, dtype=z.dtype)
    state.gradient(first, False)
    state.product(torch.ones(1, n, dtype=z.dtype), second, "hessian", False, n, n)
    return state.loss, first, second[0]


def reference(function, z):
    z = z.detach().requires_grad_()
    value = function(z).sum()
    (first,) = torch.autograd.grad(value, z, create_graph=True)
    if not first.requires_grad:
        return value, first, torch.zeros_like(z)
    (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True)
    return value, first, torch.zeros_like(z) if second is None else second


def test_table_is_complete():
    source = (Path(__file__).parents[1] / "csrc/kernels/functions.h").read_text()
    listed = {line.split('"')[1] for line in source.splitlines() if line.strip().startswith('X("')}
    assert listed == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    constants, function, z = FUNCTIONS[name]
    value, first, second = derivatives(name, constants, z)
    expected_value, expected_first, expected_second = reference(function, z)
    # Each derivative is a short expression in functions good to 4 ulp; 64 eps leaves room for some cancellation.
    tolerance = 64 * torch.finfo(z.dtype).eps
    assert math.isclose(value, expected_value.item(), rel_tol=tolerance, abs_tol=tolerance * z.numel())
    for got, expected in [(first, expected_first), (second, expected_second)]:
        assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_as_good_as_torch(name):
    constants, function, points = FUNCTIONS[name]
    z = points.float()
    _, first, second = derivatives(name, constants, z)
    _, *exact = reference(function, z.double())
    _, *torch32 = reference(function, z)
    for got, mine, theirs in zip([first, second], exact, torch32, strict=True):
        floor = 2e-6 * max(1.0, mine.abs().max().item())
        assert (got - mine).abs().max() <= max(2 * (theirs - mine).abs().max().item(), floor)


@pytest.mark.parametrize(
    ("name", "z", "first"),
    [("clamp", -1.5, 1), ("clamp", 2.5, 1), ("hardtanh", -1.5, 0), ("hardtanh", 2.5, 0)],
)
def test_ends_of_an_interval_are_torchs(name, z, first):
    constants, function, _ = FUNCTIONS[name]
    point = torch.tensor([z], dtype=torch.float64)
    assert derivatives(name, constants, point)[1] == reference(function, point)[1] == first


@pytest.mark.parametrize("z", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("name", ["elu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "mish"])
def test_saturated_arguments_stay_finite(name, z):
    constants, function, _ = FUNCTIONS[name]
    for dtype in (torch.float32, torch.float64):
        point = torch.tensor([z], dtype=dtype)
        _, first, second = derivatives(name, constants, point)
        expected = reference(function, point)
        torch.testing.assert_close(first, expected[1])
        assert second.isfinite().all()


def test_unknown_function_is_named():
    with pytest.raises(ValueError, match="unknown function 'tanhh'"):
        derivatives("tanhh", {}, SIGNED)
