"""The workloads of the microbenchmark: name -> function that builds (model, loss, batch) in float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn


def mlp(sizes: tuple[int, ...], examples: int) -> Callable:
    """Fully connected tanh net with cross-entropy."""

    def build():
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        batch = (torch.randn(examples, sizes[0]), torch.randint(sizes[-1], (examples,)))
        return nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), batch

    return build


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The small residual nets of He et al. (2016) for 32 x 32 images: three stages of `blocks` blocks."""

    def __init__(self, blocks: int = 1, width: int = 16, classes: int = 10):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs, stride = width * 2**stage, 2 if stage and not block else 1
                stages.append(ResidualBlock(channels, outputs, stride))
                channels = outputs
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


def resnet(examples: int) -> Callable:
    def build():
        batch = (torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,)))
        return ResNet().eval(), nn.CrossEntropyLoss(), batch

    return build


WORKLOADS: dict[str, Callable] = {
    "mlp 784-512-512-10, batch 256": mlp((784, 512, 512, 10), 256),
    "resnet-8, 32x32, batch 32": resnet(32),
}
