"""The width of a minimum of a deep linear net, and how gains and singular vectors run through the layers of any
net."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from flatcore.eigsh import eigsh
from flatcore.errors import warn
from flatcore.linear import check_positive
from flatcore.measures.deep_linear import LinearNet, NotLinearError, least_eigenvalue, read_linear_net
from flatcore.measures.features import in_order_of_use
from flatcore.measures.layer_coupling import couplings, gains, table
from flatcore.measures.layers import find_layers
from flatcore.measures.result import Measure
from flatcore.objective import Objective
from flatcore.operators import GGN, Hessian

__all__ = ["width"]

_LARGEST = 4096  # rows of the small matrix whose whole spectrum is taken
_PROBES = 4


def width(objective: Objective, *, tol: float = 1e-3) -> Measure:
    """lambda_max of the Hessian over the least lambda_max of any net with the same end-to-end map: 1 at a flattest
    minimum.

    Source: Mulayoff and Michaeli, "Unique Properties of Flat Minima in Deep Networks", ICML 2020 (arXiv 2002.04710),
    where flatness is lambda_max of a deep linear net's squared error. For M layers without biases and inputs with
    second moment I the least lambda_max at L = (1/2n) sum |f - y|² is M sigma_1^(2 - 2/M), sigma_1 the largest
    singular value of the end-to-end matrix; they state that flattest minima are nearly balanced and that consecutive
    layers are coupled: a left singular vector of each matrix is a right singular vector of the next, along the path
    of largest gain.

    **Deep linear nets** (any order of Linear layers, skips among them, whose outputs are an affine function of the
    inputs; a squared error of any factor, which is read off the loss): ``value`` >= 1 as above, exact up to rounding,
    from an eigenproblem of outputs * inputs rows at float64. Inputs that are not white, or biases, make the
    denominator a lower bound that need not be attained: ``details["attained"]`` is False. ``details``:
    ``lambda_max``, ``least_lambda_max``, ``trace``, ``eigenvalues`` (all nonzero ones of H and zeros, decreasing;
    only the largest where outputs * inputs > 4096), ``factor`` (of the half mean squared error; 2/outputs for torch's
    MSELoss), ``gains`` (of the maps from the input to each layer along the top path) beside ``flattest_gains``
    sigma_1^(k/M). All this is of the Gauss-Newton matrix. Two checks tell whether it is also the Hessian's: the
    Frobenius norm of their difference, from products with four random vectors, must be at most tol * lambda_max,
    which then bounds the error of lambda_max, and the loss above the best linear map's at most tol of the loss of the
    zero map. Where they fail (not at a minimum, or a layer narrower than the rank of the best map), ``status`` says
    so in one sentence, and a FlatcoreWarning.

    **Every net**: ``value`` is nan where the above does not hold, for the reason in ``status``. ``by_layer`` has each
    layer's gain, its largest singular value; ``details["layers"]`` and ``["couplings"]`` the `Gain` of each layer and
    the `Coupling` to the one that the model calls next; ``["table"]`` all of it as text; `plot_width` draws it.
    The matrix of a convolution is outputs x (inputs * places in the kernel).

    Invariant to: rotations between the layers of linear nets. Not invariant to scaling one layer up and the next down,
    which leaves the map and changes lambda_max: that is what it measures. Cost: one pass over the data, 8 products,
    and (outputs * inputs)³ operations.
    """
    began = time.perf_counter()
    tol = check_positive("tol", tol, 1e-3)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected a flatcore.Objective, got {type(objective).__name__}")
    layers = in_order_of_use(objective, find_layers(objective))
    values = objective.snapshot().values
    gain, coupling = gains(layers, values), couplings(layers, values)
    details: dict[str, Any] = {
        "layers": gain,
        "couplings": coupling,
        "table": table(gain, coupling),
    }
    definition = "lambda_max(H) / least lambda_max of the same end-to-end map"
    by_layer = {
        g.path: Measure(g.spectral, 0.0, None, "largest singular value", 0, name="gain") for g in gain
    }
    value, status, matvecs = math.nan, "", 0
    try:
        net = read_linear_net(objective, layers)
    except NotLinearError as reason:
        status = (
            f"no curvature: the closed forms are for deep linear nets and the squared error, but {reason}"
        )
    else:
        details |= _curvature(net)
        away, matvecs = _away_from_gauss_newton(objective)
        details["distance"] = away
        value = _ratio(details)
        status = _status(net, details, tol)
        if status != "converged":
            warn(f"width: {status}")
    return Measure(
        value=value,
        stderr=0.0 if not math.isnan(value) else math.nan,
        by_layer=by_layer,
        definition=definition,
        matvecs=matvecs,
        name="width",
        passes=1 if matvecs else 0,
        method="Kronecker sum" if matvecs else "singular values of the layers",
        seconds=time.perf_counter() - began,
        status=status,
        details=details,
    )


def _curvature(net: LinearNet) -> dict[str, Any]:
    factors = net.kronecker_factors()
    rows = len(net.whole) * len(net.moment)
    if rows <= _LARGEST:
        K = sum(torch.kron(a, b) for a, b in factors)
        eigenvalues = torch.linalg.eigvalsh(K).flip(0).cpu()
    else:
        eigenvalues = _largest(factors)
    d = len(net.moment) - net.affine
    root = net.root()[:d, :d]
    _, singular, right = torch.linalg.svd(net.whole[:, :d] @ root)
    top, path = float(singular[0]), root @ right[0]
    M = len(net.outputs)
    ends = [B[:w, :d] @ path for B, w in zip(net.inputs[1:], net.widths, strict=True)]
    white = torch.eye(d, dtype=torch.float64, device=root.device)
    return {
        "lambda_max": float(eigenvalues[0]),
        "least_lambda_max": least_eigenvalue(net),
        "attained": not net.affine and bool((net.moment - white).norm() <= 1e-6 * math.sqrt(d)),
        "trace": sum(float(a.trace() * b.trace()) for a, b in factors),
        "eigenvalues": eigenvalues,
        "factor": net.factor,
        "excess_loss": net.excess_loss(),
        "gains": [float(x.norm()) for x in ends] + [top],
        "flattest_gains": [top ** (k / M) for k in range(1, M + 1)],
        "order": net.paths,
        "chain": net.chain,
    }


def _largest(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The largest eigenvalue of a sum of Kronecker products, by Lanczos with products of the small matrices."""

    class Sum:
        shape = (len(factors[0][0]) * len(factors[0][1]),) * 2
        dtype = torch.float64
        device = factors[0][0].device

        def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
            Y = V.T.reshape(-1, len(factors[0][0]), len(factors[0][1]))
            result = torch.zeros_like(Y)
            for a, b in factors:
                result += a @ Y @ b
            return result.reshape(V.shape[1], -1).T

    return eigsh(Sum(), k=1, which="LA", tol=1e-10, return_eigenvectors=False).values


def _away_from_gauss_newton(objective: Objective) -> tuple[float, int]:
    """An estimate of |H - G|_F from random signs, and its products."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_PROBES, objective.layout.size), generator=generator) * 2 - 1
    V = signs.to(device=objective.layout.device, dtype=objective.layout.dtype).T
    away = Hessian(objective) @ V - GGN(objective) @ V
    return math.sqrt(float(away.double().square().sum()) / _PROBES), 2 * _PROBES


def _ratio(details: dict[str, Any]) -> float:
    least = details["least_lambda_max"]
    return details["lambda_max"] / least if least > 0 and details["chain"] else math.nan


def _status(net: LinearNet, details: dict[str, Any], tol: float) -> str:
    if not details["chain"]:
        return (
            "the layers are no chain (the output of one is not all that the next one has of the input), so the least "
            "lambda_max of their end-to-end map is not known"
        )
    if not details["least_lambda_max"] > 0:
        return "the end-to-end map is zero, so the least lambda_max is zero too"
    if details["distance"] <= tol * details["lambda_max"] and details["excess_loss"] <= tol * net.power:
        return "converged"
    narrow = net.bottleneck()
    why = (
        f"a layer of {narrow} outputs cannot hold the best linear map, whose rank is larger"
        if narrow is not None
        else "the net is not at a global minimum"
    )
    return (
        f"{why} (the loss is {details['excess_loss']:.2g} above the best linear map's, |H - G|_F about "
        f"{details['distance']:.2g}), so the eigenvalues are those of the Gauss-Newton matrix G, not of H"
    )
