"""What `measures_study.py` ranks nets by: the catalogue's measures, and numbers that are none, to compare them with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from study_nets import Setting
from torch import nn

import flatcore as fc
from flatcore import measures
from flatcore.errors import FlatcoreWarning
from flatcore.measures import Measure
from flatcore.measures.catalogue import CATALOGUE

SEED = 0
DAMPING = 1e-3
DRAWS = 400


@dataclass(frozen=True)
class Predictor:
    """``call(objective)`` gives a number that goes up (``sign`` 1) or down (-1) with the gap that it predicts.

    Or ``call`` is the name of what the net was trained with, a field of `Setting`.
    ``invariant``: whether docs/measures.md says that rescaled neurons leave it; None for what is no measure.
    """

    label: str
    call: Callable[[fc.Objective], Measure | float] | str
    invariant: bool | None = False
    sign: int = 1

    @property
    def heading(self) -> str:
        return self.label if self.sign > 0 else f"minus {self.label}"


@dataclass(frozen=True)
class Reading:
    value: float
    stderr: float
    status: str


def read(predictor: Predictor, objective: fc.Objective, setting: Setting) -> Reading:
    if isinstance(predictor.call, str):
        return Reading(float(getattr(setting, predictor.call)), 0.0, "converged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatcoreWarning)  # the status says the same
        found = predictor.call(objective)
    if isinstance(found, Measure):
        return Reading(float(found.value), float(found.stderr), found.status)
    return Reading(float(found), 0.0, "converged")


def _known(name: str, *, invariant: bool = False, sign: int = 1) -> Predictor:
    entry = CATALOGUE[name]
    return Predictor(entry.label, lambda o: entry.call(o, SEED), invariant, sign)


@torch.no_grad()
def _logits(objective: fc.Objective) -> torch.Tensor:
    return torch.cat([objective.model(batch.batch[0]) for batch in objective.batches()])


def _squared_norm(objective: fc.Objective) -> float:
    return sum(float(p.detach().square().sum()) for p in objective.model.parameters())


class _RandomNumbers:
    """Another number at each call, and the same sequence in each run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, objective: fc.Objective) -> float:
        return float(torch.rand((), generator=self._generator))


def predictors() -> dict[str, Predictor]:
    """name -> predictor, with the catalogue's settings, but more draws where nets differ by less than its noise.

    In nets of ReLUs the trace of each layer's Hessian is that of the Gauss-Newton matrix, which comes out exactly.

    Left out: the condition number, infinite or the sign of rounding for images with dark pixels; width, which is for
    linear nets; the effective dimension, which is the soft rank by another name; the generalisation gap calibrated or
    from sampled labels, which is the soft rank over the number of images, or has it as its mean.
    """
    return {
        "normalized_sharpness": _known("normalized_sharpness", invariant=True),
        "normalized_sharpness_logits": Predictor(
            "normalized sharpness, normalised logits",
            lambda o: measures.normalized_sharpness(o, curvature="ggn", normalize=True, rtol=0.05),
            invariant=True,
        ),
        "relative_flatness": _known("relative_flatness", invariant=True),
        "relative_flatness_all": Predictor(
            "relative flatness, all layers",
            lambda o: measures.relative_flatness(o, rtol=0.02),
            invariant=True,
        ),
        "fisher_rao": _known("fisher_rao", invariant=True),
        "adaptive_sharpness_average": Predictor(
            CATALOGUE["adaptive_sharpness_average"].label,
            lambda o: measures.adaptive_sharpness_average(o, 0.1, draws=DRAWS),
            invariant=True,
        ),
        "adaptive_sharpness_logits": Predictor(
            "average adaptive sharpness, normalised logits",
            lambda o: measures.adaptive_sharpness_average(measures.normalize_logits(o), 0.1, draws=DRAWS),
            invariant=True,
        ),
        "adaptive_sharpness_worst": _known("adaptive_sharpness_worst", invariant=True),
        "local_energy": Predictor(
            CATALOGUE["local_energy"].label,
            lambda o: measures.local_energy(o, 0.5, draws=DRAWS),
            invariant=True,
        ),
        "path_norm": _known("path_norm", invariant=True),
        "pac_bayes_magnitude": Predictor(
            "PAC-Bayes sigma in units of the weights",
            lambda o: measures.pac_bayes_sigma(o, magnitude=True),
            invariant=True,
            sign=-1,
        ),
        "pac_bayes_sigma": _known("pac_bayes_sigma", sign=-1),
        "trace": Predictor("trace", lambda o: measures.trace(o, curvature="ggn")),
        "lambda_max": _known("lambda_max"),
        "participation_ratio": _known("participation_ratio"),
        "soft_rank": Predictor(
            f"soft rank, damping {DAMPING:g}",
            lambda o: measures.soft_rank(o, DAMPING, method="gram"),
        ),
        "log_volume": Predictor(
            f"log volume, epsilon = damping = {DAMPING:g}",
            lambda o: measures.log_volume(o, DAMPING, DAMPING, method="gram"),
            sign=-1,
        ),
        "generalization_gap": _known("generalization_gap"),
        "quotient_sharpness": _known("quotient_sharpness"),
        "minimum_sharpness": Predictor(
            "minimum sharpness", lambda o: measures.minimum_sharpness(o, curvature="ggn")
        ),
        "sam_sharpness": _known("sam_sharpness"),
        "asam_sharpness": _known("asam_sharpness"),
        "lpf": Predictor(CATALOGUE["lpf"].label, lambda o: measures.lpf(o, draws=DRAWS)),
        "local_entropy": Predictor(
            "local entropy, gamma = 10, beta = 1000",
            lambda o: measures.local_entropy(o, 10.0, 1000.0, steps=80),
        ),
        "training_loss": Predictor("training loss", lambda o: o.loss(), None),
        "squared_norm": Predictor("squared norm of the parameters", _squared_norm, None),
        "logit_scale": Predictor(
            "deviation of the logits over the classes",
            lambda o: float(_logits(o).std(dim=1, correction=0).mean()),
            None,
        ),
        "batch_size": Predictor("batch size", "batch_size", None),
        "learning_rate": Predictor("learning rate", "learning_rate", None, sign=-1),
        "weight_decay": Predictor("weight decay", "weight_decay", None, sign=-1),
        "random_number": Predictor("a random number", _RandomNumbers(), None),
    }


def objective(model: nn.Module, training: tuple[torch.Tensor, torch.Tensor]) -> fc.Objective:
    x, y = training
    return fc.Objective(model, nn.CrossEntropyLoss(), (x.double(), y))
