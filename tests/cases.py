"""The one table of cases: small models and losses, for correctness tests and benchmarks alike.

P is below about 1000 in each, so that a dense float64 Hessian is cheap. Batches are of odd size. Biases and
running statistics are random, so that no term vanishes by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from case_models import (
    ACTIVATIONS,
    ComputedNorms,
    Extremes,
    Heads,
    ImageRows,
    LeftMatrix,
    MaskOnly,
    NormedWeight,
    PerPosition,
    Pooled,
    Recurrent,
    Scalars,
    Tied,
    TwoInputs,
    Unused,
    Windows,
    cnn,
    depthwise,
    frozen_front,
    frozen_middle,
    mlp,
    normed_mlp,
    resnet,
)
from case_transformers import (
    Decoder,
    Encoder,
    Gated,
    GroupedQueries,
    ImageNorms,
    LanguageModel,
    Moved,
    Statistics,
)
from torch import Tensor, nn

from flatcore.bench import workloads

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


def padded_tokens() -> tuple[Tensor, ...]:
    tokens = indices(7, 5, classes=5) + 1
    return tokens.where(torch.arange(5) < torch.randint(1, 6, (7, 1)), 0), indices(7)


def of_positions(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target.flatten())


def of_tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"].flatten())


def by_hand(output: Tensor, target: Tensor) -> Tensor:
    return -(F.one_hot(target, 3) * output.log_softmax(-1)).sum(-1).mean()


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
    case("computed-norms", ComputedNorms, nn.CrossEntropyLoss, vectors(5, indices)),
    case("image-rows", ImageRows, nn.CrossEntropyLoss, images(2, 4, 5, 5)),
    case("mask-only", MaskOnly, nn.CrossEntropyLoss, vectors(5, indices)),
    case("tied", Tied, nn.MSELoss, vectors(6, lambda n: torch.randn(n, 6))),
    case("frozen-middle", frozen_middle, nn.CrossEntropyLoss, vectors(6, indices)),
    case("frozen-front", frozen_front, nn.CrossEntropyLoss, images(1, 6, 6)),
    case("unused", Unused, nn.CrossEntropyLoss, vectors(5, indices)),
    case("cnn", cnn, nn.CrossEntropyLoss, images(2, 9, 8)),
    case("depthwise", depthwise, nn.CrossEntropyLoss, images(3, 7, 6)),
    case("resnet", resnet, nn.CrossEntropyLoss, images(1, 8, 8)),
    # Nets of `flatcore bench`, in small; its ResNet's block is that of "resnet".
    case("bench-mlp", lambda: workloads.MLP(5, 6, 3), nn.CrossEntropyLoss, vectors(5, indices)),
    case(
        "bench-decoder",
        lambda: workloads.Decoder(vocabulary=7, tokens=5, width=4, heads=2, depth=1),
        plain(workloads.next_token_loss),
        lambda: (indices(7, 5, classes=7),) * 2,
    ),
    case(
        "bench-vit",
        lambda: workloads.VisionTransformer(size=8, patch=4, width=4, heads=2, depth=1, classes=3),
        nn.CrossEntropyLoss,
        images(3, 8, 8),
    ),
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
    case("ce-by-hand", mlp, plain(by_hand), vectors(6, indices)),
    case("encoder", Encoder, nn.CrossEntropyLoss, padded_tokens),
    case("encoder-norm-first", lambda: Encoder(True), nn.CrossEntropyLoss, padded_tokens),
    case(
        "decoder",
        Decoder,
        nn.CrossEntropyLoss,
        lambda: (torch.randn(5, 3, 8), torch.randn(5, 4, 8), indices(5)),
    ),
    case(
        "language-model",
        LanguageModel,
        plain(of_positions),
        lambda: (indices(5, 4, classes=9), indices(5, 4, classes=9)),
    ),
    case(
        "language-model-by-model",
        LanguageModel,
        plain(of_tokens),
        lambda: {"tokens": indices(5, 4, classes=9), "labels": some_ignored(5, 4)},
        "model_batch",
    ),
    case("grouped-queries", GroupedQueries, nn.CrossEntropyLoss, lambda: (torch.randn(5, 5, 4), indices(5))),
    case("image-norms", ImageNorms, nn.CrossEntropyLoss, images(2, 4, 5, 5)),
    case("gated", Gated, nn.CrossEntropyLoss, vectors(5, indices)),
    case(
        "moved",
        Moved,
        nn.CrossEntropyLoss,
        lambda: (torch.randn(7, 3, 4), indices(7, 3, 2, classes=6), indices(7)),
    ),
    case("extremes", Extremes, nn.CrossEntropyLoss, vectors(5, indices)),
    case("windows", Windows, nn.CrossEntropyLoss, images(2, 7, 6, 5)),
    case("recurrent", Recurrent, nn.CrossEntropyLoss, lambda: (torch.randn(5, 4, 3), indices(5))),
    case("statistics", Statistics, nn.CrossEntropyLoss, vectors(5, indices)),
    case("penalised", mlp, plain(penalised), vectors(6, indices), "model_batch"),
)
