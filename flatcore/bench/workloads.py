"""The workloads of the microbenchmark: models of the kinds people ask about, on random data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]  # inputs, target
Built = tuple[nn.Module, Loss, Batch]


@dataclass(frozen=True)
class Workload:
    """`build()` gives (model, loss, (inputs, target)) in float32 on the CPU, the model in eval mode.

    needs: a package without which it cannot be built. large: left out of a quick run.
    """

    name: str
    title: str
    build: Callable[[], Built]
    needs: str | None = None
    large: bool = False

    def missing(self) -> str:
        """Why it cannot be built here; empty if it can."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return ""
        return f"{self.name} needs the package {self.needs}, which is not installed"

    def at(self, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
        """What `build` gives after this seed, converted: a seed means the same numbers everywhere."""
        torch.manual_seed(seed)
        model, loss, (inputs, target) = self.build()
        batch = (_converted(inputs, dtype, device), _converted(target, dtype, device))
        return model.to(device, dtype), loss, batch


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


class MLP(nn.Sequential):
    """Fully connected tanh net."""

    def __init__(self, *sizes: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        super().__init__(*layers[:-1])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """The small residual nets of He et al. (2016) for 32 x 32 images: three stages of `blocks` blocks."""

    def __init__(self, blocks: int = 1, width: int = 16, classes: int = 10) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block with fused attention."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        examples, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(examples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(examples, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal language model: (examples, tokens) ids to (examples, tokens, vocabulary) logits."""

    def __init__(self, vocabulary: int, tokens: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.position)))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches, blocks, mean over the patches, classes (Dosovitskiy et al. 2021, pooled instead of a class token)."""

    def __init__(self, size: int, patch: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every token given those before it; logits (examples, tokens, V), ids (examples, tokens)."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def mlp(examples: int, *sizes: int) -> Built:
    batch = (torch.randn(examples, sizes[0]), torch.randint(sizes[-1], (examples,)))
    return MLP(*sizes).eval(), nn.CrossEntropyLoss(), batch


def resnet(examples: int, blocks: int = 1, width: int = 16, size: int = 32) -> Built:
    batch = (torch.randn(examples, 3, size, size), torch.randint(10, (examples,)))
    return ResNet(blocks, width).eval(), nn.CrossEntropyLoss(), batch


def decoder(
    examples: int, vocabulary: int = 256, tokens: int = 64, width: int = 128, heads: int = 4, depth: int = 4
) -> Built:
    ids = torch.randint(vocabulary, (examples, tokens))
    return Decoder(vocabulary, tokens, width, heads, depth).eval(), next_token_loss, (ids, ids)


def vision_transformer(
    examples: int, size: int = 32, patch: int = 4, width: int = 192, heads: int = 3, depth: int = 12
) -> Built:
    batch = (torch.randn(examples, 3, size, size), torch.randint(10, (examples,)))
    return VisionTransformer(size, patch, width, heads, depth, 10).eval(), nn.CrossEntropyLoss(), batch


class _Logits(nn.Module):
    """A Hugging Face language model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def gpt2(tokens: int, examples: int = 1, **config: Any) -> Built:
    """GPT-2 small, or what `config` makes of it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.randint(50257, (examples, tokens))
    return _Logits(GPT2LMHeadModel(GPT2Config(**config))).eval(), next_token_loss, (ids, ids)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp-tiny", "MLP 64-32-10, batch 128", lambda: mlp(128, 64, 32, 10)),
        Workload("mlp-mid", "MLP 784-512-512-10, batch 256", lambda: mlp(256, 784, 512, 512, 10)),
        Workload(
            "mlp-wide", "MLP 1024-4096-4096-10, batch 128", lambda: mlp(128, 1024, 4096, 4096, 10), large=True
        ),
        Workload("resnet", "ResNet-8, 32x32 images, batch 32", lambda: resnet(32)),
        Workload("decoder", "decoder, 4 blocks of width 128, 8 x 64 tokens", lambda: decoder(8)),
        Workload(
            "vit", "ViT-tiny, 32x32 images, patch 4, batch 4", lambda: vision_transformer(4), large=True
        ),
        Workload("gpt2", "GPT-2 small, 128 tokens", lambda: gpt2(128), needs="transformers", large=True),
        Workload(
            "gpt2-long",
            "GPT-2 small, 4 x 1024 tokens",
            lambda: gpt2(1024, 4),
            needs="transformers",
            large=True,
        ),
    )
}
