"""Training towards flat minima: optimizers and regularisers."""

from flatcore.optim.flatness_regulariser import LossAndFlatness, relative_flatness_penalty

__all__ = ["LossAndFlatness", "relative_flatness_penalty"]
