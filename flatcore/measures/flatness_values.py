"""The numbers behind relative flatness: quadratic forms of a layer's Hessian, summed, sampled, or the greatest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcore.block_spectra import block_spectra
from flatcore.measures.neurons import Neurons, NeuronsHessian, embedded
from flatcore.measures.probed import mean_of
from flatcore.operators import Hessian

__all__ = ["Found", "exact", "greatest", "named", "probed", "quadratic_forms"]

_BLOCK = 32  # quadratic forms at once


@dataclass(frozen=True)
class Found:
    """Value and standard error of each layer, and of the sum, with what they took."""

    values: dict[str, tuple[float, float]]
    stderr: float
    matvecs: int
    status: str = "converged"
    cheaper_exact: bool = False


def named(paths: Sequence[str], errors: Tensor) -> str:
    """The layer of a sum, or how many they are and the least certain one."""
    if len(paths) == 1:
        return f"layer {paths[0]!r}"
    worst = paths[int(errors.nan_to_num(math.inf).argmax())]
    return f"{len(paths)} layers together (the least certain: {worst!r})"


def _roots(layers: Mapping[str, Neurons], form: str) -> dict[str, Tensor]:
    """R (groups, outputs, r): the number is E <R Z, H[R Z]> over Z with independent entries of variance 1.

    Form "2021": R Rᵀ = W Wᵀ, so that R Z has the covariance of W A. Others: R Rᵀ is |W|² times the identity.
    """
    if form == "2021":
        return {path: neurons.root() for path, neurons in layers.items()}
    return {
        path: n.weight.norm() * torch.eye(n.weight.shape[1]).to(n.weight).expand(n.weight.shape[0], -1, -1)
        for path, n in layers.items()
    }


def quadratic_forms(layers: Mapping[str, Neurons], form: str) -> int:
    """How many `exact` takes."""
    return sum(
        n.weight.shape[0] * n.columns * (min(n.weight.shape[1:]) if form == "2021" else n.weight.shape[1])
        for n in layers.values()
    )


def exact(hessian: Hessian, layers: Mapping[str, Neurons], form: str) -> Found:
    """Sum over the columns r of R and t of the identity of <r tᵀ, H[r tᵀ]>."""
    roots, values, count = _roots(layers, form), {}, 0
    for path, neurons in layers.items():
        place, total = hessian.parameter_slices[neurons.layer.weight], 0.0
        for U in _outer(roots[path], neurons.columns):
            rows = embedded([(place, neurons.directions(U, hessian.dtype))], hessian)
            total += float(hessian.quadratic_form(rows.T).sum())
            count += len(rows)
        values[path] = (total, 0.0)
    return Found(values, 0.0, count)


def _outer(root: Tensor, columns: int) -> Iterator[Tensor]:
    groups, outputs, r = root.shape
    numbers = torch.arange(groups * r * columns, device=root.device)
    for part in numbers.split(_BLOCK):
        at, g, k, t = (
            torch.arange(len(part), device=root.device),
            part // (r * columns),
            part // columns % r,
            part % columns,
        )
        U = root.new_zeros(len(part), groups, outputs, columns)
        U[at, g, :, t] = root[g, :, k]
        yield U


def probed(
    hessian: Hessian,
    layers: Mapping[str, Neurons],
    form: str,
    rtol: float,
    max_matvecs: int,
    seed: int,
    instead: int | None,
) -> Found:
    """Means of <v, H v> over v = R Z with random signs Z.

    Of several layers, one vector holds independent v_l, and v_lᵀ (H v)_l counts for layer l: its other terms
    v_lᵀ H_lk v_k have mean zero. A single layer needs the quadratic form alone, half of a product.
    """
    roots, slices = _roots(layers, form), hessian.parameter_slices
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        parts = []
        for path, neurons in layers.items():
            R = roots[path]
            shape = (count, R.shape[0], R.shape[2], neurons.columns)
            signs = torch.randint(2, shape, generator=generator, dtype=torch.int8).to(R) * 2 - 1
            parts.append((slices[neurons.layer.weight], neurons.directions(R @ signs, hessian.dtype)))
        V = embedded(parts, hessian)
        if len(parts) == 1:
            return hessian.quadratic_form(V.T)[:, None]
        Y = (hessian @ V.T).T
        return torch.stack([(V[:, s] * Y[:, s]).sum(1, dtype=torch.float64) for s, _ in parts], 1).cpu()

    mean, error = mean_of(draw, rtol, max_matvecs, instead)
    if not bool(torch.isfinite(mean.value).all()):
        raise ValueError(
            "objective: expected finite second derivatives of the loss, got nan or inf; look at the loss"
        )
    values = {p: (float(v), float(e)) for p, v, e in zip(layers, mean.value, mean.stderr, strict=True)}
    status = (
        "converged"
        if mean.reached or mean.cheaper
        else mean.told(f"relative flatness of {named(list(layers), mean.stderr)}", error, rtol)
    )
    return Found(values, error, mean.samples, status, mean.cheaper)


def greatest(hessian: Hessian, layers: Mapping[str, Neurons], form: str, tol: float, seed: int) -> Found:
    """Form "max": sum_s |w_s|² lambda_max(H_ss); "2019-max": |W|² lambda_max(H_l). Errors: bounds from residuals.

    The Lanczos recurrences of all neurons, or layers, advance together (`block_spectra`).
    """
    blocks = NeuronsHessian(hessian, layers, by="neuron" if form == "max" else "layer")
    spectra = block_spectra(blocks, 1, which="LA", tol=tol, seed=seed)
    values, errors = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for (path, s), pairs in zip(blocks.parameter_slices, spectra.by_parameter.values(), strict=True):
        weight = layers[path].weight
        square = float((weight if form == "2019-max" else weight.flatten(0, 1)[s]).square().sum())
        values[path] += square * float(pairs.values[0])
        errors[path] += square * float(pairs.residuals[0])
    found = {path: (values[path], errors[path]) for path in layers}
    return Found(found, math.fsum(errors.values()), spectra.matvecs, spectra.status)
