"""Ops that move, pick, repeat and put together elements."""

from __future__ import annotations

from math import prod

from .builder import Builder, Skip, op
from .templates import expressions

expressions(
    {
        "{x}.squeeze()": "squeeze.default",
        "{vector}.squeeze({dim})": "squeeze.dim",
        "{vector}.squeeze({dims})": "squeeze.dims",
        "{x}.reshape(-1).view_as({x})": "",
        "{x}.reshape(-1).reshape_as({x})": "",
        "{vector}.reshape({vector}.shape[0], -1).t()": "t.default",
        "{x}.T if {x}.dim() == 2 else {x}.reshape(-1, 1).T": "",
        "{matrix}.mT": "",
        "{matrix}.mH.flatten(0, -3) if {matrix}.dim() > 2 else {matrix}.H": "",
        "{x}.sum().expand_as({x}) * {x}": "",
        "{x}.clone()": "clone.default",
        "{matrix}.mT.contiguous()": "clone.default",
        "{x}.type_as({y})": "",
        "{vector}.flip({dims})": "flip.default",
        "{matrix}.tril({flag} - 1)": "tril.default",
        "{matrix}.triu(+{flag})": "triu.default",
        "{matrix}.diagonal(dim1=-2, dim2=-1)": "diagonal.default",
        "{matrix}.diagonal(offset=+{flag}, dim1=0, dim2=1)": "diagonal.default",
        "sum({vector}.unbind({dim}))": "unbind.int",
        "{vector}.roll((+{flag}, 2), ({dim}, 0))": "roll.default",
        "{x}.roll(3)": "roll.default",
        "F.channel_shuffle({image}.repeat(1, 2, 1, 1), 2)": "channel_shuffle.default",
        "{vector}.repeat_interleave(2, {dim})": "repeat_interleave.self_int",
        "{x}.repeat_interleave(2)": "repeat_interleave.self_int",
    }
)


@op("view.default", "reshape.default")
def reshape(b: Builder) -> None:
    x = b.pick()
    n = prod(b.shape(x))
    sizes: list[int] = []
    while n > 1 and len(sizes) < 4:
        f = b.choice([f for f in range(2, n + 1) if n % f == 0])
        sizes.append(f)
        n //= f
    sizes.append(n)
    if b.chance(0.3):
        sizes.insert(b.integer(0, len(sizes)), 1)
    if b.chance(0.3):
        sizes[b.integer(0, len(sizes) - 1)] = -1
    b.let(f"{x}.reshape({tuple(sizes)})")


@op("view.default", "flatten.using_ints")
def flatten(b: Builder) -> None:
    x = b.pick(min_rank=2)
    start = b.integer(0, b.rank(x) - 1)
    b.let(f"{x}.flatten({start}, {b.integer(start, b.rank(x) - 1) - b.rank(x)})")


@op("view.default", "unflatten.int")
def unflatten(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    size = b.size(x, axis)
    f = b.choice([f for f in range(1, size + 1) if size % f == 0])
    b.let(f"{x}.unflatten({axis}, ({f}, -1))")


@op("unsqueeze.default")
def unsqueeze(b: Builder) -> None:
    x = b.pick(max_rank=4)
    b.let(f"{x}.unsqueeze({b.integer(-b.rank(x) - 1, b.rank(x))})")


@op("permute.default")
def permute(b: Builder) -> None:
    x = b.pick(min_rank=1)
    rank = b.rank(x)
    order = [axis - rank if b.chance(0.3) else axis for axis in b.rng.sample(range(rank), rank)]
    b.let(f"{x}.permute({tuple(order)})")


@op("transpose.int", "swapaxes.default", "swapdims.default")
def transpose(b: Builder) -> None:
    x = b.pick(min_rank=1)
    first = b.choice(["transpose", "swapaxes", "swapdims"])
    b.let(f"{x}.{first}({b.axis(x)}, {b.axis(x)})")


@op("expand.default")
def expand(b: Builder) -> None:
    x = b.pick(max_rank=4)
    y = b.let(f"{x}.sum({b.axis(x)}, keepdim=True)") if b.rank(x) and b.chance() else x
    shape = [b.integer(2, 3) if size == 1 and b.chance(0.7) else size for size in b.shape(y)]
    front = [b.integer(1, 3)] if b.chance() else []
    if b.chance(0.4):
        b.let(f"torch.broadcast_to({y}, {tuple(front + shape)})")
    else:
        left = [
            -1 if size == old and b.chance() else size for size, old in zip(shape, b.shape(y), strict=True)
        ]
        b.let(f"{y}.expand({tuple(front + left)})")


@op()
def broadcast_tensors(b: Builder) -> None:
    x = b.pick(min_rank=1)
    b.let(f"torch.broadcast_tensors({x}, {b.weight(b.broadcastable(b.shape(x)))})", count=2)


@op("repeat.default", "tile.default")
def repeat(b: Builder) -> None:
    x = b.pick(max_rank=4)
    times = [b.integer(1, 2) for _ in range(b.rank(x) + b.integer(0, 1))] or [2]
    b.let(f"{x}.{b.choice(['repeat', 'tile'])}({tuple(times)})")


@op("slice.Tensor")
def slices(b: Builder) -> None:
    x = b.pick(min_rank=1)
    parts = []
    for size in b.shape(x)[: b.integer(1, b.rank(x))]:
        start = b.integer(0, size - 1)
        stop = b.integer(start + 1, size)
        from_end = f"{start - size}:" if b.chance(0.3) else f"{start}:{stop}"
        parts.append(b.choice([from_end, ":", f"{start}:{stop}:2", "None"]))
    b.let(f"{x}[{', '.join(parts)}]")


@op("select.int")
def select(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    b.let(f"{x}.select({axis}, {b.integer(-b.size(x, axis), b.size(x, axis) - 1)})")


@op("slice.Tensor")
def narrow(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    start = b.integer(0, b.size(x, axis) - 1)
    b.let(f"{x}.narrow({axis}, {start}, {b.integer(1, b.size(x, axis) - start)})")


def _parts(b: Builder, template: str, least: int = 2) -> None:
    """An op with several outputs: most of them are used."""
    x = b.pick(min_rank=1, where=lambda t: t.dim() > 0 and max(t.shape) >= least)
    axis = b.choice([i for i, size in enumerate(b.shape(x)) if size >= least])
    size = b.size(x, axis)
    sizes = [b.integer(1, size - 1)]
    sizes.append(size - sizes[0])
    code = template.format(
        x=x, axis=axis - b.rank(x) if b.chance() else axis, sizes=sizes, half=-(-size // 2)
    )
    count = len(b._evaluate(code))
    b.let(code, count=count)


@op("split.Tensor")
def split(b: Builder) -> None:
    _parts(b, "torch.split({x}, {half}, {axis})")


@op("split_with_sizes.default", "split.sizes")
def split_with_sizes(b: Builder) -> None:
    _parts(b, "torch.split({x}, {sizes}, {axis})")


@op("split.Tensor", "chunk.default")
def chunk(b: Builder) -> None:
    _parts(b, "{x}.chunk(2, {axis})")


@op("slice.Tensor")
def tensor_split(b: Builder) -> None:
    _parts(b, "torch.tensor_split({x}, 2, {axis})")


@op("slice.Tensor")
def tensor_split_at(b: Builder) -> None:
    _parts(b, "torch.tensor_split({x}, {sizes}[:1], {axis})")


@op("unsafe_split.Tensor")
def unsafe_chunk(b: Builder) -> None:
    _parts(b, "torch.unsafe_chunk({x}, 2, {axis})")


@op("unsafe_split.Tensor")
def unsafe_split(b: Builder) -> None:
    _parts(b, "torch.unsafe_split({x}, {half}, {axis})")


@op("cat.default")
def cat(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    parts = [x]
    for _ in range(b.integer(1, 3)):
        shape = list(b.shape(x))
        shape[axis] = b.integer(1, 3)
        parts.append(x if b.chance(0.2) else b.weight(shape))
    b.rng.shuffle(parts)
    b.let(f"torch.{b.choice(['cat', 'concat', 'concatenate'])}(({', '.join(parts)}), {axis})")


@op("stack.default")
def stack(b: Builder) -> None:
    x = b.pick(max_rank=4)
    parts = [x, *(b.weight(b.shape(x)) for _ in range(b.integer(1, 2)))]
    b.let(f"torch.stack(({', '.join(parts)}), {b.integer(-b.rank(x) - 1, b.rank(x))})")


@op("pad.default")
def pad(b: Builder) -> None:
    x = b.pick(min_rank=1)
    pads = [b.integer(-1 if b.chance(0.3) else 0, 2) for _ in range(2 * b.integer(1, min(b.rank(x), 3)))]
    sizes = b.shape(x)[::-1]
    if any(sizes[i // 2] + min(pads[i], 0) + min(pads[i + 1], 0) < 1 for i in range(0, len(pads), 2)):
        raise Skip
    b.let(f"F.pad({x}, {tuple(pads)}, value={b.choice([0.0, b.number()])})")


def _bordered(b: Builder, mode: str, rank: int, wide: bool) -> None:
    x = b.pick(min_rank=rank, max_rank=rank)
    pads = []
    for axis in range(1, (2 if wide else 1) + 1):
        pads += [b.integer(0, max(b.size(x, -axis) - 1, 0)) for _ in range(2)]
    b.let(f"F.pad({x}, {tuple(pads)}, mode='{mode}')")


@op("pad.default")
def reflected(b: Builder) -> None:
    _bordered(b, "reflect", *b.choice([(2, False), (3, False), (3, True), (4, True)]))


@op("pad.default")
def replicated(b: Builder) -> None:
    _bordered(b, "replicate", *b.choice([(2, False), (3, False), (3, True), (4, True)]))


@op("pad.default")
def wrapped(b: Builder) -> None:
    _bordered(b, "circular", *b.choice([(2, False), (3, True), (4, True)]))


@op("glu.default")
def glu(b: Builder) -> None:
    x = b.pick(min_rank=1, where=lambda t: any(size % 2 == 0 for size in t.shape))
    b.let(f"F.glu({x}, {b.choice([i for i, size in enumerate(b.shape(x)) if size % 2 == 0])})")


# --- an index picks ---


@op("embedding.default")
def embedding(b: Builder) -> None:
    count = b.integer(2, 5)
    table = b.weight((count, b.integer(1, 4)))
    padding = b.choice(["", f", padding_idx={b.integer(0, count - 1)}"])
    b.let(f"F.embedding({b.index((b.integer(1, 4),) * b.integer(1, 2), count)}, {table}{padding})")


@op("index_select.default")
def index_select(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    b.let(f"{x}.index_select({axis}, {b.index((b.integer(1, 4),), b.size(x, axis))})")


@op("index.Tensor")
def one_index(b: Builder) -> None:
    x = b.pick(min_rank=1, max_rank=4)
    axis = b.integer(0, b.rank(x) - 1)
    index = b.index((b.integer(1, 3),) * b.integer(1, 2), b.size(x, axis), negative=True)
    b.let(f"{x}[{':, ' * axis}{index}]")


@op("index.Tensor")
def several_indices(b: Builder) -> None:
    x = b.pick(min_rank=2, max_rank=4)
    shape = (b.integer(1, 3),)
    parts = [
        b.index(shape, size, negative=True) if i < 2 or b.chance() else ":"
        for i, size in enumerate(b.shape(x))
    ]
    b.rng.shuffle(parts[2:])
    b.let(f"{x}[{', '.join(parts)}]")


@op("gather.default")
def gather(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    shape = list(b.shape(x))
    shape[axis] = b.integer(1, 4)
    b.let(f"{x}.gather({axis}, {b.index(shape, b.size(x, axis))})")


@op("take.default")
def take(b: Builder) -> None:
    x = b.pick()
    b.let(f"torch.take({x}, {b.index((b.integer(1, 4), 2), prod(b.shape(x)))})")


@op("take_along_dim.default")
def take_along_dim(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    shape = list(b.shape(x))
    shape[axis] = b.integer(1, 4)
    b.let(f"torch.take_along_dim({x}, {b.index(shape, b.size(x, axis))}, {axis})")


@op("rot90.default")
def rot90(b: Builder) -> None:
    x = b.pick(min_rank=2)
    b.let(f"torch.rot90({x}, {b.integer(1, 3)}, {tuple(b.rng.sample(range(b.rank(x)), 2))})")


@op("unfold.default")
def unfold(b: Builder) -> None:
    x = b.pick(min_rank=1, max_rank=4)
    axis = b.axis(x)
    b.let(f"{x}.unfold({axis}, {b.integer(1, b.size(x, axis))}, {b.integer(1, 2)})")


@op("as_strided.default")
def as_strided(b: Builder) -> None:
    x = b.pick(where=lambda t: t.numel() >= 6)
    y = b.let(f"{x}.clone(memory_format=torch.contiguous_format)")
    b.let(f"{y}.as_strided((2, 2), ({b.integer(1, 3)}, 1), {b.integer(0, 1)})")


@op("pixel_shuffle.default")
def pixel_shuffle(b: Builder) -> None:
    x = b.pick(4, 4)
    y = b.let(f"{x}.repeat(1, 4, 1, 1)")
    b.let(f"F.pixel_shuffle({y}, 2)")


@op("pixel_unshuffle.default")
def pixel_unshuffle(b: Builder) -> None:
    x = b.pick(4, 4)
    y = b.let(f"{x}.repeat(1, 1, 2, 2)")
    b.let(f"F.pixel_unshuffle({y}, 2)")


@op("repeat_interleave.self_Tensor")
def repeat_interleave_unequally(b: Builder) -> None:
    x = b.pick(min_rank=1)
    axis = b.axis(x)
    times = b.constant(b._evaluate(f"torch.arange({b.size(x, axis)}) % 3 + 1"))
    total = int(b.state.tensors[times].sum())
    b.let(f"torch.repeat_interleave({x}, {times}, {axis}, output_size={total})")
