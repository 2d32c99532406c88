"""Local entropy: the free energy of the loss in a Gaussian neighbourhood of the parameters, by Monte Carlo."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import torch
from torch import Tensor

from flatcore.environment import exclusive
from flatcore.errors import warn
from flatcore.evaluate import plain_torch
from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.chain_statistics import batch_means, effective_samples
from flatcore.measures.langevin import Chain
from flatcore.measures.modes import outside_inference_mode
from flatcore.measures.result import Measure
from flatcore.objective import Objective

__all__ = ["local_entropy"]

_INTERVALS = 8  # of the thermodynamic integral; half of them give its error
_FEWEST = 12  # effective samples below which errors from the chain itself are not believed


@outside_inference_mode
@exclusive
def local_entropy(
    objective: Objective,
    gamma: float,
    beta: float,
    *,
    steps: int = 400,
    method: Literal["mala", "sgld"] = "mala",
    step_size: float | None = None,
    seed: int = 0,
) -> Measure:
    """F(w) - L(w), F(w) = -(1/beta) log E_w'~N(w, I/(beta gamma)) exp(-beta L(w')), and grad F(w) = gamma (w - <w'>).

    Source: Chaudhari et al., "Entropy-SGD", ICLR 2017; Pittorino et al., "Entropic gradient descent algorithms and
    wide flat minima", ICLR 2021. Their local entropy Phi = log int exp(-beta L(w') - (beta gamma / 2) |w' - w|²) dw'
    is -beta F + (P/2) log(2 pi / (beta gamma)): the same up to a constant of gamma, which is taken out here so that F
    tends to L for gamma -> inf. <.> is the mean in the integrand's distribution. For beta -> inf F is the Moreau
    envelope min_w' L(w') + (gamma/2) |w' - w|².

    F - L(w) = int_0^1 <L(w') - L(w)>_s ds, the mean taken with s L in the place of L (thermodynamic integration,
    Kirkwood, J. Chem. Phys. 3 (1935) 300-313): 9 nodes of Clenshaw and Curtis' rule in sqrt(s), a chain of ``steps``
    after steps/2 to warm up at each but s = 0, where draws are independent. The last chain gives <w'>.

    method: "mala" corrects each step by acceptance, so that only the number of steps limits the result: Langevin steps
        that leave the Gaussian exact (Cotter, Roberts, Stuart and White, Statistical Science 28 (2013) 424-446),
        tuned to 57 % acceptance while warming up, on all data. "sgld" takes every step (stochastic gradient Langevin,
        Welling and Teh, ICML 2011) with the gradient of one batch, as Entropy-SGD does; it needs ``step_size``, in
        (0, 2), the same for all s, and its bias, of the order of the step and of the gradients' noise, is in no
        error bar.

    ``value``: F - L(w), in units of the loss; negative where the neighbourhood lies lower. ``stderr``: from 20 batch
    means a chain, widened by their correlation, and the difference of the rules of 8 and 4 intervals, in squares.
    ``details``: ``gradient`` (P,) = gamma (w - <w'>) with ``gradient_stderr`` (P,); ``force`` (P,) = <grad L(w')>
    with ``force_stderr``, which has the same mean in equilibrium (integration by parts) and whose distance from it is
    a check of the chain; ``s``, ``means``, ``means_stderr``, ``effective_samples`` of the nodes, ``acceptance``,
    ``step_size``, ``distance`` = <|w' - w|²>. Cost: about 13 * steps gradients. Memory: 10 vectors, and 16 in float64.

    For a quadratic loss (gradient g, Hessian H at w): F - L(w) = -gᵀ(H + gamma I)^-1 g / 2 + log det(I + H/gamma) /
    (2 beta) and grad F = gamma (H + gamma I)^-1 g. Invariant to orthogonal maps of the parameters only: not to
    rescaling neurons. Chains that have not mixed (their losses, or the last one's places, are worth fewer than 12
    independent samples, or few steps were accepted), and losses too rounded for this beta, are told in ``status`` and
    a FlatcoreWarning; a mode that the chain never meets is not.
    """
    began = time.perf_counter()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected a flatcore.Objective, got {type(objective).__name__}")
    gamma, beta = check_positive("gamma", gamma, 1.0), check_positive("beta", beta, 1000.0)
    steps, seed = check_count("steps", steps, 40), check_seed(seed)
    if method not in ("mala", "sgld"):
        raise ValueError(f"method: expected 'mala' or 'sgld', got {method!r}")
    delta = None if step_size is None else check_positive("step_size", step_size, 0.1)
    if (method == "sgld" and delta is None) or (delta is not None and delta >= 2):
        raise ValueError(
            f"step_size: expected a number in (0, 2) for method={method!r}, got {step_size}; give e.g. 0.1"
        )

    base = objective.loss()
    t = torch.cos(torch.linspace(math.pi, 0, _INTERVALS + 1, dtype=torch.float64)) / 2 + 0.5
    nodes = t**2
    means, errors, worth = torch.zeros_like(t), torch.zeros_like(t), torch.zeros_like(t)
    chain = Chain(objective, gamma, beta, seed, adjusted=method == "mala", delta=delta)
    sums: dict[str, Tensor] = {}
    with plain_torch(objective.layout.device):
        for k, s in enumerate(nodes.tolist()):
            last = k == _INTERVALS
            samples = chain.run(s, steps, vectors=last)
            means[k], errors[k] = batch_means(samples.losses - base)
            worth[k] = effective_samples(samples.losses[:, None])
            if chain.acceptance * steps < 20:  # most batches are of one place, and their spread tells nothing
                worth[k] = 0.0
            sums = samples.vectors
    # Where the loss is flat the chain moves slowest and farthest: losses tell little of it, places all.
    worth[-1] = min(float(worth[-1]), effective_samples(sums["buckets"]))
    value, stderr = _integral(t, means, errors)
    gradient, gradient_error = -gamma * sums["away"], gamma * sums["away_stderr"]
    rounding = torch.finfo(objective.layout.dtype).eps * abs(base)
    slow = [f"{s:.2g}" for s, n in zip(nodes.tolist(), worth.tolist(), strict=True) if n < _FEWEST]
    status = "converged"
    wild = [f"{s:.2g}" for s, m in zip(nodes.tolist(), means.tolist(), strict=True) if not math.isfinite(m)]
    if wild:
        status = f"the loss is not finite in chains at s = {', '.join(wild)}; raise gamma or beta"
    elif method == "mala" and beta * rounding > 1:
        status = (
            f"the loss is rounded to {rounding:.1g}, which decides over acceptance at beta = {beta:g}; use float64, or "
            "lower beta"
        )
    elif slow:
        status = (
            f"chains at s = {', '.join(slow)} are too short to have mixed, worth {float(worth.min()):.1f} independent "
            f"samples where {_FEWEST} are wanted; raise steps or gamma, or lower beta"
        )
    if status != "converged":
        warn(f"local_entropy: {status}")
    details: dict[str, Any] = {
        "gradient": gradient,
        "gradient_stderr": gradient_error,
        "force": sums["force"],
        "force_stderr": sums["force_stderr"],
        "s": nodes,
        "means": means,
        "means_stderr": errors,
        "effective_samples": worth,
        "acceptance": chain.acceptance,
        "step_size": chain.delta,
        "distance": float(sums["distance"]),
        "loss": base,
    }
    return Measure(
        value=value,
        stderr=stderr,
        by_layer=None,
        definition="-(1/beta) log E exp(-beta (L(w') - L(w))), w' ~ N(w, I/(beta gamma))",
        matvecs=0,
        name="local entropy",
        passes=chain.gradients,
        method=f"thermodynamic integration, {method}",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=status,
        details=details,
    )


def _integral(t: Tensor, means: Tensor, errors: Tensor) -> tuple[float, float]:
    """int_0^1 means ds with s = t², by Clenshaw and Curtis' rule in t, and its error."""
    fine, coarse = _weights(len(t) - 1) * 2 * t, _weights((len(t) - 1) // 2) * 2 * t[::2]
    value = float(fine @ means)
    spread = float((fine**2) @ errors**2)
    rule = max(
        abs(value - float(coarse @ means[::2])) - math.sqrt(float((coarse**2) @ errors[::2] ** 2) + spread),
        0.0,
    )
    return value, math.sqrt(spread + rule**2)


def _weights(n: int) -> Tensor:
    """Clenshaw and Curtis' weights on [0, 1] for n intervals, n even: exact for polynomials of degree n."""
    theta = torch.linspace(math.pi, 0, n + 1, dtype=torch.float64)
    cosines = torch.cos(torch.arange(n + 1, dtype=torch.float64)[:, None] * theta[None, :])
    k = torch.arange(n + 1, dtype=torch.float64)
    integrals = torch.where(k % 2 == 0, 1 / (1 - k**2 + (k == 1)), 0.0)  # half of those over [-1, 1]
    weights: Tensor = torch.linalg.solve(cosines, integrals)
    return weights
