"""One family of ATen operations per file; importing this package registers all of them."""

from . import (
    arithmetic,
    attention,
    convolution,
    extremes,
    indexing,
    linear,
    loss,
    masks,
    normalisation,
    pointwise,
    pooling,
    reduction,
    resampling,
    shape,
    slices,
    windows,
)

__all__ = [
    "arithmetic",
    "attention",
    "convolution",
    "extremes",
    "indexing",
    "linear",
    "loss",
    "masks",
    "normalisation",
    "pointwise",
    "pooling",
    "reduction",
    "resampling",
    "shape",
    "slices",
    "windows",
]
