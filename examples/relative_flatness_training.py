"""Training for flatness: a small network on handwritten digits, its last layer's relative flatness as a penalty.

    python examples/relative_flatness_training.py

Prints, for a few strengths of the penalty, what relative flatness and normalized sharpness come to, and how many of the
images left out are not recognised. A strong penalty has an easy way out: a network whose outputs are constant is
perfectly flat. Half a minute on one core.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import flatcore as fc

STRENGTHS = (0.0, 0.001, 0.01, 0.1)
SEEDS = (0, 1, 2)
EPOCHS = 30
TEST_IMAGES = 360


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (torch.as_tensor(images, dtype=torch.float32) / 16)[order], torch.as_tensor(labels)[order]
    return x[TEST_IMAGES:], y[TEST_IMAGES:], x[:TEST_IMAGES], y[:TEST_IMAGES]


def trained(x: Tensor, y: Tensor, strength: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            batch = x[rows], y[rows]
            out = fc.optim.relative_flatness_penalty(model, functional.cross_entropy, batch, "4")
            (out.loss + strength * out.flatness).backward()
            optimizer.step()
    return model


def main() -> None:
    x, y, x_test, y_test = digits()
    print(f"strength  seed  training loss  flatness  sharpness  errors of {TEST_IMAGES}")
    for strength in STRENGTHS:
        for seed in SEEDS:
            model = trained(x, y, strength, seed)
            objective = fc.Objective(model, functional.cross_entropy, (x, y), params=["*.weight"])
            flatness = fc.measures.relative_flatness(objective, "4")
            sharpness = fc.measures.normalized_sharpness(objective, curvature="ggn", rtol=0.1)
            errors = int((model(x_test).argmax(1) != y_test).sum())
            print(
                f"{strength:8g}  {seed:4d}  {objective.loss():13.2e}  {flatness.value:8.2e}  {sharpness.value:9.2e}"
                f"  {errors:13d}"
            )


if __name__ == "__main__":
    main()
