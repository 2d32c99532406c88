"""The ways that a comparison times, each bound to one workload and one block of directions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

import flatcore as fc
from flatcore.bench import peers
from flatcore.bench.bare_torch import Directions, Way, joined, loss_of_parameters, split, ways
from flatcore.bench.workloads import Built

FLATCORE = "flatcore"
Run = Callable[[], Tensor | Directions]  # computes the products, flat (K, P) or split


@dataclass(frozen=True)
class Candidate:
    """`prepare()` keeps what the way can keep between products and gives the run that is timed."""

    kind: str
    prepare: Callable[[], Run]


def candidates(built: Built, V: Tensor, *, compiled: bool, only: Collection[str]) -> dict[str, Candidate]:
    """Every way to the products with V (K, P), flatcore first.

    compiled: also the bare-torch ways through torch.compile. only: names of the ways beside flatcore; empty: all.
    """
    evaluate, parameters = loss_of_parameters(*built)
    directions = split(V, parameters)
    found = {FLATCORE: Candidate(FLATCORE, lambda: _flatcore(built, V))}
    for name, prepare in ways(evaluate, parameters, compiled).items():
        found[name] = Candidate("torch", _bound(prepare, directions))
    for name in peers.installed():
        found[name] = Candidate("peer", _bound_peer(peers.PEERS[name], built, V))
    if not only:
        return found
    unknown = set(only) - found.keys()
    if unknown:
        raise ValueError(f"way: expected some of {', '.join(found)}, got {min(unknown)!r}")
    return {name: c for name, c in found.items() if name == FLATCORE or name in only}


def _flatcore(built: Built, V: Tensor) -> Run:
    H = fc.Hessian(fc.Objective(*built))
    H.plan()  # captured, so that its memory is the product's
    return lambda: (H @ V.T).T


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


def flat(product: Tensor | Directions) -> Tensor:
    return product if isinstance(product, Tensor) else joined(product)
