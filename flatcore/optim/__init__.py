"""Training towards flat minima: optimizers and regularisers."""

from flatcore.optim.entropy_sgd import EntropySGD
from flatcore.optim.replicated_sgd import ReplicatedSGD
from flatcore.optim.scoping import Scoping

__all__ = ["EntropySGD", "ReplicatedSGD", "Scoping"]
