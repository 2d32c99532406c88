"""Ops that no lowering knows, each twice differentiable by torch."""

from __future__ import annotations

from .builder import UNSUPPORTED, Builder, Skip, op
from .templates import expressions

expressions(
    {
        "torch.sort({vector}, {dim})[0]": "",
        "torch.topk({vector}, 1, {dim})[0]": "",
        "{vector}.median({dim})[0]": "",
        "{positive}.prod()": "",
        "torch.cumprod(0.8 + 0.3 * torch.tanh({vector}), {dim})": "",
        "torch.fft.fft({vector}, dim={dim}).abs().square()": "",
        "torch.fft.rfft({vector}, dim={dim}).real": "",
        "torch.tan(torch.tanh({x}))": "",
        "torch.atan({x})": "",
        "torch.sinh({x})": "",
        "torch.lgamma({positive})": "",
        "torch.asinh({x})": "",
        "torch.atan2({x}, {positive})": "",
        "torch.pow({positive}, {y})": "",
        "torch.hypot({x}, {positive})": "",
        "torch.cummax({vector}, {dim})[0]": "",
        "torch.logcumsumexp({vector}, {dim})": "",
        "torch.lerp({x}, {same}, torch.sigmoid({same}))": "",
        "({vector} + 0.3).norm(3, {dim})": "",
        "torch.block_diag({x}.reshape(1, -1), {same}.reshape(-1, 1))[:6]": "",
        "torch.trace({x}.reshape({x}.numel(), 1))": "",
        "F.max_pool3d({image}.unsqueeze(0), 1)": "",
    },
    UNSUPPORTED,
)


@op(table=UNSUPPORTED)
def determinant(b: Builder) -> None:
    n = b.integer(1, 3)
    b.let(f"torch.det({b.weight((n, n), 0.3)} + 2 * torch.eye({n}).to({b.pick()}))")


@op(table=UNSUPPORTED)
def inverse(b: Builder) -> None:
    n = b.integer(1, 3)
    b.let(f"torch.linalg.inv({b.weight((n, n), 0.3)} + 2 * torch.eye({n}).to({b.pick()}))")


@op(table=UNSUPPORTED)
def scattered(b: Builder) -> None:
    x = b.pick(min_rank=1)
    index = b.index(b.shape(x), 3)
    shape = list(b.shape(x))
    shape[0] = 3
    b.let(f"{b.weight(shape)}.scatter_add(0, {index}, {x})")


@op(table=UNSUPPORTED)
def index_added(b: Builder) -> None:
    x = b.pick(min_rank=1)
    shape = [3, *b.shape(x)[1:]]
    b.let(f"{b.weight(shape)}.index_add(0, {b.index((b.size(x, 0),), 3)}, {x})")


@op(table=UNSUPPORTED)
def convolution_of_volumes(b: Builder) -> None:
    x = b.pick(5, 5)
    b.let(f"F.conv3d({x}, {b.weight((2, b.size(x, 1), 1, 1, 1))})")


@op(table=UNSUPPORTED)
def distances(b: Builder) -> None:
    x = b.pick(2, 2)
    if b.size(x, 0) < 2:
        raise Skip
    b.let(f"torch.cross({x}.repeat(1, 3)[:, :3], {b.weight((b.size(x, 0), 3))}, dim=1)")


@op(table=UNSUPPORTED)
def written_by_index(b: Builder) -> None:
    x = b.pick(min_rank=1)
    copy = b.let(f"{x}.clone()")
    b.do(f"{copy}[{b.index((1,), b.size(x, 0))}] = {b.number()}", copy)
    b.let(f"{copy}.sin()")


@op(table=UNSUPPORTED)
def bilinear(b: Builder) -> None:
    x = b.pick(2, 2)
    n, width = b.shape(x)
    y = b.weight((n, 2))
    b.let(f"F.bilinear({x}, {y}, {b.weight((3, width, 2), 0.6)}, {b.weight((3,))})")
