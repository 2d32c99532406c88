"""Cross-entropy fused with its linear layer: against torch.func, against the unfused ops, and what it keeps in memory.

The heads are small, so that a dense reference is cheap; `fused` lifts the bound under which they would stay apart.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_heads import CLASSES, HEADS, Head, Tied, classes, flattened, tokens
from reference import Reference
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import flatcore as fc
from flatcore.capture import capture, fuse
from flatcore.capture.program import Program

EXACT = 1e-10
FLOOR32 = 2e-6
VECTORS = (1, 3, 8)
KIND = "linear_cross_entropy"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "LEAST_CLASSES", 2)


def directions(P: int, K: int) -> Tensor:
    return torch.randn(P, K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def kinds(operator: Any) -> list[str]:
    return [row.kind for row in operator.plan().rows]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_products(head: Head, operator: str) -> None:
    if operator == "ggn" and head.kind == "model_batch":
        pytest.skip("the reference of a GGN needs the output")
    A = {"hessian": fc.Hessian, "ggn": fc.GGN}[operator](head.objective())
    assert KIND in kinds(A) and "cross_entropy" not in kinds(A)
    dense = getattr(head.reference(), operator)()
    for K in VECTORS:
        V = directions(A.shape[0], K)
        assert relative(A @ V, dense @ V) <= EXACT


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("head", [h for h in HEADS if h.plain_mean], ids=str)
def test_gradient_covariance(head: Head) -> None:
    objective = head.objective()
    C = fc.GradientCovariance(objective, centered=False)
    assert C.plan().native_fraction == 1.0 and KIND in kinds(C)
    dense = head.reference().covariance(objective.examples)
    for K in VECTORS:
        V = directions(C.shape[0], K)
        assert relative(C @ V, dense @ V) <= EXACT


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN, fc.GradientCovariance])
def test_as_without_fusion(head: Head, operator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = operator(head.objective())
    V = directions(apart.shape[0], 3)
    expected = apart @ V
    assert KIND not in kinds(apart)
    monkeypatch.setattr(fuse, "LEAST_CLASSES", 2)
    together = operator(head.objective())
    assert relative(together @ V, expected) <= EXACT
    assert together.plan().backend == apart.plan().backend


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_float32(head: Head) -> None:
    """No worse than twice autograd's error in float32, both against float64 at the same parameters."""
    H = fc.Hessian(head.objective(torch.float32))
    exact, single = head.reference(), head.reference(torch.float32)
    exact.flat.copy_(single.flat)
    dense, dense32 = exact.hessian(), single.hessian()
    for K in VECTORS:
        V = directions(H.shape[0], K).float()
        truth = dense @ V.double()
        assert relative(H @ V, truth) <= max(2 * relative(dense32 @ V, truth), FLOOR32)


@pytest.mark.usefixtures("fused")
def test_batches_with_different_numbers_of_targets() -> None:
    model, loss, _ = HEADS[0].build()
    torch.manual_seed(5)
    x, y = torch.randn(9, 3).double(), classes(9).where(torch.arange(9) % 4 > 0, -100)
    H = fc.Hessian(fc.Objective(model, loss, [(x[:5], y[:5]), (x[5:], y[5:])]))
    assert KIND in kinds(H)
    V = directions(H.shape[0], 3)
    assert relative(H @ V, Reference(model, loss, (x, y), "output_target").hessian() @ V) <= EXACT


@pytest.mark.usefixtures("fused")
def test_a_batch_of_ignored_targets_alone_counts_for_nothing() -> None:
    model, _, (x, y) = HEADS[0].build()
    loss = nn.CrossEntropyLoss(reduction="sum")
    H = fc.Hessian(fc.Objective(model, lambda o, t: loss(o, t) / 9, (x, torch.full_like(y, -100))))
    assert KIND in kinds(H)
    assert (H @ directions(H.shape[0], 3)).count_nonzero() == 0


# --- several chunks of rows ---


def test_three_chunks() -> None:
    """The last one ragged: 16,384 classes are 1,024 rows a chunk. The reference goes through blocks of rows."""
    N, V, width = 2100, 16384, 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, V)).double()
    x, y = torch.randn(N, 2).double(), torch.randint(V, (N,)).where(torch.rand(N) < 0.9, -100)
    H = fc.Hessian(fc.Objective(model, nn.CrossEntropyLoss(), (x, y)))
    assert KIND in kinds(H)
    v, mixture = directions(H.shape[0], 2), torch.tensor([1.0, -2.0]).double()
    parameters = list(model.parameters())
    pieces = (v @ mixture).split([p.numel() for p in parameters])
    expected = torch.zeros(H.shape[0]).double()
    for rows in torch.arange(N).split(700):
        loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / (y >= 0).sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((g * t.view_as(g)).sum() for g, t in zip(first, pieces, strict=True))
        expected += torch.cat([s.reshape(-1) for s in torch.autograd.grad(inner, parameters)])
    assert relative((H @ v) @ mixture, expected) <= EXACT


# --- what is fused ---


def program_of(model: nn.Module, loss: Callable[..., Tensor], batch: Any) -> Program:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return capture(model, loss, batch, selected=names, loss_kind="output_target")


def op_kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops]


def test_small_heads_stay_apart() -> None:
    assert op_kinds(program_of(*HEADS[0].build()))[-3:] == ["linear", "cross_entropy", "sum"]
    for width, expected in ((fuse.LEAST_CLASSES, True), (fuse.LEAST_CLASSES - 1, False)):
        model = nn.Linear(2, width)
        batch = torch.randn(3, 2), torch.randint(width, (3,))
        assert (KIND in op_kinds(program_of(model, nn.CrossEntropyLoss(), batch))) == expected


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: F.cross_entropy(o, t) + 0.1 * o.square().mean(),
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
        lambda o, t: F.cross_entropy(o, F.one_hot(t, CLASSES).to(o.dtype)),
        lambda o, t: F.cross_entropy(2.0 * o, t),
        lambda o, t: F.cross_entropy(o[:, 1:], (t - 1).clamp(0)),
        lambda o, t: F.cross_entropy(o.t(), t[:CLASSES] % 3),
    ],
    ids=["read twice", "smoothed", "probabilities", "scaled", "some classes", "other axis"],
)
def test_what_is_no_head_stays_as_it_is(loss: Callable[..., Tensor]) -> None:
    model, _, batch = HEADS[0].build()
    assert KIND not in op_kinds(program_of(model, loss, batch))
    H = fc.Hessian(fc.Objective(model, loss, batch))
    V = directions(H.shape[0], 3)
    assert relative(H @ V, Reference(model, loss, batch, "output_target").hessian() @ V) <= EXACT


@pytest.mark.usefixtures("fused")
def test_rows_in_another_order_than_the_examples() -> None:
    """Behind the cut rows may change places; a covariance needs to know whose they are."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return flattened(output.transpose(0, 1), target.t())

    head = Head("tokens first", Tied, loss, tokens)
    assert KIND not in op_kinds(program_of(*head.build()))
    C = fc.GradientCovariance(head.objective(), centered=False)
    V = directions(C.shape[0], 3)
    assert C.plan().backend == "native"
    assert relative(C @ V, head.reference().covariance(4) @ V) <= EXACT


@pytest.mark.usefixtures("fused")
def test_losses_of_the_rows_as_the_models_output() -> None:
    """The model's output are the losses themselves: of them the mean is linear, so the GGN is zero."""

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x), y, reduction="none")

    torch.manual_seed(0)
    model, (x, y) = Losses().double(), HEADS[0].build()[2]
    G = fc.GGN(fc.Objective(model, lambda o, t: o.mean(), (x, y, y)))
    assert (G @ directions(G.shape[0], 3)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpt2_is_fused(dtype: torch.dtype) -> None:
    """Its own loss from labels; in float64 it casts the logits to float32."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=5000, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    ids = torch.randint(5000, (3, 9))
    batch = {"input_ids": ids, "labels": ids}
    names = [name for name, _ in model.named_parameters()]
    program = capture(model, lambda m, b: m(**b).loss, batch, selected=names, loss_kind="model_batch")
    (op,) = [op for op in program.ops if op.kind == KIND]
    assert op.attrs["round"] == (dtype == torch.float64)
    assert not [op for op in program.ops if op.kind in ("cross_entropy", "round")]
    assert max(value.numel for value in program.values if value.kind == "activation") < 27 * 5000


# --- memory ---


def peak_of(function: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator hands out during a call beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("rows", [256, 700])
@pytest.mark.parametrize("operator", [fc.Hessian, fc.GGN])
def test_memory(operator: type, rows: int) -> None:
    """One chunk and more: what is planned is what is used, and no direction costs a matrix of rows x classes."""
    V, width = 50_000, 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, V))
    batch = torch.randn(rows, 3), torch.randint(V, (rows,))
    A = operator(fc.Objective(model, nn.CrossEntropyLoss(), batch))
    P, peaks = A.shape[0], {}
    for K in (1, 3):
        X = torch.randn(K, P).T
        A @ X  # the state is made
        peaks[K] = peak_of(lambda X=X: A @ X) - 4 * K * P  # the result is the user's
        assert peaks[K] == pytest.approx(A.plan().peak_bytes(K), rel=0.15)
    # Per direction a few matrices of rows x width.
    assert peaks[3] - peaks[1] < 2 * 10 * 4 * rows * width
    kept = rows * V if rows == 256 else 0  # the probabilities of a single chunk
    assert A.plan().state_bytes < 4 * kept + 100 * 4 * rows * width
