"""The published measures of how flat a minimum is: one function each, one file each."""

from flatcore.measures.derived import normalize_logits
from flatcore.measures.layers import Layer, find_layer, find_layers
from flatcore.measures.normalized_sharpness import normalized_sharpness, normalized_sharpness_bound
from flatcore.measures.relative_flatness import relative_flatness
from flatcore.measures.result import Measure

__all__ = [
    "Layer",
    "Measure",
    "find_layer",
    "find_layers",
    "normalize_logits",
    "normalized_sharpness",
    "normalized_sharpness_bound",
    "relative_flatness",
]
