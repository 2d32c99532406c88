"""Hugging Face architectures, tiny and with random weights: native, and right to what their own precision allows.

The reference is torch's double backward through the model itself under math attention, in float64. In float32 the
same in float32 sets the measure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatcore as fc

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

TOKENS, LENGTH, CLASSES = 50, 7, 3
TEXT = {"vocab_size": TOKENS, "max_position_embeddings": 16}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, **TEXT}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **TEXT}
STAGES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 4}

# The model computes in float64 throughout: rounding of some thousand operations and no more.
EXACT = 1e-9
# The model casts to float32 inside: its own second derivatives are good to that.
SINGLE = 1e-6
# Relative error that float32 may have in any case, however good autograd happens to be.
FLOOR32 = 2e-6


def language(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(0, TOKENS, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 2, LENGTH - 3])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def classified(model: nn.Module) -> dict[str, Tensor]:
    batch = language(model)
    return {**batch, "labels": torch.randint(0, CLASSES, (3,))}


def pictures(size: int) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda model: {"pixel_values": torch.randn(3, 3, size, size), "labels": torch.tensor([0, 2, 1])}


@dataclass(frozen=True)
class Architecture:
    model: str
    config: str
    options: dict[str, Any]
    batch: Callable[[nn.Module], dict[str, Tensor]]
    tolerance: float = EXACT


# The loss of the causal language models is computed in float32 by themselves (logits.float()).
ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": TOKENS, "n_positions": 16},
        language,
        SINGLE,
    ),
    # So many tokens that the head and its cross-entropy are one op.
    "gpt2-vocabulary": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 1100, "n_positions": 16},
        language,
        SINGLE,
    ),
    "bert": Architecture("BertForSequenceClassification", "BertConfig", BERT, classified),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **TEXT},
        classified,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {**{k: v for k, v in BERT.items() if k not in TEXT}, "image_size": 16, "patch_size": 8},
        pictures(16),
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2},
        language,
        SINGLE,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2},
        language,
        SINGLE,
    ),
    "gemma": Architecture(
        "GemmaForCausalLM",
        "GemmaConfig",
        {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4},
        language,
        SINGLE,
    ),
    "convnext": Architecture("ConvNextForImageClassification", "ConvNextConfig", STAGES, pictures(16)),
    "convnextv2": Architecture("ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES, pictures(16)),
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        pictures(32),
    ),
    "mobilenetv2": Architecture(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32},
        pictures(32),
    ),
}


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = {} if architecture.batch is language else {"num_labels": CLASSES}
        config = getattr(transformers, architecture.config)(**architecture.options, **labels)
        model = getattr(transformers, architecture.model)(config)
        with torch.no_grad():  # no term shall vanish because a bias is zero or a scale is one
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        batch = architecture.batch(model)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return model.to(dtype).eval(), batch


def double_backward(model: nn.Module, loss: Callable[[], Tensor], V: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient, H V) by autograd, one direction at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(gradients: tuple[Tensor | None, ...]) -> Tensor:
        pairs = zip(gradients, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    with sdpa_kernel(SDPBackend.MATH):
        g = flat(torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True))
        columns = [
            flat(torch.autograd.grad(g, parameters, v, retain_graph=True, allow_unused=True)) for v in V.T
        ]
    return g.detach(), torch.stack(columns, 1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hessian(name: str) -> None:
    model, batch = built(name)
    H = fc.Hessian(fc.Objective(model, fc.hf_loss(), batch))
    assert H.plan().native_fraction == 1.0
    V = torch.randn(H.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, product = double_backward(model, lambda: model(**batch).loss, V)
    tolerance = ARCHITECTURES[name].tolerance
    assert relative(H @ V, product) <= tolerance


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hessian_in_single_precision(name: str) -> None:
    """At most twice the error of autograd in float32, both against float64 at the same parameters."""
    (model, batch), (exact_model, exact_batch) = built(name, torch.float32), built(name)
    H = fc.Hessian(fc.Objective(model, fc.hf_loss(), batch))
    assert H.plan().native_fraction == 1.0
    V = torch.randn(H.shape[0], 3, generator=torch.Generator().manual_seed(1))
    _, single = double_backward(model, lambda: model(**batch).loss, V)
    _, exact = double_backward(exact_model, lambda: exact_model(**exact_batch).loss, V.double())
    for K in (1, 3):
        allowed = max(2 * relative(single[:, :K], exact[:, :K]), FLOOR32)
        assert relative(H @ V[:, :K], exact[:, :K]) <= allowed


def test_hessian_of_gpt2_without_a_cast() -> None:
    """With the loss taken outside the model nothing is rounded to float32 any more."""
    model, batch = built("gpt2")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    H = fc.Hessian(fc.Objective(model, fc.ModelLoss(loss), batch))
    V = torch.randn(H.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative(H @ V, double_backward(model, lambda: loss(model, batch), V)[1]) <= EXACT


def test_ggn_and_covariance_of_bert() -> None:
    """The cut of a loss inside the model is what its cross-entropy reads, the logits."""
    model, batch = built("bert")
    objective = fc.Objective(model, fc.hf_loss(), batch)
    parameters = list(model.parameters())

    def rows(outputs: Tensor) -> Tensor:
        gradients = [torch.autograd.grad(z, parameters, retain_graph=True) for z in outputs.flatten()]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in gradients])

    J = rows(model(**batch).logits)  # (examples * classes, P)
    p = model(**batch).logits.softmax(1).detach()
    inner = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p)) / 3
    V = torch.randn(J.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative(fc.GGN(objective) @ V, J.T @ (inner @ (J @ V))) <= EXACT
    each = [model(**{k: v[n : n + 1] for k, v in batch.items()}).loss for n in range(3)]
    g = rows(torch.stack(each))
    assert relative(fc.GradientCovariance(objective, centered=False) @ V, g.T @ (g @ V) / 3) <= EXACT


def test_resnet_in_train_mode() -> None:
    """Batch normalisation by the batch's own statistics; the running ones stay where they are."""
    model, batch = built("resnet")
    model.train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    H = fc.Hessian(fc.Objective(model, fc.hf_loss(), batch, allow_train_mode=True))
    assert H.plan().native_fraction == 1.0
    V = torch.randn(H.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = H @ V
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    assert relative(product, double_backward(model, lambda: model(**batch).loss, V)[1]) <= EXACT
