"""The small models of the case table with attention, normalisation of rows, and moved elements. P is below 1000."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTH = 8


class Encoder(nn.Module):
    """torch's encoder layer on padded token sequences; the padding's embedding counts as a constant."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        h = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.out(h.masked_fill(padding[..., None], 0.0).mean(1))


class Decoder(nn.Module):
    """torch's decoder layer: causal on its own sequence, then on a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            WIDTH, 2, 8, activation="gelu", batch_first=True, norm_first=True
        )
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.layer(x, memory, tgt_mask=causal, tgt_is_causal=True)
        return self.out(y[:, -1])


class LanguageModel(nn.Module):
    """One block of causal attention between an embedding and the same matrix as the last layer."""

    def __init__(self, tokens: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, WIDTH)
        self.positions = nn.Embedding(5, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = self.qkv(self.norm1(h)).split(WIDTH, dim=-1)
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        o = F.scaled_dot_product_attention(*heads, is_causal=True)
        h = h + self.mix(o.transpose(1, 2).flatten(2))
        return self.head(self.norm2(h)).flatten(0, 1)


class GroupedQueries(nn.Module):
    """Attention written out with rotated queries, then with shared heads, then with a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(4, WIDTH, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))
        self.out = nn.Linear(WIDTH, 3)
        self.register_buffer("mask", torch.rand(5, 5) < 0.6)

    def forward(self, x: Tensor) -> Tensor:  # (examples, 5, 4)
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)  # (examples, 4 heads, 5, 2)
        k, v = self.kv(x).unflatten(-1, (2, 4)).transpose(1, 2).chunk(2, dim=-1)
        angle = torch.arange(5, dtype=x.dtype, device=x.device)[:, None]
        left, right = q.unbind(-1)
        turned = torch.stack((-right, left), -1)
        q = q * angle.cos() + turned * angle.sin()
        shared = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=0.8, enable_gqa=True)
        scores = torch.einsum("bhtw,bhsw->bhts", shared[:, 1:3], k)
        weights = scores.masked_fill(self.mask.logical_not(), -3.0).softmax(dim=-2)
        mixed = weights @ v
        biased = F.scaled_dot_product_attention(mixed, k, v, attn_mask=self.bias)
        flat = F.scaled_dot_product_attention(biased.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        h = torch.cat((shared[:, ::3], flat.view_as(biased)), dim=1).transpose(1, 2).flatten(2)
        return self.out(self.norm(h).mean(1))


class ImageNorms(nn.Module):
    """Group, instance and layer normalisation of images; a transposed convolution and interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 2, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.up = nn.ConvTranspose2d(4, 4, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), groups=2)
        self.layer = nn.LayerNorm([4, 3], elementwise_affine=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.instance(torch.tanh(self.group(self.first(x))))
        h = torch.tanh(self.up(h))
        h = F.interpolate(F.interpolate(h, scale_factor=(1.5, 0.7), mode="bilinear"), size=(4, 3))
        return self.out(self.layer(h).mean(-1).flatten(1))


class Gated(nn.Module):
    """Gates and activations with pieces, on both sides of their kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(6, 8)
        self.slopes, self.slope = nn.PReLU(8), nn.PReLU()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = 2 * self.slopes(self.second(F.glu(self.first(x))))
        h = F.hardswish(h) + F.mish(h) + F.relu6(h) + h.clamp(-1, 0.5) + h.clamp(min=0.3) - self.slope(h)
        h = h + F.hardtanh(h) + h.erf() + h.square().log1p() + (0.1 * h).expm1()
        h = torch.where((h > -1) & ~(h >= 2), h, 0.1 * h.square()) + torch.maximum(h, h.flip(1) + 0.1)
        h = h + F.softshrink(h, 0.3) - F.hardshrink(h) + F.threshold(h, 0.4, 0.1)
        h = h + F.cosine_similarity(h[:, :3], h[:, 3:6])[:, None] * h.sign() * (h < 0.5).to(h)
        h = h + torch.where(h > 0.2, h.log(), 0.3)  # NaN where it is not chosen
        return self.out(F.softsign(h) + (0.1 * h).exp2() + (h.square() + 1).log2())


class Moved(nn.Module):
    """Elements moved, repeated and left out in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(24, 3)
        self.register_buffer("places", torch.tensor([2, 0, -1, 1, 2]))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:  # (examples, 3, 4), (examples, 3, 2) below 6
        h = torch.tanh(self.first(x))
        first = h.gather(2, index).repeat_interleave(2, dim=1).flatten(1)
        a, b, c = torch.cat((h, h.flip(1).roll((1, -2), (1, 2))), dim=2).split([5, 4, 3], dim=2)
        second = torch.stack((a[..., 1::2], b.narrow(2, 1, 2).repeat(1, 1, 1)), dim=1)
        third = F.pad(c, (1, 1), mode="reflect")[:, self.places, :].index_select(2, self.places[:3] + 1)
        fourth = torch.where(index.sum(2, keepdim=True) > 4, h, 0.3) * h.tril() + F.pad(
            h[:, :2], (0, 0, 1, 0)
        )
        fifth = h[:, self.places[[0, 3]], self.places[[1, 0]]]
        windows = h.unfold(2, 3, 2).sum((1, 2)) + h.diagonal(dim1=1, dim2=2)
        parts = (second.sum((1, 2)), third.mean(1), fourth.mean(1), fifth, windows, first[:, :8])
        return self.out(torch.cat(parts, dim=1).masked_fill(index.flatten(1)[:, :1] == 3, 0.2))


class Statistics(nn.Module):
    """Variances, cumulative sums, log-probabilities inside the model, a weight divided by its spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = spectral_norm(nn.Linear(8, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).cumsum(1)
        h = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 0.1) + h.var(1, keepdim=True).log()
        z = self.second(torch.tanh(h)) + self.bias
        z = z.log_softmax(1) * z.softmax(1) + z.unflatten(1, (2, 3)).logsumexp((1, 2))[:, None]
        return self.out(torch.lerp(z, z.square(), 0.3))
