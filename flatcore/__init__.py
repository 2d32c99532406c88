"""How curved is the loss of a torch model: Hessian products in blocks, spectra, traces, densities."""

from flatcore import _load as _load  # isort: skip  # first: explains a torch that does not fit the build

from flatcore import measures, optim, tuning
from flatcore.block_spectra import block_spectra
from flatcore.density import spectral_density
from flatcore.eigsh import eigsh
from flatcore.functionals import (
    effective_dimension,
    frobenius,
    functional,
    logdet,
    participation_ratio,
    schatten,
    soft_rank,
)
from flatcore.objective import ModelLoss, Objective, hf_loss
from flatcore.operators import GGN, GradientCovariance, Hessian
from flatcore.solve import solve
from flatcore.trace import diagonal, trace

__version__ = "0.1.0"

# Behind the version, which the report's account of the machine reads.
from flatcore.report import compare, report
from flatcore.track import track

__all__ = [
    "GGN",
    "GradientCovariance",
    "Hessian",
    "ModelLoss",
    "Objective",
    "block_spectra",
    "compare",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "frobenius",
    "functional",
    "hf_loss",
    "logdet",
    "measures",
    "optim",
    "participation_ratio",
    "report",
    "schatten",
    "soft_rank",
    "solve",
    "spectral_density",
    "trace",
    "track",
]

tuning.start()


def __getattr__(name: str) -> object:
    """`TrackCallback` when it is asked for: transformers takes seconds to import, and need not be there."""
    if name == "TrackCallback":
        from flatcore.track_callback import TrackCallback

        return TrackCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
