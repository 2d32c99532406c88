"""Two small networks on scikit-learn's handwritten digits, one in a flat minimum and one in a sharp one.

    flatcore report examples/digits.py:factory

Both fit the same 1 437 images, and both stop when the training loss first falls to `TARGET_LOSS`. One stopping loss
matters: the Hessian of a cross-entropy shrinks with the loss, so of two nets the longer trained one looks flatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

TARGET_LOSS = 0.01
TEST_IMAGES = 360
STEPS_BETWEEN_CHECKS = 10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Plain SGD from torch's default weights, or from a net that has first learnt shuffled labels by heart."""

    batch_size: int
    learning_rate: float
    shuffled_label_epochs: int = 0
    seed: int = 0
    max_steps: int = 20_000


# Small batches with large steps leave narrow valleys (Keskar et al., arXiv 1609.04836). Full-batch descent stays near
# its start, and a start fitted to shuffled labels is a bad one (Liu et al., arXiv 1906.02613).
FLAT = Recipe(batch_size=4, learning_rate=0.2)
SHARP = Recipe(batch_size=1437, learning_rate=0.05, shuffled_label_epochs=300)


def digits() -> tuple[Batch, Batch]:
    """The 1 797 images, 8 x 8 pixels scaled to [0, 1], in a fixed split: 1 437 to train on and 360 to test on."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float() / 16
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return (x[train], y[train]), (x[test], y[test])


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def learn_shuffled_labels(
    model: nn.Sequential, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator
) -> None:
    shuffled = y[torch.randperm(len(y), generator=generator)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), shuffled[rows]).backward()
            optimizer.step()


def train(recipe: Recipe, data: Batch, on_step: Callable[[int], object]) -> nn.Sequential:
    """Train until the loss over all of `data` is at most TARGET_LOSS. `on_step` is called with the steps done."""
    x, y = data
    model = network(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    learn_shuffled_labels(model, x, y, recipe.shuffled_label_epochs, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate)
    steps = 0
    while steps < recipe.max_steps:
        for rows in torch.randperm(len(x), generator=generator).split(recipe.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
            if steps % STEPS_BETWEEN_CHECKS == 0:
                on_step(steps)
                with torch.no_grad():
                    if functional.cross_entropy(model(x), y) <= TARGET_LOSS:
                        return model.eval()
    raise RuntimeError(f"the training loss is above {TARGET_LOSS} after {recipe.max_steps} steps of {recipe}")


def factory(
    on_step: Callable[[int], object] = lambda steps: None,
) -> dict[str, tuple[nn.Module, nn.Module, Batch, Batch]]:
    """name -> (model, loss, training data, test data), as `flatcore report` takes it."""
    training, test = digits()
    loss = nn.CrossEntropyLoss()
    return {
        "flat": (train(FLAT, training, on_step), loss, training, test),
        "sharp": (train(SHARP, training, on_step), loss, training, test),
    }
