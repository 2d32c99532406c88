"""How close training is to the step size at which it becomes unstable."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcore.linear import check_positive
from flatcore.measures.derived import check_objective
from flatcore.measures.extremes import extremes
from flatcore.measures.result import Measure
from flatcore.measures.scaled_hessian import ScaledHessian
from flatcore.objective import Objective
from flatcore.operators import Hessian

__all__ = ["StabilityLimit", "edge_of_stability", "stability_limit"]


def edge_of_stability(
    objective: Objective,
    lr: float | torch.optim.Optimizer,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
) -> Measure:
    """lambda_max(H) over the curvature at which full-batch descent with this step is just stable on a quadratic.

    Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at the Edge of
    Stability", ICLR 2021: 2 / lr; with Polyak's momentum b (2 + 2 b) / lr, with Nesterov's (2 + 2 b) / (lr (1 + 2 b)).
    Full-batch training is found to rise to about 1 and stay there. For Adam and AdamW with b1 the preconditioned
    lambda_max(P^-1/2 H P^-1/2) over (2 + 2 b1) / ((1 - b1) lr), 38 / lr for b1 = 0.9, P = sqrt(v / (1 - b2^t)) + eps
    (Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", arXiv 2207.14484, with 1 - b1^t gone).

    lr: the step, or an optimizer of torch: SGD, Adam or AdamW with one learning rate and one momentum for the selected
    parameters, Adam's with its state. (SGD's dampening is refused; torch's Nesterov is the above.) Weight decay counts
    if it is in the loss; that of SGD and Adam is added to H, each group's to its own parameters, that of AdamW is not.

    ``details``: "lambda_max" (of what is said above), "threshold". stderr: the bound from the residual. Cost: that of
    `lambda_max`. Invariant, unlike lambda_max, to scaling the loss by c and lr by 1 / c. Not invariant to: scaling
    neurons or layers, which changes the trajectory too.
    Raises TypeError or ValueError, one sentence, for bad arguments.
    """
    began = time.perf_counter()
    limit = stability_limit(objective, lr, momentum, nesterov)
    found = extremes(limit.operator, tol, seed, "LA")
    top = found.values[0] + limit.decay
    return Measure(
        value=top / limit.threshold,
        stderr=found.residuals[0] / limit.threshold,
        by_layer=None,
        definition=f"lambda_max({limit.matrix}) / {limit.threshold:g}",
        matvecs=found.matvecs,
        name="edge of stability",
        method="lanczos",
        seed=seed,
        seconds=time.perf_counter() - began,
        status=found.status,
        details={"lambda_max": top, "threshold": limit.threshold},
    )


@dataclass(frozen=True)
class StabilityLimit:
    """Training is stable where lambda_max(operator) + decay < threshold. ``matrix``: the operator's name."""

    operator: Any
    decay: float
    threshold: float
    matrix: str


def stability_limit(
    objective: Any, lr: float | torch.optim.Optimizer, momentum: float = 0.0, nesterov: bool = False
) -> StabilityLimit:
    """What `edge_of_stability` compares; arguments and errors are its."""
    objective = check_objective(objective)
    hessian, decay, beta1 = Hessian(objective), 0.0, None
    A, matrix = hessian, "H"  # type: Any, str
    if isinstance(lr, torch.optim.Optimizer):
        groups = _groups(objective, lr)
        group = groups[0]
        step = check_positive("lr", group["lr"], 0.1)
        decays = [0.0 if g.get("decoupled_weight_decay") else float(g["weight_decay"]) for g in groups]
        if isinstance(lr, torch.optim.SGD):
            if group["dampening"]:
                raise ValueError(f"lr: expected SGD without dampening, got {group['dampening']}")
            momentum, nesterov, decay = group["momentum"], group["nesterov"], decays[0]
            if len(set(decays)) > 1:
                shift = _by_entry(objective, decays)
                A, decay, matrix = (
                    ScaledHessian(hessian, torch.ones_like(shift), shift),
                    0.0,
                    "H + weight decay",
                )
        elif isinstance(lr, torch.optim.Adam | torch.optim.AdamW):
            beta1, matrix = float(group["betas"][0]), "P^-1/2 H P^-1/2"
            A = ScaledHessian(hessian, _preconditioner(objective, lr).rsqrt(), _by_entry(objective, decays))
        else:
            raise TypeError(
                f"lr: expected a number, SGD, Adam or AdamW, got {type(lr).__name__}; give its step size"
            )
    else:
        step = check_positive("lr", lr, 0.1)
    if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
        raise ValueError(f"momentum: expected a number from 0 to below 1, got {momentum!r}")
    threshold = (2 + 2 * momentum) / (step * (1 + 2 * momentum if nesterov else 1))
    if beta1 is not None:
        threshold = (2 + 2 * beta1) / ((1 - beta1) * step)
    return StabilityLimit(A, decay, threshold, matrix)


# What the threshold follows from, by its name in a parameter group.
_COMMON = {
    "lr": "learning rate",
    "momentum": "momentum",
    "nesterov": "kind of momentum",
    "dampening": "dampening",
    "betas": "pair of betas",
}


def _groups(objective: Objective, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter group of each selected parameter, which agree but for weight decay and what only Adam's P has."""
    groups = []
    for name, parameter in objective.parameters.items():
        own = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        if not own:
            raise ValueError(
                f"lr: expected an optimizer of the selected parameters, got one without {name!r}"
            )
        groups.append(own[0])
    if any(g.get("maximize") for g in groups):
        raise ValueError(
            f"lr: expected one that minimises, got {type(optimizer).__name__} with maximize=True"
        )
    for key, name in _COMMON.items():
        if any(g.get(key) != groups[0].get(key) for g in groups):
            raise ValueError(
                f"lr: expected one {name} for all selected parameters, got several; select fewer"
            )
    return groups


def _by_entry(objective: Objective, values: list[float]) -> Tensor:
    """One value for each parameter, as a flat vector."""
    sizes = [p.numel() for p in objective.parameters.values()]
    like: dict[str, Any] = {"dtype": objective.layout.dtype, "device": objective.layout.device}
    return torch.cat([torch.full((n,), v, **like) for n, v in zip(sizes, values, strict=True)])


def _preconditioner(objective: Objective, optimizer: torch.optim.Optimizer) -> Tensor:
    parts = []
    for (name, parameter), group in zip(
        objective.parameters.items(), _groups(objective, optimizer), strict=True
    ):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"lr: expected an optimizer with a state, got none for {name!r}; take a step first"
            )
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        corrected = v.detach() / (1 - group["betas"][1] ** float(state["step"]))
        parts.append((corrected.sqrt() + group["eps"]).reshape(-1))
    return torch.cat(parts).to(objective.layout.dtype)
