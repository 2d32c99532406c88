"""The generalisation gap from curvature and gradient noise: Takeuchi's criterion, and its soft-rank form."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatcore.environment import exclusive
from flatcore.errors import FlatcoreWarning, warn
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.example_gradients import (
    DataGradients,
    GradientNoise,
    SampledGradients,
    count_examples,
)
from flatcore.measures.likelihood import coefficient
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.result import Measure
from flatcore.measures.soft_rank import MATRICES, Matrix, Pole, check_pole, curvature_operator, soft_rank
from flatcore.measures.weight_decay import checked_damping
from flatcore.objective import Objective
from flatcore.operators import Operator
from flatcore.sampling import caution, student
from flatcore.solve import solve

__all__ = ["generalization_gap"]

_EXACT = 256  # parameters up to which "auto" takes dense matrices
_EXACT_AT_MOST = 4096
_BLOCK = 8
_LEAST = 16
_MAX_MATVECS = 20_000


@outside_inference_mode
def generalization_gap(
    objective: Objective,
    damping: float | None = None,
    *,
    optimizer: Optimizer | None = None,
    calibrated: bool = False,
    gradients: Objective | Literal["data", "sampled"] = "data",
    matrix: Matrix = "ggn",
    noise_variance: float = 1.0,
    method: str = "auto",
    rtol: float = 0.05,
    max_matvecs: int | None = None,
    seed: int = 0,
) -> Measure:
    """An estimate of the expected test loss minus training loss, the whole gap, in units of the objective's loss.

        calibrated=False:  (1/n) Tr((H + lambda I)^-1 C)            calibrated=True:  (1/n) rank_lambda(F)

    Source: Takeuchi, "Distribution of informational statistics and a criterion of model fitting", Suri-Kagaku 153
    (1976), with the penalty of Shibata's and Moody's regularised criteria; the soft-rank form for calibrated models
    whose errors do not go with the model's second derivatives is Shoham, Mor-Yosef and Avron, arXiv 2506.17809
    (2025). C is the covariance of the examples' gradients of the loss without penalty, *centred*, since at a
    penalised optimum their mean is -lambda theta. Examples whose targets are all ignored, or of classes without
    weight, are none of the n. Both are asymptotic, for n -> inf and a model at the optimum of loss plus
    (lambda/2) |theta|².

    damping, optimizer, matrix: as in `soft_rank`. "hessian" has no meaning beyond the pole at -lambda, which raises.
    gradients: what C is taken from. "data": the objective's. An Objective of the same model and parameters on other,
        held-out data: where training data are fitted, residuals and with them C shrink to nothing, and so does the
        estimate, whatever the gap. "sampled": targets drawn from the model, one for each target, whose gradients have
        mean zero and are not centred: C is the Fisher matrix in the mean, and so is the value. 8 draws ("exact") or
        one for each probe; stderr is that of the mean over draws, whatever rtol is for "exact".
    noise_variance: of the targets about the outputs, for a squared error with calibrated or "sampled".
    method: "exact", dense matrices of at most 4096 parameters; "probes": u = sum_i s_i (g_i - g) / sqrt(n) with random
        signs s_i has the covariance C, so that uᵀ (H + lambda I)^-1 u is an unbiased sample (by block conjugate
        gradients, whose error is of second order and bounded in the bar); "auto": exact up to 256 parameters. With
        calibrated=True: as in `soft_rank`.

    ``value``, ``stderr`` of the estimate (not of the asymptotics). ``details``: ``damping``, ``matrix``,
    ``gradients``; of a Hessian ``lowest``, ``lowest_error`` as in `soft_rank`; when calibrated ``rank`` and
    ``coefficient``, its factor: 1/n for a mean cross-entropy, 1/(number of targets) where examples have several,
    c * noise_variance for a squared error (c/2) sum |f - y|². A sum over n examples as the loss gives n times the
    mean's gap for lambda n. Invariant to orthogonal maps of the parameters; to
    rescaling neurons only for lambda -> 0 at a critical point. Cost of "probes": a backward pass and a solve each.
    Raises ValueError or TypeError for bad arguments, examples that interact, and losses that are no likelihood where
    one is needed.
    """
    began = time.perf_counter()
    A = curvature_operator(objective, matrix)
    damping = checked_damping(objective, damping, optimizer)
    variance = check_positive("noise_variance", noise_variance, 1.0)
    rtol, seed = check_positive("rtol", rtol, 0.05), check_seed(seed)
    if calibrated:
        return _calibrated(
            objective,
            damping,
            gradients,
            matrix,
            variance,
            {"method": method, "rtol": rtol, "max_matvecs": max_matvecs, "seed": seed},
        )
    if method not in ("auto", "exact", "probes"):
        raise ValueError(f"method: expected 'auto', 'exact' or 'probes', got {method!r}")
    limit = _MAX_MATVECS if max_matvecs is None else check_count("max_matvecs", max_matvecs, 1)
    noise = _gradient_noise(objective, gradients, variance, seed)
    P = objective.layout.size
    if method == "exact" and P > _EXACT_AT_MOST:
        raise ValueError(
            f"method: expected 'probes' for more than {_EXACT_AT_MOST} parameters, got 'exact' for {P}"
        )
    details: dict[str, Any] = {"damping": damping, "matrix": matrix, "gradients": noise.name}
    pole, used, passes = None, 0, 0
    if method == "exact" or (method == "auto" and P <= _EXACT):
        value, stderr, used = _dense(A, noise, damping, details)
        how, status = "exact", "converged"
    else:
        if matrix == "hessian":
            pole = check_pole(A, damping, "generalization_gap", seed)
            details |= pole.details
        value, stderr, status, products, passes = _probes(
            A, noise, damping, _least(damping, pole), rtol, limit, seed
        )
        used, how = products + (pole.lowest.matvecs if pole else 0), "probes"
    if pole and status == "converged":
        status = pole.status
    n = count_examples(objective)
    if status != "converged":
        warn(f"generalization_gap: {status}")
    return Measure(
        value=value / n,
        stderr=stderr / n,
        by_layer=None,
        definition=f"(1/n) Tr((H + {damping:g} I)^-1 C), H the {MATRICES[matrix]}, "
        f"C the {noise.moment} of the gradients of {noise.name}",
        matvecs=used,
        name="generalization gap",
        passes=passes,
        method=how,
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details=details,
    )


def _calibrated(
    objective: Objective,
    damping: float,
    gradients: Any,
    matrix: Matrix,
    variance: float,
    settings: dict[str, Any],
) -> Measure:
    if not (isinstance(gradients, str) and gradients == "data"):
        raise ValueError(
            "gradients: expected none with calibrated=True, which takes C as the Fisher matrix; leave it out"
        )
    began = time.perf_counter()
    factor = coefficient(objective, variance)
    rank = soft_rank(objective, damping, matrix=matrix, **settings)
    return Measure(
        value=factor * rank.value,
        stderr=factor * rank.stderr,
        by_layer=None,
        definition=f"{factor:g} * {rank.definition}",
        matvecs=rank.matvecs,
        name="generalization gap",
        passes=rank.passes + 1,
        method=f"calibrated, {rank.method}",
        seed=rank.seed,
        seconds=time.perf_counter() - began,
        status=rank.status,
        details={**rank.details, "rank": rank.value, "coefficient": factor},
    )


def _gradient_noise(objective: Objective, gradients: Any, variance: float, seed: int) -> GradientNoise:
    if isinstance(gradients, Objective):
        same = [(id(p), n) for n, p in gradients.parameters.items()]
        if same != [(id(p), n) for n, p in objective.parameters.items()]:
            raise ValueError(
                "gradients: expected an Objective of the same model and parameters, got another one's"
            )
        return DataGradients(gradients, "the objective given")
    if gradients == "sampled":
        return SampledGradients(objective, variance, seed)
    if gradients != "data":
        raise ValueError(f"gradients: expected 'data', 'sampled' or an Objective, got {gradients!r}")
    return DataGradients(objective, "the data")


def _least(damping: float, pole: Pole | None) -> float:
    """A lower bound of the eigenvalues of A + damping I, zero where none is known that is positive."""
    return max(damping + min(pole.lowest.lower - pole.lowest.rounding, 0.0), 0.0) if pole else damping


def _dense(
    A: Operator, noise: GradientNoise, damping: float, details: dict[str, Any]
) -> tuple[float, float, int]:
    """The trace, its standard error over the matrices that C is the mean of, products."""
    matrix = A.to_dense().double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    lowest = float(values[0])
    rounding = len(matrix) * torch.finfo(A.dtype).eps * float(values.abs().max())
    details |= {"lowest": lowest, "lowest_error": 0.0}
    if lowest + damping <= rounding:
        raise ValueError(
            f"damping: expected A + damping I positive definite, got a least eigenvalue {lowest:.3g} of A with damping "
            f"{damping:g}; raise damping, or take matrix='ggn'"
        )
    if lowest < -rounding:
        warn(
            f"generalization_gap: the curvature has a negative eigenvalue, {lowest:.3g}, so this is no minimum; take "
            "matrix='ggn'"
        )
    traces = []
    for C in noise.matrices():
        shares = (vectors * (C @ vectors)).sum(dim=0)
        traces.append(float((shares / (values + damping)).sum()))
    samples = torch.tensor(traces, dtype=torch.float64)
    stderr = _error(samples) if len(samples) > 1 else 0.0
    return float(samples.mean()), stderr, (1 + len(samples)) * len(matrix)


@exclusive
def _probes(
    A: Operator, noise: GradientNoise, damping: float, least: float, rtol: float, limit: int, seed: int
) -> tuple[float, float, str, int, int]:
    """Mean of the samples, its error, status, products, backward passes. least: a lower bound of the eigenvalues of
    A + damping I, without which (zero) nothing bounds what the solves leave open."""
    tol = 1e-6 if A.dtype == torch.float64 else 1e-4
    samples: list[float] = []
    bounds: list[float] = []
    used, status = 0, ""
    while not status:
        left = limit - used - _BLOCK
        if left < 2 * _BLOCK + 2:
            break
        block = noise.vectors(seed, len(samples), _BLOCK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlatcoreWarning)  # its status says the same
            solution = solve(A, block.to(A.dtype), damping=damping, tol=tol, max_matvecs=left)
        x = solution.value
        # 2 uᵀx - xᵀ(A + damping I)x is below uᵀ(A + damping I)^-1 u by no more than |residual|² / least eigenvalue.
        form = (x * (A @ x)).double().sum(dim=0) + damping * x.double().square().sum(dim=0)
        values = 2 * (block * x.double()).sum(dim=0) - form
        short = (solution.residuals.to(block) * block.norm(dim=0)).square() / (least or math.inf)
        used += solution.matvecs + _BLOCK
        if bool((short > rtol / 2 * values).any()):
            status = solution.status
            break
        samples += values.tolist()
        bounds += short.tolist()
        if _close_enough(torch.tensor(samples, dtype=torch.float64), rtol):
            status = "converged"
    if not status or "after" in status:
        status = f"rtol = {rtol:g} not reached after {used} products; raise max_matvecs or rtol"
    if not samples:
        return math.nan, math.nan, status, used, 0
    found = torch.tensor(samples, dtype=torch.float64)
    bias = sum(bounds) / len(bounds) if least else math.inf
    return float(found.mean()), math.hypot(_error(found), bias), status, used, len(found)


def _error(samples: Tensor) -> float:
    n = len(samples)
    return float(samples.std()) / math.sqrt(n) * student(n)


def _close_enough(samples: Tensor, rtol: float) -> bool:
    if len(samples) < _LEAST:
        return False
    away = samples - samples.mean()
    squares = float((away**2).mean())
    skewness = float((away**3).mean()) / squares**1.5 if squares > 0 else 0.0
    return _error(samples) * caution(len(samples), skewness) <= rtol * abs(float(samples.mean()))
