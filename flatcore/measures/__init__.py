"""The published measures of how flat a minimum is: one function each, one file each."""

from flatcore.measures.derived import normalize_logits
from flatcore.measures.generalization_gap import generalization_gap
from flatcore.measures.layer_coupling import Coupling, Gain
from flatcore.measures.layers import Layer, find_layer, find_layers
from flatcore.measures.local_energy import local_energy
from flatcore.measures.local_entropy import local_entropy
from flatcore.measures.normalized_sharpness import normalized_sharpness, normalized_sharpness_bound
from flatcore.measures.relative_flatness import relative_flatness
from flatcore.measures.result import Measure
from flatcore.measures.soft_rank import soft_rank
from flatcore.measures.width import width
from flatcore.measures.width_plot import plot_width

__all__ = [
    "Coupling",
    "Gain",
    "Layer",
    "Measure",
    "find_layer",
    "find_layers",
    "generalization_gap",
    "local_energy",
    "local_entropy",
    "normalize_logits",
    "normalized_sharpness",
    "normalized_sharpness_bound",
    "plot_width",
    "relative_flatness",
    "soft_rank",
    "width",
]
