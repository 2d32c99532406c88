"""A Markov chain around the parameters, of the density exp(-beta (s L(w') + (gamma/2) |w' - w|²))."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore.measures.chain_statistics import BatchMeans, Buckets
from flatcore.measures.noise import noise_generator
from flatcore.measures.perturbed import loss_and_gradient
from flatcore.objective import Objective

__all__ = ["Chain", "Samples"]

# At this acceptance Langevin steps are most efficient (Roberts and Rosenthal, J. R. Stat. Soc. B 60 (1998) 255-268).
_TARGET = 0.574


@dataclass(frozen=True)
class Samples:
    """losses: of each step. vectors: means over the steps of w' - w, of the gradient, with standard errors, of
    the squared distance, and "buckets" (steps, K), sums of entries of w' - w by step."""

    losses: Tensor
    vectors: dict[str, Tensor]


class Chain:
    """Goes on from where it stands when s changes. With u = w' - w, Gaussian part N(0, C), C = I/(beta gamma), and
    gradient g = s grad L, a step of size delta proposes

        v = ((2 - delta) u - (2 delta / gamma) g + sqrt(8 delta / (beta gamma)) xi) / (2 + delta),

    which for g = 0 leaves the Gaussian as it is. It is accepted with probability min(1, exp(rho(u, v) - rho(v, u))),
    rho(u, v) = beta s L(u) + beta <v - u, g>/2 + (delta/4) beta <u + v, g> + (delta/4) beta |g|²/gamma.
    """

    def __init__(
        self,
        objective: Objective,
        gamma: float,
        beta: float,
        seed: int,
        *,
        adjusted: bool,
        delta: float | None,
    ) -> None:
        self._objective, self._gamma, self._beta, self._seed = objective, gamma, beta, seed
        self._adjusted = adjusted
        self._tuned = delta is None
        self.delta = 1.0 if delta is None else delta
        self._w = torch.cat([v.reshape(-1) for v in objective.snapshot().values.values()])
        self._u = torch.zeros_like(self._w)
        batches = [(batch.index, batch.weight) for batch in objective.batches()]
        self._batches, self._weights = [b[0] for b in batches], torch.tensor([b[1] for b in batches])
        self._draws = 0
        self.gradients = 0
        self.acceptance = math.nan

    def run(self, s: float, steps: int, vectors: bool) -> Samples:
        """``steps`` samples after steps/2 to warm up. vectors: whether means of vectors are wanted."""
        if s == 0:
            return self._independent(steps)
        here = self._at(self._u)
        accepted = 0.0
        losses = torch.zeros(steps, dtype=torch.float64)
        tally = _VectorTally(self._w, steps) if vectors else None
        for step in range(-(steps // 2), steps):
            here, chance = self._step(here, s)
            if step < 0 and self._tuned and self._adjusted:
                # Robbins and Monro, on the odds of delta's range (0, 2).
                rate = 1.0 / math.sqrt(step + steps // 2 + 1)
                odds = math.log(self.delta / (2.0001 - self.delta)) + 2 * rate * (chance - _TARGET)
                self.delta = max(2.0 / (1 + math.exp(-min(odds, 30.0))), 1e-8)
            if step >= 0:
                losses[step] = here[0]
                accepted += chance / steps
                if tally:
                    tally.add(step, self._u, here[1])
        self.acceptance = accepted if self._adjusted else math.nan
        return Samples(losses, tally.results() if tally else {})

    def _independent(self, steps: int) -> Samples:
        losses = torch.zeros(steps, dtype=torch.float64)
        for step in range(steps):
            self._u = self._normal() / math.sqrt(self._beta * self._gamma)
            losses[step] = self._at(self._u)[0]
        return Samples(losses, {})

    def _step(self, here: tuple[float, Tensor], s: float) -> tuple[tuple[float, Tensor], float]:
        """The next place's loss and gradient, and the probability of accepting the step."""
        delta, gamma, beta, u = self.delta, self._gamma, self._beta, self._u
        xi = self._normal()
        v = (2 - delta) * u - (2 * delta * s / gamma) * here[1] + math.sqrt(8 * delta / (beta * gamma)) * xi
        v /= 2 + delta
        there = self._at(v)
        if not self._adjusted:
            self._u = v
            return there, 1.0
        log_ratio = self._rho(u, v, here, s) - self._rho(v, u, there, s)
        chance = math.exp(min(log_ratio, 0.0)) if math.isfinite(log_ratio) else 0.0
        generator = noise_generator(self._seed, self._draws, torch.device("cpu"))
        self._draws += 1
        if float(torch.rand((), dtype=torch.float64, generator=generator)) < chance:
            self._u = v
            return there, chance
        return here, chance

    def _rho(self, u: Tensor, v: Tensor, at: tuple[float, Tensor], s: float) -> float:
        loss, g = at[0], at[1].double() * s
        u, v = u.double(), v.double()
        quarter = self.delta / 4
        inner = float((v - u) @ g) / 2 + quarter * float((u + v) @ g) + quarter * float(g @ g) / self._gamma
        return self._beta * (s * loss + inner)

    def _at(self, u: Tensor) -> tuple[float, Tensor]:
        self.gradients += 1
        only = None
        if not self._adjusted:
            generator = noise_generator(self._seed, self._draws, torch.device("cpu"))
            self._draws += 1
            only = self._batches[int(torch.multinomial(self._weights, 1, generator=generator))]
        return loss_and_gradient(self._objective, self._w + u, only)

    def _normal(self) -> Tensor:
        generator = noise_generator(self._seed, self._draws, self._w.device)
        self._draws += 1
        return torch.randn(self._w.shape, dtype=self._w.dtype, device=self._w.device, generator=generator)


class _VectorTally:
    """Means of vectors over the steps, and sums of their entries by step."""

    def __init__(self, like: Tensor, steps: int) -> None:
        self._means = BatchMeans(torch.empty(2, len(like), device=like.device), steps)
        self._buckets = Buckets(like)
        self._sums: list[Tensor] = []
        self._distance = 0.0

    def add(self, step: int, u: Tensor, g: Tensor) -> None:
        self._means.add(step, torch.stack([u, g]))
        self._sums.append(self._buckets(u))
        self._distance += float(u.double().square().sum())

    def results(self) -> dict[str, Tensor]:
        (away, force), (away_error, force_error) = self._means.results()
        return {
            "away": away,
            "away_stderr": away_error,
            "force": force,
            "force_stderr": force_error,
            "distance": torch.tensor(self._distance / len(self._sums), dtype=torch.float64),
            "buckets": torch.stack(self._sums),
        }
