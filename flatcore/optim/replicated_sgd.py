"""Replicated-SGD: several copies of a net, each trained on its own batches and pulled towards their mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatcore.optim.scoping import Scoping, factor_at
from flatcore.optim.settings import (
    as_number,
    check_at_least_zero,
    check_share,
    refuse_sparse,
    stored,
    with_momentum,
)

__all__ = ["ReplicatedSGD"]


class ReplicatedSGD(Optimizer):
    """SGD on y replicas w^1 ... w^y at once, of the replicated loss

        L_R = (1/y) sum_a L(w^a) + g (1/y) sum_a |w^a - w_bar|²,    w_bar = (1/y) sum_a w^a

    so that the replicas meet where many fit, in a wide minimum. Source: Pittorino, Lucibello, Feinauer, Perugini,
    Baldassi, Demyanenko and Zecchina, "Entropic gradient descent algorithms and wide flat minima", ICLR 2021. As in
    their code the distance has no factor 1/2 (gamma = 2 g where it has), and lr counts for y L_R: a replica moves along
    grad L(w^a) + 2 g (w^a - w_bar), which is SGD where the replicas are equal or y = 1.

        optimizer = ReplicatedSGD([net(seed) for seed in range(3)], lr=0.05, coupling=None,
                                  scoping=Scoping("exponential", 1e4, steps=epochs * batches, every=batches))
        for batches in zip(loader, loader, loader): # a batch for each replica
            optimizer.step(optimizer.closure(loss, batches))
        model = optimizer.centre()

    ``step()`` takes the gradients that stand in the replicas. coupling: g at first; None sets it in the first step with
    a closure so that the two terms of L_R are equal, as the authors do. scoping: its growth; theirs is exponential, by
    1e4 in all, once an epoch. The models are the caller's: save their state beside this state_dict, and a resume gives
    the same bits. A step costs y gradients. Memory: that of SGD for y nets, and two copies of one net.

    Raises ValueError or TypeError for bad settings, replicas whose parameters differ in name, shape or what is frozen,
    or are shared, sparse gradients, and a coupling to be set where the replicas are equal.
    """

    def __init__(
        self,
        replicas: Sequence[nn.Module],
        lr: float,
        *,
        coupling: float | None = None,
        scoping: Scoping | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        self.replicas = _checked(replicas)
        defaults = {
            "lr": check_at_least_zero("lr", lr, 0.05),
            "coupling": None if coupling is None else check_at_least_zero("coupling", coupling, 1e-3),
            "scoping": stored(scoping),
            "momentum": check_share("momentum", momentum, 0.9),
            "nesterov": bool(nesterov),
            "weight_decay": check_at_least_zero("weight_decay", weight_decay, 5e-4),
            "steps": 0,
        }
        groups = [{"params": [p for p in r.parameters() if p.requires_grad]} for r in self.replicas]
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == len(self.replicas):
            raise ValueError(
                "param_group: expected none beside the replicas', got another one; make a new optimizer"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the replicas, whose parameters are those of the groups."""
        return {**super().__getstate__(), "replicas": self.replicas}

    def coupling(self) -> float | None:
        """g of the next step; None before it has been set from the loss."""
        group = self.param_groups[0]
        start = group["coupling"]
        return None if start is None else float(start) * factor_at(group["scoping"], group["steps"])

    def closure(
        self, loss: Callable[[Any, Any], Tensor], batches: Sequence[Sequence[Any]]
    ) -> Callable[[], Tensor]:
        """Gradients of every replica from its own batch (inputs..., target); returns the mean of their losses."""
        if len(batches) != len(self.replicas):
            raise ValueError(
                f"batches: expected one for each of the {len(self.replicas)} replicas, got {len(batches)}"
            )

        def run() -> Tensor:
            self.zero_grad()
            losses = []
            for replica, (*inputs, target) in zip(self.replicas, batches, strict=True):
                value = loss(replica(*inputs), target)
                value.backward()
                losses.append(value.detach())
            return torch.stack(losses).mean()

        return run

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._set_coupling(loss)
        g = self.coupling() or 0.0
        for places in zip(*(group["params"] for group in self.param_groups), strict=True):
            mean = _mean(places)
            pulls = [(p - mean).mul_(2 * g) for p in places]
            for p, pull, group in zip(places, pulls, self.param_groups, strict=True):
                self._move(p, pull, group)
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def _move(self, p: Tensor, pull: Tensor, group: dict[str, Any]) -> None:
        gradient = pull
        if p.grad is not None:
            refuse_sparse(p.grad, "Replicated-SGD")
            gradient = p.grad + pull
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            gradient = with_momentum(gradient, buffer, group["momentum"], group["nesterov"])
        p.add_(gradient, alpha=-group["lr"])

    def _set_coupling(self, loss: Any) -> None:
        """g such that the replicas' distances are worth as much as their losses; 0 for a single one."""
        if self.param_groups[0]["coupling"] is not None:
            return
        y, g = len(self.replicas), 0.0
        if y > 1:
            columns = list(zip(*(group["params"] for group in self.param_groups), strict=True))
            squares = sum(float((p - _mean(ps)).square().sum()) for ps in columns for p in ps) / y
            if loss is None or squares == 0:
                raise ValueError(
                    "coupling: expected a closure that returns the mean loss, and replicas that differ, to set the "
                    f"coupling from, got loss {loss!r} and mean squared distance {squares:g}; give coupling as a number"
                )
            g = as_number(loss) / squares
        for group in self.param_groups:
            group["coupling"] = g

    @torch.no_grad()
    def centre(self) -> nn.Module:
        """A new module in the place of the mean: parameters and floating buffers (batch normalisation's running
        statistics) are the replicas' means, whole numbers (the batches counted) their mean rounded up, as in the
        authors' code; everything else is the first replica's."""
        result = copy.deepcopy(self.replicas[0])
        tensors = [dict(_tensors(replica)) for replica in self.replicas]
        for name, tensor in _tensors(result):
            parts = [named[name] for named in tensors]
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.copy_(_mean(parts))
            elif tensor.dtype != torch.bool:
                total = sum(part.to(torch.int64) for part in parts)
                tensor.copy_(-torch.div(-total, len(parts), rounding_mode="floor"))
        return result


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Exact where all are equal, which a plain sum divided by their number is not."""
    first = tensors[0]
    away = torch.zeros_like(first)
    for tensor in tensors[1:]:
        away += tensor - first
    return first + away / len(tensors)


def _checked(replicas: Any) -> list[nn.Module]:
    if isinstance(replicas, nn.Module) and not isinstance(replicas, nn.ModuleList):
        raise TypeError(
            f"replicas: expected a list of modules, got one {type(replicas).__name__}; give [copy of it, ...]"
        )
    modules = list(replicas)
    if not modules or not all(isinstance(m, nn.Module) for m in modules):
        raise TypeError(
            f"replicas: expected at least one torch.nn.Module, got {[type(m).__name__ for m in modules]}"
        )
    shapes = [{name: tuple(t.shape) for name, t in _tensors(m)} for m in modules]
    for index, other in enumerate(shapes):
        if other != shapes[0]:
            name = next(n for n in [*shapes[0], *other] if shapes[0].get(n) != other.get(n))
            raise ValueError(
                f"replicas: expected nets alike, got {name!r} of shape {shapes[0].get(name)} in the first and "
                f"{other.get(name)} in number {index}"
            )
    frozen = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in modules]
    for index, names in enumerate(frozen):
        if names != frozen[0]:
            raise ValueError(
                f"replicas: expected nets alike, got {min(names ^ frozen[0])!r} frozen in the first or in number "
                f"{index} alone"
            )
    seen = [id(p) for m in modules for p in m.parameters()]
    if len(set(seen)) != len(seen):
        raise ValueError(
            "replicas: expected nets that share no parameter, got one in two of them; use copy.deepcopy"
        )
    return modules
