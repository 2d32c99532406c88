"""Training towards flat minima: optimizers and regularisers."""

from flatcore.optim.entropy_sgd import EntropySGD
from flatcore.optim.flatness_regulariser import LossAndFlatness, relative_flatness_penalty
from flatcore.optim.replicated_sgd import ReplicatedSGD
from flatcore.optim.scoping import Scoping

__all__ = [
    "EntropySGD",
    "LossAndFlatness",
    "ReplicatedSGD",
    "Scoping",
    "relative_flatness_penalty",
]
