"""The attention rule: where tiles, groups of heads and ranges of directions end, and the memory that it declares.

The twin is the vocabulary's own definition in plain torch, whole matrices of probabilities, differentiated twice by
autograd. float64: relative error at most 1e-10. float32: at most twice the twin's, both against float64.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc
from flatcore._C import engine
from flatcore.bench.memory import peak_bytes
from flatcore.capture.interpreter import MEANING

EXACT = 1e-10
Shape = tuple[int, ...]


class Problem:
    """sum(weight * tanh(attention(q, k, v))) as a function of those of q, k, v that are named active.

    permuted: q, k, v and the output lie (batch, length, heads, width) in memory, as projections make them.
    """

    def __init__(
        self,
        q: Shape,
        k: Shape,
        v: Shape,
        mask: Tensor | None = None,
        active: str = "qkv",
        causal: bool = False,
        dtype: torch.dtype = torch.float64,
        permuted: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(0)

        def tensor(shape: Shape) -> Tensor:
            shape = (shape[0], shape[2], shape[1], shape[3]) if permuted else shape
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        self.dtype, self.causal, self.scale, self.mask, self.permuted = dtype, causal, 0.7, mask, permuted
        self.tensors = [tensor(q), tensor(k), tensor(v)]
        self.weight = tensor((*q[:3], v[3]))
        self.active = ["qkv".index(name) for name in active]
        leaves = [*self.tensors, mask if mask is not None else torch.zeros(1, dtype=dtype), self.weight]
        values: list[tuple[str, list[int]]] = [
            ("parameter" if i in self.active else "constant", list(t.shape)) for i, t in enumerate(leaves)
        ]
        ops: list[tuple[str, list[int], int, dict[str, object], str]] = []

        def emit(kind: str, inputs: list[int], shape: Shape, **attributes: object) -> int:
            values.append(("activation", list(shape)))
            ops.append((kind, inputs, len(values) - 1, attributes, "net"))
            return len(values) - 1

        swap = {"dims": [0, 2, 1, 3]}
        heads = [emit("permute", [i], s, **swap) for i, s in enumerate((q, k, v))] if permuted else [0, 1, 2]
        o = emit(
            "attention",
            [*heads, 3 if mask is not None else -1],
            (*q[:3], v[3]),
            causal=causal,
            scale=self.scale,
        )
        o = emit("permute", [o], tuple(self.weight.shape), **swap) if permuted else o
        y = emit("unary", [o], tuple(self.weight.shape), function="tanh", a=0.0, b=0.0, c=0.0)
        y = emit("mul", [y, 4], tuple(self.weight.shape))
        loss = emit("sum", [y], (), dims=[0, 1, 2, 3], keepdim=False, scale=1.0)
        offsets, self.P = {}, 0
        for i in self.active:
            offsets[i], self.P = self.P, self.P + self.tensors[i].numel()
        self.program = engine.Program(values, ops, offsets, self.P, loss, [o])
        self.state = engine.Linearization(self.program, dict(enumerate(leaves)), 1.0)

    def directions(self, K: int) -> Tensor:
        random = torch.Generator().manual_seed(K)
        return torch.randn(K, self.P, generator=random, dtype=torch.float64).to(self.dtype)

    def product(self, V: Tensor, mode: str = "hessian") -> Tensor:
        Y = torch.full_like(V, torch.nan)
        self.state.product(V, Y, mode, False, 1, 1.0)
        return Y

    def leaves(self) -> list[Tensor]:
        return [t.clone().requires_grad_(i in self.active) for i, t in enumerate(self.tensors)]

    def twin(self, V: Tensor, mode: str = "hessian") -> Tensor:
        leaves = self.leaves()
        heads = [t.transpose(1, 2) if self.permuted else t for t in leaves]
        o = MEANING["attention"](*heads, self.mask, self.causal, self.scale)
        o = o.transpose(1, 2) if self.permuted else o
        active = [leaves[i] for i in self.active]
        sizes = [t.numel() for t in active]
        rows = []
        if mode == "hessian":
            loss = (self.weight * o.tanh()).sum()
            first = torch.autograd.grad(loss, active, create_graph=True)
        else:  # the transposed Jacobian of o is linear in its cotangent: differentiate that for tangents
            cotangent = torch.zeros_like(o, requires_grad=True)
            first = torch.autograd.grad(o, active, cotangent, create_graph=True)
            curvature = (-2 * o.tanh() * (1 - o.tanh().square()) * self.weight).detach()
        for v in V:
            parts = [p.view(t.shape) for p, t in zip(v.split(sizes), active, strict=True)]
            if mode == "hessian":
                # A loss linear in an input has a gradient that does not depend on it.
                second = torch.autograd.grad(first, active, parts, retain_graph=True, allow_unused=True)
            else:
                (to,) = torch.autograd.grad(first, cotangent, parts, retain_graph=True)
                second = torch.autograd.grad(o, active, curvature * to, retain_graph=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(t) if s is None else s).flatten()
                        for s, t in zip(second, active, strict=True)
                    ]
                )
            )
        return torch.stack(rows)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def shapes(B: int, H: int, queries: int, keys: int, width: int = 4, value_width: int = 3) -> list[Shape]:
    return [(B, H, queries, width), (B, H, keys, width), (B, H, keys, value_width)]


# Tiles have at most 128 rows, fewer beyond 4096 keys; heads go together up to 2^19 logits.
SIZES = {
    "one row": (1, 2, 1, 5),
    "one tile": (2, 3, 7, 7),
    "rows not divisible": (1, 2, 130, 75),
    "three tiles": (1, 1, 257, 260),
    "many keys": (1, 1, 70, 8200),
    "few keys": (1, 2, 150, 9),
    "groups of entries": (5, 8, 120, 127),
    "groups of heads": (2, 21, 121, 240),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_tile_boundaries(size, permuted, causal):
    problem = Problem(*shapes(*size), causal=causal, permuted=permuted)
    V = problem.directions(3)
    assert relative(problem.product(V), problem.twin(V)) <= EXACT
    assert relative(problem.product(V, "ggn"), problem.twin(V, "ggn")) <= EXACT


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("active", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_any_inputs_active(active, K):
    problem = Problem(*shapes(2, 2, 140, 33), active=active, causal=True)
    V = problem.directions(K)
    assert relative(problem.product(V), problem.twin(V)) <= EXACT
    assert relative(problem.product(V, "ggn"), problem.twin(V, "ggn")) <= EXACT


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    "shape",
    [(3, 6, 140, 50), (3, 1, 140, 50), (1, 6, 140, 50), (3, 1, 1, 50), (1, 1, 140, 1), (140, 50), (6, 1, 50)],
)
def test_masks(shape, kind, causal):
    """Broadcast every way, with some rows that see no key at all where the mask is bool."""
    random = torch.Generator().manual_seed(1)
    mask = torch.randn(shape, generator=random, dtype=torch.float64)
    mask = mask > -0.3 if kind == "bool" else mask
    problem = Problem(*shapes(3, 6, 140, 50), mask=mask, causal=causal)
    V = problem.directions(2)
    assert relative(problem.product(V), problem.twin(V)) <= EXACT


def test_rows_that_see_no_key():
    mask = torch.ones(1, 1, 140, 50, dtype=torch.bool)
    mask[:, :, 3] = mask[:, :, 129:] = False
    problem = Problem(*shapes(1, 2, 140, 50), mask=mask)
    V = problem.directions(2)
    product = problem.product(V)
    assert relative(product, problem.twin(V)) <= EXACT
    of_queries = product[:, : 2 * 140 * 4].view(2, 2, 140, 4)
    assert of_queries[:, :, 3].count_nonzero() == of_queries[:, :, 129:].count_nonzero() == 0


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(
    "size", [(1, 3, 260, 100), (1, 1, 140, 140), (3, 3, 20, 20), (2, 8, 20, 20)], ids=str
)
@pytest.mark.parametrize("K", [1, 4])
def test_threads(size, K, threads):
    """Heads and directions that do not divide among the threads; every call gives the same bits."""
    problem = Problem(*shapes(*size), causal=True, permuted=True)
    V = problem.directions(K)
    expected = problem.twin(V)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        products = [problem.product(V) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert relative(products[0], expected) <= EXACT
    assert all(torch.equal(products[0], product) for product in products)


@pytest.mark.parametrize("causal", [False, True])
def test_float32(causal):
    sizes = shapes(1, 2, 300, 300, 64, 64)
    exact, single = Problem(*sizes, causal=causal), Problem(*sizes, causal=causal, dtype=torch.float32)
    # The twin in float64 at the very point and directions that float32 rounds to.
    exact.tensors = [t.double() for t in single.tensors]
    exact.weight = single.weight.double()
    V = single.directions(2)
    expected = exact.twin(V.double())
    assert relative(single.product(V), expected) <= 2 * relative(single.twin(V), expected)


class Block(nn.Module):
    """Self-attention of 8 heads of width 64."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal, self.project = causal, nn.Linear(512, 3 * 512, bias=False)

    def forward(self, x):
        heads = (part.unflatten(-1, (8, 64)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        o = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return o.transpose(1, 2).flatten(-2)


def test_module_agrees_with_double_backward():
    torch.manual_seed(0)
    model = Block(causal=True).double()
    x, y = torch.randn(2, 1, 140, 512, dtype=torch.float64)
    H = fc.Hessian(fc.Objective(model, nn.MSELoss(), (x, y)))
    v = torch.randn(H.shape[0], dtype=torch.float64)
    weight = model.project.weight
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(F.mse_loss(model(x), y), weight, create_graph=True)
        (second,) = torch.autograd.grad(first, weight, v.view_as(weight))
    assert relative(H @ v, second.flatten()) <= EXACT


def allocator_peak(run) -> int:
    gc.collect()  # what other tests left behind must not be freed meanwhile
    return peak_bytes(run)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("K", [1, 4])
def test_declared_memory(K, causal):
    """Of a program that holds little besides what attention holds, and of a module."""
    problem = Problem(*shapes(1, 2, 1024, 1024, 16, 16), causal=causal, dtype=torch.float32, permuted=True)
    V = problem.directions(K)
    Y = torch.empty_like(V)
    problem.product(V)
    real = allocator_peak(lambda: problem.state.product(V, Y, "hessian", False, 1, 1.0))
    assert real == pytest.approx(problem.program.peak_bytes("hessian", K, 4), rel=0.15)

    batch = (torch.randn(1, 1024, 512), torch.randn(1, 1024, 512))
    H = fc.Hessian(fc.Objective(Block(causal), nn.MSELoss(), batch))
    V = torch.randn(K, H.shape[0]).T
    H @ V  # the first product makes the state, which stays
    result = V.numel() * V.element_size()
    real = allocator_peak(lambda: H @ V) - result
    assert real == pytest.approx(H.plan().peak_bytes(K), rel=0.15)
