"""Max and average pooling in one and two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import fx

from ..lower import Lowering, lowers, pair


def _planes(
    lower: Lowering, node: fx.Node, argument: fx.Node, spatial: int, pool: Callable[[int], int]
) -> int:
    """Pool with the input as (examples, channels, height, width), whatever axes it comes with."""
    x = lower.operand(argument)
    shape = lower.shape(x)
    height = shape[-2] if spatial == 2 else 1
    channels = shape[-spatial - 1]
    examples = shape[0] if len(shape) == spatial + 2 else 1
    pooled = pool(lower.view(x, (examples, channels, height, shape[-1])))
    return lower.view(pooled, node_shape(node))


def node_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the first output of a node."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)


def _window(a: SimpleNamespace, spatial: int) -> dict[str, tuple[int, int]]:
    kernel, padding = list(a.kernel_size), list(a.padding)
    stride = list(a.stride) or kernel  # an empty stride is the kernel
    if spatial == 1:
        return {"kernel": (1, int(kernel[0])), "stride": (1, int(stride[0])), "padding": (0, int(padding[0]))}
    return {"kernel": pair(kernel), "stride": pair(stride), "padding": pair(padding)}


@lowers("max_pool2d.default", "max_pool1d.default")
def _max_pool(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    spatial = 1 if "1d" in str(node.target) else 2
    dilation = (1, int(a.dilation[0])) if spatial == 1 else pair(a.dilation)
    return _planes(
        lower,
        node,
        a.self,
        spatial,
        lambda x: lower.emit(
            "max_pool2d", x, **_window(a, spatial), dilation=dilation, ceil_mode=bool(a.ceil_mode)
        ),
    )


@lowers("max_pool2d_with_indices.default")
def _max_pool_with_indices(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> tuple[int, None]:
    return _max_pool(lower, node, a), None


@lowers("avg_pool2d.default", "avg_pool1d.default")
def _avg_pool(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    spatial = 1 if "1d" in str(node.target) else 2
    divisor = getattr(a, "divisor_override", None) or 0
    return _planes(
        lower,
        node,
        a.self,
        spatial,
        lambda x: lower.emit(
            "avg_pool2d",
            x,
            **_window(a, spatial),
            ceil_mode=bool(a.ceil_mode),
            count_include_pad=bool(a.count_include_pad),
            divisor=int(divisor),
        ),
    )


@lowers("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def _adaptive_avg_pool(lower: Lowering, node: fx.Node, a: SimpleNamespace) -> int:
    spatial = 1 if "1d" in str(node.target) else 2
    size = (1, int(a.output_size[0])) if spatial == 1 else pair(a.output_size)
    return _planes(
        lower, node, a.self, spatial, lambda x: lower.emit("adaptive_avg_pool2d", x, output_size=size)
    )
