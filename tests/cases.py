"""The one table of cases: small models and losses, for correctness tests and benchmarks alike.

P is below about 600 in each, so that a dense float64 Hessian is cheap. Batches are of odd size. Biases and
running statistics are random, so that no term vanishes by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossKind = Literal["output_target", "model_batch"]
Built = tuple[nn.Module, Callable[..., Tensor], Any]


@dataclass(frozen=True)
class Case:
    """`build(seed, dtype)` gives (model, loss, batch); the model is in eval mode."""

    name: str
    build: Callable[[int, torch.dtype], Built]
    loss_kind: LossKind = "output_target"

    def __str__(self) -> str:
        return self.name


def selected(model: nn.Module) -> list[str]:
    """Names of the trainable parameters, as an objective selects them when nothing is said."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


# --- models ---


class Residual(nn.Module):
    """Two convolutions with batch normalisation around a shortcut; the second block halves the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


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
        Residual(3, 3, 1),
        Residual(3, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


# --- batches and losses ---


def vectors(inputs: int, target: Callable[[int], Tensor], n: int = 13) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(n, inputs), target(n))


def images(channels: int, height: int, width: int, n: int = 7) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(n, channels, height, width), indices(n))


def indices(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape)


def some_ignored(*shape: int) -> Tensor:
    target = indices(*shape)
    return target.where(torch.rand(shape) < 0.7, -100)


def two_inputs() -> tuple[Tensor, ...]:
    return torch.randn(13, 4), torch.randn(13, 3), indices(13)


def masked_sequences() -> dict[str, Tensor]:
    mask = torch.arange(5) < torch.randint(1, 6, (7, 1))
    return {"x": torch.randn(7, 5, 4), "mask": mask, "labels": indices(7)}


def composite(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + 0.1 * output.square().mean()


def weighted_by_hand(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    weights = 1.0 + target
    return (losses * weights).sum() / weights.sum()


def penalised(model: nn.Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss + sum(0.01 * p.square().sum() for p in model.parameters())


def of_heads(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["scores"], target) + 0.3 * output["features"].pow(3).mean()


def by_model(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["mask"]), batch["labels"])


def case(
    name: str,
    model: Callable[[], nn.Module],
    loss: Callable[[], Callable[..., Tensor]],
    batch: Callable[[], Any],
    loss_kind: LossKind = "output_target",
) -> Case:
    def build(seed: int, dtype: torch.dtype) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            data = batch()
            net = model()
            initialise(net, data)
            return net.to(dtype).eval(), to_dtype(loss(), dtype), to_dtype(data, dtype)

    return Case(name, build, loss_kind)


def initialise(net: nn.Module, data: Any) -> None:
    """Random biases and normalisation layers; sizes of lazy layers."""
    if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()):
        net(data[0])
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(p, 0.0 if name == "bias" else 1.0, 0.5)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def to_dtype(thing: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`; a loss module likewise; anything else as it is."""
    if isinstance(thing, (tuple, list)):
        return type(thing)(to_dtype(part, dtype) for part in thing)
    if isinstance(thing, dict):
        return {key: to_dtype(part, dtype) for key, part in thing.items()}
    if isinstance(thing, nn.Module) or (isinstance(thing, Tensor) and thing.is_floating_point()):
        return thing.to(dtype)
    return thing


def plain(loss: Callable[..., Tensor]) -> Callable[[], Callable[..., Tensor]]:
    return lambda: loss


CASES: tuple[Case, ...] = (
    case("logistic", lambda: nn.Linear(8, 3), nn.CrossEntropyLoss, vectors(8, indices)),
    *(
        case(f"mlp-{name}", lambda name=name: mlp(name), nn.CrossEntropyLoss, vectors(6, indices))
        for name in ACTIVATIONS
    ),
    case("mlp-batchnorm", normed_mlp, nn.CrossEntropyLoss, vectors(6, indices)),
    case("tied", Tied, nn.MSELoss, vectors(6, lambda n: torch.randn(n, 6))),
    case("frozen-middle", frozen_middle, nn.CrossEntropyLoss, vectors(6, indices)),
    case("frozen-front", frozen_front, nn.CrossEntropyLoss, images(1, 6, 6)),
    case("unused", Unused, nn.CrossEntropyLoss, vectors(5, indices)),
    case("cnn", cnn, nn.CrossEntropyLoss, images(2, 9, 8)),
    case("depthwise", depthwise, nn.CrossEntropyLoss, images(3, 7, 6)),
    case("resnet", resnet, nn.CrossEntropyLoss, images(1, 8, 8)),
    case("left-matrix", LeftMatrix, nn.CrossEntropyLoss, lambda: (torch.randn(7, 3, 5), indices(7))),
    case("two-inputs", TwoInputs, nn.CrossEntropyLoss, two_inputs),
    case("sequence", Pooled, nn.CrossEntropyLoss, masked_sequences),
    case("sequence-by-model", Pooled, plain(by_model), masked_sequences, "model_batch"),
    case("weight-norm", NormedWeight, nn.CrossEntropyLoss, vectors(5, indices)),
    case("scalar-functions", Scalars, nn.CrossEntropyLoss, vectors(5, indices)),
    case("heads", Heads, plain(of_heads), vectors(5, indices)),
    case("ce-weighted", mlp, lambda: nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 2.5])), vectors(6, indices)),
    case("ce-ignore", mlp, nn.CrossEntropyLoss, vectors(6, some_ignored)),
    case(
        "ce-smoothing",
        mlp,
        lambda: nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 2.5]), label_smoothing=0.2),
        vectors(6, some_ignored),
    ),
    case(
        "ce-soft",
        mlp,
        lambda: nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 2.5]), label_smoothing=0.1),
        vectors(6, lambda n: torch.randn(n, 3).softmax(1)),
    ),
    case("ce-sum", mlp, lambda: nn.CrossEntropyLoss(reduction="sum"), vectors(6, indices)),
    case("ce-none", mlp, plain(weighted_by_hand), vectors(6, indices)),
    case(
        "ce-positions", PerPosition, nn.CrossEntropyLoss, lambda: (torch.randn(7, 2, 9), some_ignored(7, 9))
    ),
    case(
        "ce-one-example",
        lambda: mlp(outputs=3),
        nn.CrossEntropyLoss,
        lambda: (torch.randn(6), torch.tensor(2)),
    ),
    case(
        "nll",
        lambda: nn.Sequential(mlp(), nn.LogSoftmax(1)),
        lambda: nn.NLLLoss(torch.tensor([0.2, 1.0, 2.5])),
        vectors(6, indices),
    ),
    case("mse", mlp, nn.MSELoss, vectors(6, lambda n: torch.randn(n, 3))),
    case("mse-sum", mlp, lambda: nn.MSELoss(reduction="sum"), vectors(6, lambda n: torch.randn(n, 3))),
    case("l1", mlp, nn.L1Loss, vectors(6, lambda n: torch.randn(n, 3))),
    case("smooth-l1", mlp, lambda: nn.SmoothL1Loss(beta=0.7), vectors(6, lambda n: torch.randn(n, 3))),
    case("huber", mlp, lambda: nn.HuberLoss(delta=0.6), vectors(6, lambda n: torch.randn(n, 3))),
    case("bce", mlp, nn.BCEWithLogitsLoss, vectors(6, lambda n: torch.rand(n, 3))),
    case(
        "bce-weighted",
        mlp,
        lambda: nn.BCEWithLogitsLoss(torch.rand(3) + 0.5, pos_weight=torch.tensor([0.3, 2.0, 1.0])),
        vectors(6, lambda n: torch.rand(n, 3)),
    ),
    case("composite", mlp, plain(composite), vectors(6, indices)),
    case("penalised", mlp, plain(penalised), vectors(6, indices), "model_batch"),
)
