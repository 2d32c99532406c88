"""The small models of the case table. P is below about 600 in each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcore.bench.workloads import ResidualBlock


class Tied(nn.Module):
    """One weight in two layers, once as it is and once transposed, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 6)
        self.alias = self.encode

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.alias(x))
        h = torch.tanh(self.middle(torch.sigmoid(self.middle(h))))
        return F.linear(h, self.encode.weight.t(), self.decode.bias)[..., None].flatten(1)


class Unused(nn.Module):
    """A parameter that the loss does not read, between two that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.spare = nn.Linear(3, 4)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class LeftMatrix(nn.Module):
    """The parameter on the left of the product, a Gram matrix, and products of every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 3))
        self.read = nn.Parameter(torch.randn(5, 3))
        self.direction = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:  # x: (examples, 3, 5)
        h = torch.tanh(self.mix @ x)  # (examples, 4, 5)
        gram = torch.bmm(h, h.transpose(1, 2))  # (examples, 4, 4)
        scores = (h @ self.read).mean(1) + 0.1 * gram.sum((1, 2)).unsqueeze(-1)
        return scores + (scores @ self.direction)[:, None] * torch.mv(self.mix.t() @ self.mix, self.direction)


class TwoInputs(nn.Module):
    """Two inputs, merged by products, a quotient and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(3, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.left(left), self.right(right)
        h = a * torch.sigmoid(b) - 2 * a / (1 + b.square()) + (1 - b) / 3
        return self.out(h)


class NormedWeight(nn.Module):
    """Weight normalisation written out: weight = g v / |v| row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(6, 5))
        self.g = nn.Parameter(torch.rand(6, 1) + 0.5)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.v / self.v.pow(2).sum(1, keepdim=True).sqrt()
        return self.out(F.softplus(F.linear(x, weight)))


class Pooled(nn.Module):
    """An MLP on every position of a sequence, then the mean over the positions that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (examples, positions, 4), (examples, positions)
        h = torch.tanh(self.second(F.gelu(self.first(x))))
        return self.out((h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class PerPosition(nn.Module):
    """Class scores for every position, classes on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 5, 3, padding="same")
        self.second = nn.Conv1d(5, 4, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


class Scalars(nn.Module):
    """Scalar functions in a row, on arguments that stay where each is defined and smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        positive = z.square() + 0.5
        h = z.sin() + z.cos() * (0.3 * z).exp() + positive.log() + positive.sqrt() + positive.rsqrt()
        h = h - positive.reciprocal() + positive**1.7 + (1 + z.abs()) ** -0.5 + F.logsigmoid(z) + 1.5**z
        return self.second(h / 4)


class WrittenGelu(nn.Module):
    """GELU's tanh form as GPT-2 computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Heads(nn.Module):
    """Two outputs, one of which the other is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.body(x))
        return {"features": features, "scores": self.head(features)}


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.5),  # torch's backward rounds alpha to float32, so one that float32 holds
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu_written": WrittenGelu,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=2.0, threshold=4.0),
}


def mlp(activation: str = "tanh", inputs: int = 6, outputs: int = 3) -> nn.Module:
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(inputs, 9), act(), nn.Dropout(0.3), nn.Linear(9, 7), act(), nn.Linear(7, outputs)
    )


def normed_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 3),
    )


class ComputedNorms(nn.Module):
    """Normalisation layers whose weights and biases are computed, some of them views with steps or strides of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.scales, self.shifts = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(2, 6))
        self.shift = nn.Parameter(torch.randn(1))
        self.out = nn.Linear(6, 3)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = F.layer_norm(h, (6,), self.scales.sin()[::2], self.shift.expand(6))
        h = torch.tanh(F.rms_norm(h, (6,), self.scales[1::2]))
        h = F.batch_norm(h, self.mean, self.var, self.shifts.exp()[1], self.scales[::2])
        h = F.batch_norm(h, self.mean, self.var, self.shifts[0], (2 * self.shift).expand(6))
        return self.out(F.layer_norm(torch.tanh(h), (6,), self.shifts[0] * self.scales[:6], self.scales[::2]))


class ImageRows(nn.Module):
    """What works along the rows of an image, directly behind convolutions and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))
        self.batch = nn.BatchNorm2d(2)
        self.layer, self.rows = nn.LayerNorm([4, 5]), nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.convolutions
        x = self.layer(a(x))
        x = self.rows(self.batch(x)) + 2 * b(x).softmax(-1)
        x = self.mix(c(x)) + self.batch(x).cumsum(-1).tanh()
        x = d(x)
        return self.out((self.mix(x) + x.transpose(2, 3).sin().transpose(2, 3)).flatten(1))


def frozen_middle() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)
    )
    model[2:4].requires_grad_(False)
    return model


def frozen_front() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.LayerNorm([4, 4]), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    model[:2].requires_grad_(False)
    return model


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.GELU(),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(6, 4, (1, 3), padding="same", bias=False),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", groups=3, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 5, 1),
        nn.Softplus(),
        nn.Conv2d(5, 5, 3, stride=(2, 1), groups=5),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        ResidualBlock(3, 3, 1),
        ResidualBlock(3, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


class MaskOnly(nn.Module):
    """A product of active values that is read by nothing but a comparison: no derivative goes back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.gate, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x).tanh()
        m = (y / (1.5 + self.gate(x).tanh())) @ torch.ones(4, 1, dtype=x.dtype, device=x.device)
        return self.head(torch.where(m > 0.1, y, 2 * y.sin()))


class Extremes(nn.Module):
    """Greatest and least elements along any axes. Multiples of the levels, some of which are equal, are equal too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 12), nn.Linear(25, 3)
        self.levels = nn.Parameter(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).unflatten(1, (3, 2, 2))  # (examples, 3, 2, 2)
        equal = h.flatten(1)[:, :3, None] * self.levels  # (examples, 3, 5)
        only = h.flatten(2).masked_fill(self.mask, -torch.inf)
        none = only.masked_fill(~self.mask, -torch.inf).amax(2)
        other = equal.flip(2)  # [2, 2, 1, 2, 1] of [1, 2, 1, 2, 2]
        least, most = torch.clamp_min(equal, other), torch.clamp_max(equal, other)
        parts = [
            torch.maximum(equal, other).sin().mean(2) + torch.minimum(equal, other).square().mean(2),
            (least.exp() * most).mean(2),
            equal.transpose(1, 2).max(1)[0],
            equal.min(-1, keepdim=True)[0] * self.levels.max(),
            equal.amax(2) * self.levels.min().amin(-1) + self.levels.max(0)[0].amax(0),
            equal.amin((1, 2), keepdim=True) * equal.amax(1, keepdim=True)[..., :1],
            h.max(1)[0] + h.amin((1, 3))[:, None] + (equal.amax() > 99).to(h),
            h.min(2)[0].amax(1) * h.transpose(1, 3).amax((1, 2)).amin(1, keepdim=True),
            only.max(2)[0] + torch.where(none < -99, 0.3, none),
        ]
        return self.out(torch.cat([part.flatten(1) for part in parts], 1))


class Windows(nn.Module):
    """Windows of images as columns, overlapping, apart, side by side and dilated, and added up again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(2, 2, 2), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:  # (examples, 2, 7, 6)
        h = torch.tanh(self.first(x))  # (examples, 2, 6, 5)
        overlapping = F.unfold(h, 3, padding=(2, 1), stride=(1, 2))
        added = F.fold(overlapping.square(), (6, 5), 3, padding=(2, 1), stride=(1, 2))
        tiles = F.unfold(h, 2, padding=(1, 0), stride=2).sin()
        tiles = F.fold(tiles, (6, 5), 2, padding=(1, 0), stride=2)
        dilated = F.unfold(h, (2, 3), dilation=(3, 2))
        again = F.fold(dilated.cos(), (6, 5), (2, 3), dilation=(3, 2))
        apart = F.fold(F.unfold(h, (1, 2), stride=(2, 3)).exp(), (6, 5), (1, 2), stride=(2, 3))
        outside = F.unfold(h[:, :, :1], (3, 2), (2, 1), (2, 2), (3, 3)).cos()  # some places see no element
        outside = F.fold(outside, (1, 5), (3, 2), (2, 1), (2, 2), (3, 3))
        one = torch.stack([F.fold(F.unfold(image, 2).square(), (6, 5), 2) for image in h[:, :1].unbind()])
        parts = [added, tiles, again, apart, outside, one, h]
        return self.out(torch.cat([F.adaptive_avg_pool2d(part, (1, 2)).flatten(1) for part in parts], 1))


class Recurrent(nn.Module):
    """All kinds of recurrent layers, one behind the other, with the last states of each in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True)
        self.projected = nn.LSTM(4, 3, proj_size=2, bias=False, batch_first=True)
        self.gru = nn.GRU(2, 2, bidirectional=True)
        self.tanh, self.relu = nn.RNN(4, 3), nn.RNN(3, 2, nonlinearity="relu", bias=False)
        self.lstm_cell, self.gru_cell = nn.LSTMCell(2, 3), nn.GRUCell(3, 2, bias=False)
        self.tanh_cell, self.relu_cell = nn.RNNCell(2, 2), nn.RNNCell(2, 2, bias=False, nonlinearity="relu")
        self.start = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.out = nn.Linear(41, 3)

    def forward(self, x: Tensor) -> Tensor:  # (examples, 4, 3)
        start = (torch.arange(1, 5).to(x)[:, None, None] * self.start[:2]).expand(4, len(x), 2).contiguous()
        y, lstm = self.lstm(x, (start, start.sin()))
        y, projected = self.projected(y)
        y, gru = self.gru(y.transpose(0, 1))
        y, tanh = self.tanh(y, self.start.expand(1, len(x), 3).contiguous())
        y, relu = self.relu(y)
        states = [*lstm, *projected, gru, tanh, relu]
        parts = [state.transpose(0, 1).flatten(1) for state in states]
        h, c = self.lstm_cell(y[0], (parts[5][:, :3], parts[5][:, -3:]))
        g = self.gru_cell(h, y[1])
        parts += [h, c, self.relu_cell(self.tanh_cell(g, y[2]), g), g[:, :1]]
        return self.out(torch.cat([y.sum(0), *parts], 1))
