"""The ways that a comparison times, each bound to one workload and one block of directions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatcore.bench import bare_jax, bare_torch, bare_torch_ggn, peers
from flatcore.bench.bare_torch import Directions, Way, joined, split
from flatcore.bench.setting import Setting
from flatcore.bench.workloads import Built

FLATCORE = "flatcore"
Run = Callable[[], Any]  # computes the products, in the way's own form


def flat(product: Tensor | Directions) -> Tensor:
    """Products as flatcore (flat) and torch's ways (split) give them, as (K, P)."""
    return product if isinstance(product, Tensor) else joined(product)


@dataclass(frozen=True)
class Candidate:
    """`prepare()` keeps what the way can keep between products and gives the run that is timed.

    flat:    what the run gives, as (K, P).
    counted: whether torch's allocator sees the memory of the way.
    """

    kind: str
    prepare: Callable[[], Run]
    flat: Callable[[Any], Tensor] = flat
    counted: bool = True


def candidates(
    built: Built, V: Tensor, setting: Setting, *, compiled: bool, only: Collection[str]
) -> dict[str, Candidate]:
    """Every way to the products of the setting's operator with V (K, P), flatcore first.

    compiled: also the bare-torch ways through torch.compile. only: names of the ways beside flatcore; empty: all.
    """
    operator = setting.operator
    directions = split(V, tuple(built[0].parameters()))
    found = {FLATCORE: Candidate(FLATCORE, lambda: _flatcore(built, V, setting))}
    for name, prepare in torch_ways(built, operator, compiled).items():
        found[name] = Candidate("torch", _bound(prepare, directions))
    for name in peers.installed(operator):
        found[name] = Candidate("peer", _bound_peer(peers.PEERS[operator][name], built, V))
    if bare_jax.fits(built):
        for name, prepare_bound in bare_jax.ways(built, directions, operator).items():
            found[name] = Candidate("jax", prepare_bound, bare_jax.to_torch, counted=False)
    if not only:
        return found
    unknown = set(only) - found.keys()
    if unknown:
        raise ValueError(f"way: expected some of {', '.join(found)}, got {min(unknown)!r}")
    return {name: c for name, c in found.items() if name == FLATCORE or name in only}


def torch_ways(built: Built, operator: str, compiled: bool) -> dict[str, Callable[[], Way]]:
    """The first needs least of torch: it is the reference."""
    if operator == "ggn":
        return bare_torch_ggn.ways(*bare_torch_ggn.network_and_criterion(*built), compiled)
    return bare_torch.ways(*bare_torch.loss_of_parameters(*built), compiled)


def _flatcore(built: Built, V: Tensor, setting: Setting) -> Run:
    A = setting.product_operator(*built)
    A.plan()  # captured, so that its memory is the product's
    return lambda: (A @ V.T).T


def _bound(prepare: Callable[[], Way], V: Directions) -> Callable[[], Run]:
    def bound() -> Run:
        way = prepare()
        return lambda: way(V)

    return bound


def _bound_peer(prepare: Callable[..., peers.FlatWay], built: Built, V: Tensor) -> Callable[[], Run]:
    def bound() -> Run:
        way = prepare(*built)
        return lambda: way(V)

    return bound
