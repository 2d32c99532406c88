"""The nets of `measures_study.py`: trained by SGD to one training loss, and their rescaled copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from digits import Batch, digits
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Setting:
    batch_size: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Net:
    """A net in float64, and what it gets wrong: losses are mean cross-entropies, errors shares of the images."""

    model: nn.Sequential
    setting: Setting
    seed: int
    steps: int
    reached: bool
    training_loss: float
    test_loss: float
    training_error: float
    test_error: float

    @property
    def loss_gap(self) -> float:
        return self.test_loss - self.training_loss

    @property
    def error_gap(self) -> float:
        return self.test_error - self.training_error


def split(images: int) -> tuple[Batch, Batch]:
    """This many of the 1 797 digits to train on, and all the others to test on."""
    x, y = (torch.cat(both) for both in zip(*digits(), strict=True))
    return (x[:images], y[:images]), (x[images:], y[images:])


def grid(
    batch_sizes: Sequence[int], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> list[Setting]:
    return [Setting(*values) for values in product(batch_sizes, learning_rates, weight_decays)]


def train(
    setting: Setting, seed: int, training: Batch, test: Batch, target_loss: float, max_steps: int
) -> Net:
    """SGD until the loss over all training images, without the penalty, is at most ``target_loss``."""
    x, y = training
    model = _network(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay
    )
    steps, reached = 0, False
    while steps < max_steps and not reached:
        for rows in torch.randperm(len(x), generator=generator).split(setting.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
            if _loss_and_error(model, training)[0] <= target_loss:
                reached = True
                break
    model = model.double().eval()
    (training_loss, training_error), (test_loss, test_error) = (
        _loss_and_error(model, (x.double(), y)) for x, y in (training, test)
    )
    return Net(model, setting, seed, steps, reached, training_loss, test_loss, training_error, test_error)


def rescaled(model: nn.Sequential, most: float, seed: int) -> nn.Sequential:
    """A copy: what enters each hidden neuron times c, what leaves it divided by c, c from 1/most to most, log-uniform.

    relu(c z) = c relu(z) for c > 0, so the function stays, while the parameters move far.
    """
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in copied if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for layer, following in pairwise(layers):
            exponents = 2 * torch.rand(layer.out_features, generator=generator, dtype=torch.float64) - 1
            c = (exponents * math.log(most)).exp()
            layer.weight.mul_(c[:, None])
            layer.bias.mul_(c)
            following.weight.div_(c)
    return copied


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of logits over the largest logit."""
    logits = model(x)
    return float((logits - other(x)).abs().max() / logits.abs().max())


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


@torch.no_grad()
def _loss_and_error(model: nn.Module, data: Batch) -> tuple[float, float]:
    logits = model(data[0])
    wrong = logits.argmax(dim=1) != data[1]
    return float(functional.cross_entropy(logits, data[1])), float(wrong.double().mean())
