"""Convolutions, pooling and interpolation of sequences and images."""

from __future__ import annotations

from .builder import OPS, Builder, Skip, op
from .templates import expressions

expressions(
    {
        "{image}.contiguous(memory_format=torch.channels_last) * {y}": "clone.default",
    }
)


def _kernel(b: Builder, size: int, padding: int, dilation: int) -> int:
    """A kernel that fits."""
    return b.integer(1, min(3, (size + 2 * padding - 1) // dilation + 1))


def _groups(b: Builder, *channels: int) -> int:
    return int(b.choice([g for g in range(1, min(channels) + 1) if all(c % g == 0 for c in channels)]))


def _convolution(b: Builder, spatial: int) -> None:
    x = b.pick(spatial + 1 if b.chance(0.2) else spatial + 2, spatial + 2)
    channels = b.size(x, -spatial - 1)
    out = b.choice([channels, 2 * channels, b.integer(1, 4)])
    groups = _groups(b, channels, out)
    bias = f", {b.weight((out,))}" if b.chance() else ", None"
    dilation = [b.choice([1, 1, 2]) for _ in range(spatial)]
    if b.chance(0.25):
        name, padding = f"'{b.choice(['same', 'valid'])}'", [0] * spatial
        stride = [1] * spatial
    else:
        padding = [b.integer(0, 2) for _ in range(spatial)]
        name, stride = str(tuple(padding)), [b.integer(1, 2) for _ in range(spatial)]
    sizes = b.shape(x)[-spatial:]
    kernel = [_kernel(b, *each) for each in zip(sizes, padding, dilation, strict=True)]
    weight = b.weight((out, channels // groups, *kernel), 0.5)
    b.let(
        f"F.conv{spatial}d({x}, {weight}{bias}, stride={tuple(stride)}, padding={name}, "
        f"dilation={tuple(dilation)}, groups={groups})"
    )


@op("conv2d.default", "conv2d.padding")
def conv2d(b: Builder) -> None:
    _convolution(b, 2)


@op("conv1d.default", "conv1d.padding")
def conv1d(b: Builder) -> None:
    _convolution(b, 1)


@op()
def behind_an_image(b: Builder) -> None:
    """Any op directly behind one whose result the engine stores channels last."""
    b.choice([conv2d, conv2d, batch_norm_of_images, max_pool2d, avg_pool2d])(b)
    b.preferred = next(reversed(b.state.tensors))
    OPS[b.choice([name for name in OPS if name != "behind_an_image"])].write(b)


def batch_norm_of_images(b: Builder) -> None:
    x = b.pick(4, 4)
    b.let(f"F.batch_norm({x}, {b.numbers((b.size(x, 1),))}, {b.numbers((b.size(x, 1),))}.square() + 0.4)")


def _transposed(b: Builder, spatial: int) -> None:
    x = b.pick(spatial + 2, spatial + 2)
    channels = b.size(x, 1)
    groups = _groups(b, channels)
    out = groups * b.integer(1, 2)
    stride = [b.integer(1, 2) for _ in range(spatial)]
    kernel = [b.integer(1, 3) for _ in range(spatial)]
    padding = [b.integer(0, k - 1) for k in kernel]
    extra = [b.integer(0, s - 1) for s in stride]
    dilation = [b.choice([1, 1, 2]) for _ in range(spatial)]
    bias = b.weight((out,)) if b.chance() else "None"
    weight = b.weight((channels, out // groups, *kernel), 0.5)
    try:
        b.let(
            f"F.conv_transpose{spatial}d({x}, {weight}, {bias}, stride={tuple(stride)}, "
            f"padding={tuple(padding)}, output_padding={tuple(extra)}, groups={groups}, dilation={tuple(dilation)})"
        )
    except RuntimeError as error:  # no output left
        raise Skip from error


@op("conv_transpose2d.input")
def conv_transpose2d(b: Builder) -> None:
    _transposed(b, 2)


@op("conv_transpose1d.default")
def conv_transpose1d(b: Builder) -> None:
    _transposed(b, 1)


def _window(b: Builder, x: str, spatial: int) -> str:
    sizes = b.shape(x)[-spatial:]
    kernel = [b.integer(1, min(3, size)) for size in sizes]
    padding = [b.integer(0, k // 2) for k in kernel]
    stride = [b.integer(1, 2) for _ in sizes]
    given = f", stride={tuple(stride)}" if b.chance(0.7) else ""
    return f"{tuple(kernel)}{given}, padding={tuple(padding)}, ceil_mode={b.chance()}"


@op("max_pool2d.default")
def max_pool2d(b: Builder) -> None:
    x = b.pick(3, 4)
    dilation = ", dilation=2" if min(b.shape(x)[-2:]) >= 6 and b.chance() else ""
    b.let(f"F.max_pool2d({x}, {_window(b, x, 2)}{dilation})")


@op("max_pool1d.default")
def max_pool1d(b: Builder) -> None:
    x = b.pick(2, 3)
    b.let(f"F.max_pool1d({x}, {_window(b, x, 1)})")


@op("avg_pool2d.default")
def avg_pool2d(b: Builder) -> None:
    x = b.pick(3, 4)
    divisor = b.choice(["", ", divisor_override=3"])
    b.let(f"F.avg_pool2d({x}, {_window(b, x, 2)}, count_include_pad={b.chance()}{divisor})")


@op("avg_pool1d.default")
def avg_pool1d(b: Builder) -> None:
    x = b.pick(2, 3)
    b.let(f"F.avg_pool1d({x}, {_window(b, x, 1)}, count_include_pad={b.chance()})")


@op("adaptive_avg_pool2d.default")
def adaptive_avg_pool2d(b: Builder) -> None:
    b.let(f"F.adaptive_avg_pool2d({b.pick(3, 4)}, {b.choice(['1', '(2, 3)', '(None, 2)', '(3, 1)'])})")


@op("adaptive_avg_pool1d.default")
def adaptive_avg_pool1d(b: Builder) -> None:
    b.let(f"F.adaptive_avg_pool1d({b.pick(2, 3)}, {b.integer(1, 4)})")


def _columns(b: Builder, *sizes: int) -> str:
    """Arguments of windows over an image."""
    padding, dilation = [b.integer(0, 2) for _ in sizes], [b.choice([1, 1, 2]) for _ in sizes]
    kernel = [_kernel(b, *each) for each in zip(sizes, padding, dilation, strict=True)]
    stride = kernel if b.chance(0.3) else [b.integer(1, 3) for _ in sizes]
    return f"{tuple(kernel)}, {tuple(dilation)}, {tuple(padding)}, {tuple(stride)}"


@op("im2col.default")
def columns_of_images(b: Builder) -> None:
    x = b.pick(3, 4)
    b.let(f"F.unfold({x}, {_columns(b, *b.shape(x)[-2:])})")


@op("col2im.default")
def images_of_columns(b: Builder) -> None:
    x = b.pick(3, 4)
    sizes = b.shape(x)[-2:]
    windows = _columns(b, *sizes)
    columns = b.let(f"F.unfold({x}, {windows})")
    b.let(f"F.fold({columns}, {sizes}, {windows})")


def _interpolated(b: Builder, spatial: int, mode: str) -> None:
    x = b.pick(spatial + 2, spatial + 2)
    if b.chance():
        where = f"size={tuple(b.integer(1, 5) for _ in range(spatial))}"
    else:
        factors = tuple(b.choice([0.6, 1.0, 1.7, 2.0]) for _ in range(spatial))
        if any(int(f * size) < 1 for f, size in zip(factors, b.shape(x)[2:], strict=True)):
            raise Skip
        where = f"scale_factor={factors}"
        if b.chance(0.3):
            where += ", recompute_scale_factor=True"
    corners = f", align_corners={b.chance()}" if "linear" in mode or mode == "bicubic" else ""
    b.let(f"F.interpolate({x}, {where}, mode='{mode}'{corners})")


@op("upsample_nearest1d.vec")
def nearest1d(b: Builder) -> None:
    _interpolated(b, 1, "nearest")


@op("upsample_nearest2d.vec")
def nearest2d(b: Builder) -> None:
    _interpolated(b, 2, "nearest")


@op("_upsample_nearest_exact1d.vec")
def nearest_exact1d(b: Builder) -> None:
    _interpolated(b, 1, "nearest-exact")


@op("_upsample_nearest_exact2d.vec")
def nearest_exact2d(b: Builder) -> None:
    _interpolated(b, 2, "nearest-exact")


@op("upsample_linear1d.vec")
def linear1d(b: Builder) -> None:
    _interpolated(b, 1, "linear")


@op("upsample_bilinear2d.vec")
def bilinear2d(b: Builder) -> None:
    _interpolated(b, 2, "bilinear")


@op("upsample_bicubic2d.vec")
def bicubic2d(b: Builder) -> None:
    _interpolated(b, 2, "bicubic")
