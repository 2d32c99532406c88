"""Normal numbers by number: a draw can be repeated without any state."""

from __future__ import annotations

import torch

__all__ = ["noise_generator"]


def noise_generator(seed: int, count: int, device: torch.device) -> torch.Generator:
    """The generator of draw number ``count``.

    Seed and count are scrambled (SplitMix64, Steele, Lea and Flood, OOPSLA 2014), as generators of close seeds may
    give numbers that are alike.
    """
    mask = 2**64 - 1
    z = (seed * 0xD1342543DE82EF95 + (count + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return torch.Generator(device=device).manual_seed((z ^ (z >> 31)) % 2**63)
