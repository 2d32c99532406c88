"""The published measures of how flat a minimum is: one function each, one file each."""

from flatcore.measures.adaptive_sharpness import adaptive_sharpness_average, adaptive_sharpness_worst
from flatcore.measures.derived import normalize_logits
from flatcore.measures.edge_of_stability import edge_of_stability
from flatcore.measures.fisher_rao import fisher_rao
from flatcore.measures.generalization_gap import generalization_gap
from flatcore.measures.layer_coupling import Coupling, Gain
from flatcore.measures.layer_scales import minimum_sharpness, quotient_sharpness
from flatcore.measures.layers import Layer, find_layer, find_layers
from flatcore.measures.local_energy import local_energy
from flatcore.measures.local_entropy import local_entropy
from flatcore.measures.lpf import lpf
from flatcore.measures.normalized_sharpness import normalized_sharpness, normalized_sharpness_bound
from flatcore.measures.pac_bayes import pac_bayes_sigma
from flatcore.measures.path_norm import path_norm
from flatcore.measures.relative_flatness import relative_flatness
from flatcore.measures.result import Measure
from flatcore.measures.sam import asam_sharpness, sam_sharpness
from flatcore.measures.soft_rank import soft_rank
from flatcore.measures.spectrum import (
    condition_number,
    effective_dimension,
    lambda_max,
    log_volume,
    participation_ratio,
    trace,
)
from flatcore.measures.width import width
from flatcore.measures.width_plot import plot_width

__all__ = [
    "Coupling",
    "Gain",
    "Layer",
    "Measure",
    "adaptive_sharpness_average",
    "adaptive_sharpness_worst",
    "asam_sharpness",
    "condition_number",
    "edge_of_stability",
    "effective_dimension",
    "find_layer",
    "find_layers",
    "fisher_rao",
    "generalization_gap",
    "lambda_max",
    "local_energy",
    "local_entropy",
    "log_volume",
    "lpf",
    "minimum_sharpness",
    "normalize_logits",
    "normalized_sharpness",
    "normalized_sharpness_bound",
    "pac_bayes_sigma",
    "participation_ratio",
    "path_norm",
    "plot_width",
    "quotient_sharpness",
    "relative_flatness",
    "sam_sharpness",
    "soft_rank",
    "trace",
    "width",
]
