"""Heads of many kinds for cross-entropies: what may be fused, and what stands between logits and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reference import Reference
from torch import Tensor, nn

import flatcore as fc
from flatcore.capture import batch_leaves

CLASSES = 7


class Tied(nn.Module):
    """A language model whose embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = torch.tanh(self.mix(x.cumsum(1)))
        return F.linear(x, self.embedding.weight)


class Product(nn.Module):
    """The head as a product with a matrix (width, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.matrix = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) @ self.matrix


class ClassesSecond(nn.Module):
    """Logits (examples, classes, positions), as torch's cross-entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.body(x))).transpose(1, 2)


class Prompt(nn.Module):
    """The input of the head is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, CLASSES)

    def forward(self, _: Tensor) -> Tensor:
        return self.head(self.prompt)


class Shared(nn.Module):
    """One parameter is both the input and the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, _: Tensor) -> Tensor:
        return F.linear(self.matrix, self.matrix)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))


# --- losses ---


def shifted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].reshape(-1, CLASSES), target[:, 1:].reshape(-1))


def flattened(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def weighted_rows(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    return (losses * (1 + target)).sum() / 20


def exponential(output: Tensor, target: Tensor) -> Tensor:
    """The losses go through something curved, so their own tangents are read."""
    return F.cross_entropy(output, target, reduction="none").exp().mean()


def perplexity(output: Tensor, target: Tensor) -> Tensor:
    return flattened(output, target).exp()


def picked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Masked language modelling: some positions only."""
    return F.cross_entropy(model(batch["x"])[:, batch["places"]].flatten(0, 1), batch["labels"].flatten())


# --- batches ---


def classes(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape)


def vectors() -> Any:
    return torch.randn(9, 3), classes(9)


def vectors_ignored() -> Any:
    return torch.randn(9, 3), classes(9).where(torch.arange(9) % 3 > 0, -100)


def sequences() -> Any:
    return torch.randn(4, 5, 3), classes(4, 5)


def tokens() -> Any:
    batch = classes(4, 5)
    return batch, batch


def at_places() -> Any:
    return {"x": torch.randn(4, 5, 3), "places": torch.tensor([3, 0, 3]), "labels": classes(4, 3)}


@dataclass(frozen=True)
class Head:
    name: str
    model: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    batch: Callable[[], Any]
    params: str | None = None  # a pattern of the parameters selected; None: all
    plain_mean: bool = True  # of one term per example
    kind: str = "output_target"

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[..., Tensor], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model, batch = self.model().to(dtype).eval(), self.batch()
        for name, p in model.named_parameters():
            p.requires_grad_(self.params is None or self.params in name)
        cast = {t: t.to(dtype) for t in batch_leaves(batch) if t.is_floating_point()}
        batch = torch.utils._pytree.tree_map(lambda t: cast.get(t, t), batch)
        loss = copy.deepcopy(self.loss).to(dtype) if isinstance(self.loss, nn.Module) else self.loss
        return model, loss, batch

    def objective(self, dtype: torch.dtype = torch.float64) -> fc.Objective:
        model, loss, batch = self.build(dtype)
        return fc.Objective(model, fc.ModelLoss(loss) if self.kind == "model_batch" else loss, batch)

    def reference(self, dtype: torch.dtype = torch.float64) -> Reference:
        return Reference(*self.build(dtype), self.kind)

    def __str__(self) -> str:
        return self.name


WEIGHTS = torch.linspace(0.3, 2.0, CLASSES)
HEADS = (
    Head("plain", mlp, nn.CrossEntropyLoss(), vectors),
    Head("no-bias", Product, nn.CrossEntropyLoss(), vectors),
    Head("tied", Tied, flattened, tokens),
    Head("shifted", Tied, shifted, tokens),
    Head("ignored", mlp, nn.CrossEntropyLoss(), vectors_ignored, plain_mean=False),
    Head("weighted", mlp, nn.CrossEntropyLoss(WEIGHTS), vectors_ignored, plain_mean=False),
    Head("sum", mlp, nn.CrossEntropyLoss(reduction="sum"), vectors, plain_mean=False),
    Head("rows-weighted", mlp, weighted_rows, vectors, plain_mean=False),
    Head("exponential", mlp, exponential, vectors),
    Head("perplexity", mlp, lambda o, t: nn.CrossEntropyLoss()(o, t).exp(), vectors, plain_mean=False),
    Head("classes-second", ClassesSecond, nn.CrossEntropyLoss(), sequences),
    Head("picked", mlp, picked, at_places, plain_mean=False, kind="model_batch"),
    Head("prompt", Prompt, nn.CrossEntropyLoss(), lambda: (torch.randn(5, 1), classes(5)), plain_mean=False),
    Head("shared", Shared, nn.CrossEntropyLoss(), lambda: (torch.randn(7, 1), classes(7)), plain_mean=False),
    Head("frozen-body", mlp, nn.CrossEntropyLoss(), vectors, params="2."),
    Head("frozen-head", mlp, nn.CrossEntropyLoss(), vectors, params="0."),
    Head("frozen-weight", mlp, nn.CrossEntropyLoss(), vectors, params="bias"),
    Head("bias-alone", mlp, nn.CrossEntropyLoss(), vectors, params="2.bias"),
    Head("frozen-shifted", mlp, shifted, sequences, params="2.weight"),
)
