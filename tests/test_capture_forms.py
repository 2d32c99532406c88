"""What models write in their own way, and the program says in one op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatcore as fc
from tests.test_capture import FLOAT64, case_named, interpreted, program_of


def test_a_gelu_written_out_is_one_op() -> None:
    kinds = [
        op.attrs.get("function", op.kind)
        for op in program_of(*case_named("mlp-gelu_written").build(1, FLOAT64)).ops
    ]
    assert kinds == ["linear", "gelu_tanh", "linear", "gelu_tanh", "linear", "cross_entropy", "sum"]


class NearlyGelu(nn.Module):
    """GELU but for one number, or with a second reader of the number of that place."""

    def __init__(self, numbers: tuple[float, ...], read: bool) -> None:
        super().__init__()
        self.first, self.numbers, self.read = nn.Linear(6, 3), numbers, read

    def forward(self, x: Tensor) -> Tensor:
        half, power, cubic, scale, one = self.numbers
        z = self.first(x)
        cube = z**power
        t = torch.tanh(scale * (z + cubic * cube))
        y = half * z * (one + t)
        return y + t if self.read else y


def test_what_is_nearly_a_gelu_stays() -> None:
    gelu = (0.5, 3.0, 0.044715, (2 / torch.pi) ** 0.5, 1.0)
    wrong = (0.501, 2.0, 0.0447, 0.798, 1.001)
    others = [(gelu, True), *(((*gelu[:i], wrong[i], *gelu[i + 1 :]), False) for i in range(5))]
    batch = (torch.randn(4, 6, dtype=FLOAT64), torch.randint(3, (4,)))
    for numbers, read in [(gelu, False), *others]:
        model = NearlyGelu(numbers, read).to(FLOAT64)
        program = program_of(model, nn.CrossEntropyLoss(), batch)
        whole = any(op.attrs.get("function") == "gelu_tanh" for op in program.ops)
        assert whole == (numbers == gelu and not read)
        expected = F.cross_entropy(model(batch[0]), batch[1])
        assert abs(interpreted(program, model, nn.CrossEntropyLoss(), batch) - expected) < 1e-12


class MaskedAttention(nn.Module):
    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mask = nn.Linear(4, 4), mask

    def forward(self, x: Tensor) -> Tensor:  # (examples, 5, 4)
        h = self.first(x)
        i = torch.arange(5)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask(i, x)).mean(1)


MASKS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "bool": (True, lambda i, x: i[None] <= i[:, None]),
    "of every example": (True, lambda i, x: (i[None] <= i[:, None]).expand(len(x), 5, 5)),
    "added": (True, lambda i, x: torch.full((5, 5), -torch.inf, dtype=FLOAT64).triu(1)),
    "without the diagonal": (False, lambda i, x: (i[None] < i[:, None]) | (i[:, None] == 0)),
    "of the batch": (False, lambda i, x: (i[None] <= i[:, None]) & (x[..., :1] < 99)),
    "finite": (False, lambda i, x: torch.full((5, 5), -9.0, dtype=FLOAT64).triu(1)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_says_causal_is_none(name: str) -> None:
    causal, mask = MASKS[name]
    model = MaskedAttention(mask).to(FLOAT64)
    batch = (torch.randn(3, 5, 4, dtype=FLOAT64), torch.randint(4, (3,)))
    program = program_of(model, nn.CrossEntropyLoss(), batch)
    (op,) = (op for op in program.ops if op.kind == "attention")
    assert op.attrs["causal"] == causal
    assert (op.inputs[3] is None) == causal
    expected = F.cross_entropy(model(batch[0]), batch[1])
    assert abs(interpreted(program, model, nn.CrossEntropyLoss(), batch) - expected) < 1e-12


class Cumulative(nn.Module):
    """Sums along the examples, as in the partial likelihood of Cox, and along the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh().cumsum(-1).cumsum(0) / x.shape[0]


@pytest.mark.parametrize("size", [1, 256, 257, 289, 300])
def test_cumulative_sums_of_any_length(size: int) -> None:
    """Of many elements in pieces: as the sums of torch, and without a matrix of their square."""
    torch.manual_seed(0)
    model = Cumulative(size).to(FLOAT64)
    batch = (torch.randn(261, 2, dtype=FLOAT64), torch.randn(261, size, dtype=FLOAT64))
    program = program_of(model, nn.MSELoss(), batch)
    expected = F.mse_loss(model(batch[0]), batch[1])
    assert abs(interpreted(program, model, nn.MSELoss(), batch) - expected) <= 1e-12 * expected
    # x, z, y and what is padded around them, and triangles of up to 256 elements a side
    assert max(value.numel for value in program.values) <= max(256**2, 289 * (size + 40))
    V = torch.randn(3 * size, 1, dtype=FLOAT64)
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters, create_graph=True)])
    exact = torch.cat([h.flatten() for h in torch.autograd.grad(gradient @ V[:, 0], parameters)])
    product = fc.Hessian(fc.Objective(model, nn.MSELoss(), batch)) @ V[:, 0]
    assert (product - exact).norm() <= 1e-12 * exact.norm()
