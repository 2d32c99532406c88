"""Entropy-SGD: descent on the local entropy, whose gradient a Langevin chain around the parameters gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatcore.linear import check_count, check_positive, check_seed
from flatcore.measures.noise import noise_generator
from flatcore.optim.scoping import Scoping, factor_at
from flatcore.optim.settings import (
    as_number,
    check_at_least_zero,
    check_share,
    refuse_sparse,
    stored,
    with_momentum,
)

__all__ = ["EntropySGD"]

Variant = Literal["chaudhari", "pittorino"]
_COMMON = ("variant", "inner_steps", "seed")  # of all groups


class EntropySGD(Optimizer):
    """Descends F(w) = -(1/beta) log int exp(-beta (L(w') + gamma/2 |w' - w|²)) dw' instead of L, where beta = 1/noise².

    grad F(w) = gamma (w - <w'>), the mean taken in the integrand's distribution. Each ``step(closure)`` runs a chain
    of ``inner_steps`` Langevin steps, each with the gradient g of L on a batch of its own,

        w' <- w' - inner_lr (g + gamma (w' - w)) + noise sqrt(2 inner_lr) N(0, I)
        mu <- averaging mu + (1 - averaging) w'                                        mu = w at first

    and then moves w along w - mu. ``closure()`` must therefore draw a *new* batch at every call, zero the gradients, do
    forward and backward, and return the loss; a step costs inner_steps gradients, which is what to count when epochs
    are compared. It returns the loss of the first call. At the authors' noise of 1e-4 (beta = 1e8) F is in practice the
    Moreau envelope min_w' L(w') + gamma/2 |w' - w|².

    variant: two published algorithms share the name.
        "chaudhari": Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun and Zecchina, "Entropy-SGD:
            biasing gradient descent into wide valleys", ICLR 2017, and its code. The chain starts at w in every step,
            with the momentum of the outer step but not on its coupling; the outer gradient is w - mu, *without* gamma,
            so lr has another meaning than in SGD (theirs begins at 1).
        "pittorino": the variant of Pittorino, Lucibello, Feinauer, Perugini, Baldassi, Demyanenko and Zecchina,
            "Entropic gradient descent algorithms and wide flat minima", ICLR 2021. One chain for the whole training:
            it goes on where it stood; its coupling is inside of the momentum (0 unless ``inner_momentum``); the outer
            update is multiplied by gamma.

    gamma: the coupling at first; None takes loss / (|w' - w|² / 2) after the very first inner step, which has none.
    scoping: how it grows with the outer steps; None is constant. weight_decay is added to inner and outer gradients,
    as both authors do. The noise depends on seed and the count of steps alone: a resume from state_dict gives the same
    bits, if the closure does. Buffers (batch normalisation's) see every inner forward pass, as in the authors' code.

    Memory: 2 to 5 copies of the parameters. A closure that raises leaves the parameters as before the step.
    Raises ValueError or TypeError for bad settings, a step without closure, and sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        variant: Variant = "chaudhari",
        gamma: float | None = 0.03,
        scoping: Scoping | None = None,
        inner_steps: int = 20,
        inner_lr: float = 0.1,
        averaging: float = 0.75,
        noise: float = 1e-4,
        momentum: float = 0.0,
        inner_momentum: float | None = None,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if variant not in ("chaudhari", "pittorino"):
            raise ValueError(f"variant: expected 'chaudhari' or 'pittorino', got {variant!r}")
        momentum = check_share("momentum", momentum, 0.9)
        if inner_momentum is None:
            inner_momentum = momentum if variant == "chaudhari" else 0.0
        defaults = {
            "lr": check_at_least_zero("lr", lr, 1.0),
            "variant": variant,
            "gamma": None if gamma is None else check_at_least_zero("gamma", gamma, 0.03),
            "scoping": stored(scoping),
            "inner_steps": check_count("inner_steps", inner_steps, 1),
            "inner_lr": check_positive("inner_lr", inner_lr, 0.1),
            "averaging": check_share("averaging", averaging, 0.75),
            "noise": check_at_least_zero("noise", noise, 1e-4),
            "momentum": momentum,
            "inner_momentum": check_share("inner_momentum", inner_momentum, 0.9),
            "nesterov": bool(nesterov),
            "weight_decay": check_at_least_zero("weight_decay", weight_decay, 5e-4),
            "seed": check_seed(seed),
            "steps": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group; variant, inner_steps, seed and the steps done are those of the others."""
        if self.param_groups:
            first = self.param_groups[0]
            for name in _COMMON:
                if param_group.get(name, first[name]) != first[name]:
                    raise ValueError(
                        f"{name}: expected {first[name]!r} as in the other groups, got {param_group[name]!r}; "
                        "make another optimizer"
                    )
            param_group = {**param_group, **{name: first[name] for name in _COMMON}, "steps": first["steps"]}
        super().add_param_group(param_group)

    def couplings(self) -> list[float | None]:
        """gamma of the next step, for each group; None before it has been set from the loss."""
        return [_coupling(group) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise TypeError(
                "closure: expected a function that gives new gradients, got None; Entropy-SGD takes several a step"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        anchors = [p.clone() for p in parameters]
        means = [p.clone() for p in parameters]
        try:
            loss = self._run_chain(torch.enable_grad()(closure), anchors, means)
            chain = [p.clone() for p in parameters]
        finally:
            for p, anchor in zip(parameters, anchors, strict=True):
                p.copy_(anchor)
        places = iter(zip(parameters, means, chain, strict=True))
        for group in self.param_groups:
            for _ in group["params"]:
                p, mean, place = next(places)
                if group["variant"] == "pittorino":
                    self.state[p]["chain"] = place
                self._outer_step(p, mean, group)
            group["steps"] += 1
        return loss

    def _run_chain(self, closure: Callable[[], Any], anchors: list[Tensor], means: list[Tensor]) -> Any:
        """The inner steps, which leave the chain in the parameters; the first closure's loss."""
        first, inner = None, self.param_groups[0]["inner_steps"]
        for group in self.param_groups:
            for p in group["params"]:
                if "chain" in self.state[p]:
                    p.copy_(self.state[p]["chain"])
        momenta: dict[Tensor, Tensor] = {}
        for count in range(inner):
            loss = closure()
            first = loss if count == 0 else first
            places = iter(zip(anchors, means, strict=True))
            for group in self.param_groups:
                number = group["steps"] * inner + count
                noise = _Noise(group["seed"], number)
                for p in group["params"]:
                    anchor, mean = next(places)
                    if p.grad is None:
                        continue
                    refuse_sparse(p.grad, "Entropy-SGD")
                    buffer = momenta.setdefault(p, torch.zeros_like(p)) if group["inner_momentum"] else p
                    _inner_step(p, p.grad, anchor, buffer, group, noise)
                    mean.lerp_(p, 1 - group["averaging"])
            if any(group["gamma"] is None for group in self.param_groups):
                self._set_coupling(loss, anchors)
        return first

    def _set_coupling(self, loss: Any, anchors: list[Tensor]) -> None:
        """gamma such that the coupling is worth as much as the loss, at the distance of the first inner step."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        squares = sum(float((p - a).square().sum()) for p, a in zip(parameters, anchors, strict=True))
        if loss is None or not squares > 0:
            raise ValueError(
                "gamma: expected a closure that returns the loss and gives gradients other than zero to set the "
                f"coupling from, got loss {loss!r} and squared distance {squares:g}; give gamma as a number"
            )
        for group in self.param_groups:
            if group["gamma"] is None:
                group["gamma"] = as_number(loss) / (squares / 2)

    def _outer_step(self, p: Tensor, mean: Tensor, group: dict[str, Any]) -> None:
        gradient = (p - mean).add_(p, alpha=group["weight_decay"]) if group["weight_decay"] else p - mean
        if group["momentum"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            gradient = with_momentum(gradient, buffer, group["momentum"], group["nesterov"])
        scale = _coupling(group) if group["variant"] == "pittorino" else 1.0
        p.add_(gradient, alpha=-group["lr"] * (scale or 0.0))


class _Noise:
    """Normal numbers of one inner step; one generator for each device."""

    def __init__(self, seed: int, number: int) -> None:
        self._seed, self._number = seed, number
        self._generators: dict[torch.device, torch.Generator] = {}

    def like(self, p: Tensor) -> Tensor:
        if p.device not in self._generators:
            self._generators[p.device] = noise_generator(self._seed, self._number, p.device)
        return torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=self._generators[p.device])


def _coupling(group: dict[str, Any]) -> float | None:
    return (
        None
        if group["gamma"] is None
        else float(group["gamma"]) * factor_at(group["scoping"], group["steps"])
    )


def _inner_step(
    p: Tensor, gradient: Tensor, anchor: Tensor, buffer: Tensor, group: dict[str, Any], noise: _Noise
) -> None:
    gamma, momentum = _coupling(group) or 0.0, group["inner_momentum"]
    if group["weight_decay"]:
        gradient = gradient.add(p, alpha=group["weight_decay"])
    pull = (p - anchor).mul_(gamma)
    if group["variant"] == "pittorino":
        direction = with_momentum(gradient + pull, buffer, momentum, group["nesterov"])
    else:
        direction = with_momentum(gradient, buffer, momentum, group["nesterov"]) + pull
    p.add_(direction, alpha=-group["inner_lr"])
    if group["noise"]:
        p.add_(noise.like(p), alpha=group["noise"] * (2 * group["inner_lr"]) ** 0.5)
