"""One family of ATen operations per file; importing this package registers all of them."""

from . import arithmetic, convolution, linear, loss, normalisation, pointwise, pooling, reduction, shape

__all__ = [
    "arithmetic",
    "convolution",
    "linear",
    "loss",
    "normalisation",
    "pointwise",
    "pooling",
    "reduction",
    "shape",
]
