"""The published measures of how flat a minimum is: one function each, one file each."""

from flatcore.measures.layers import Layer, find_layer, find_layers
from flatcore.measures.result import Measure

__all__ = [
    "Layer",
    "Measure",
    "find_layer",
    "find_layers",
]
