"""Random graphs of every op that has a lowering, and of ops that have none, against torch's double backward.

FLATCORE_GRAPHS=5000 checks as many instead of two hundred.
"""

from __future__ import annotations

import os

import pytest
from random_graphs.builder import OPS, Skip
from random_graphs.check import IllConditioned, Outcome, Wrong, check
from random_graphs.graph import Graph, Recipe, build, recipe
from random_graphs.losses import LOSSES
from random_graphs.reduce import reduced

from flatcore.capture.lower import LOWERINGS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

GRAPHS = int(os.environ.get("FLATCORE_GRAPHS", "200"))
PIECE = 10
STEPS = 6
# Seeds of other draws for a graph that its first seed leads nowhere with.
ATTEMPTS, APART = 16, 10_000_000

# What reaches a lowering only where torch.export rewrites the graph, or only where it does not, in the torch that this
# was written with.
REWRITTEN = """
_adaptive_avg_pool2d.default _fused_rms_norm.default _log_softmax.default _native_batch_norm_legit.no_stats
_native_batch_norm_legit_functional.default
_prelu_kernel.default _safe_softmax.default _softmax.default
_upsample_nearest_exact1d.default _upsample_nearest_exact2d.default _weight_norm_interface.default add.Scalar
alpha_dropout.default broadcast_tensors.default broadcast_to.default concat.default concatenate.default
constant_pad_nd.default contiguous.default div.Scalar dropout.default expand_as.default
feature_dropout.default lift_fresh_copy.default mT.default matrix_H.default
max_pool2d_with_indices.default mul.Scalar narrow.default native_dropout.default native_group_norm.default
native_layer_norm.default nll_loss.default nll_loss2d.default norm.Scalar norm.ScalarOpt_dim numpy_T.default
reflection_pad1d.default reflection_pad2d.default replication_pad1d.default replication_pad2d.default
reshape_as.default sub.Scalar
tensor_split.indices tensor_split.sections to.device to.dtype to.dtype_layout to.other true_divide.Scalar
type_as.default
unsafe_chunk.default upsample_bicubic2d.default upsample_bilinear2d.default
upsample_linear1d.default upsample_nearest1d.default upsample_nearest2d.default view_as.default
"""


def fails(graph: Graph) -> bool:
    try:
        check(graph)
    except Wrong:
        return True
    except IllConditioned:
        return False
    return False


def checked(drawn: Recipe, **how: bool) -> tuple[Graph, Outcome]:
    """Raises Wrong with a program that was made as short as it can be."""
    graph = build(drawn)
    try:
        return graph, check(graph, **how)
    except Wrong as error:
        short = build(reduced(drawn, fails))
        raise Wrong(f"{drawn}\n{error}\n\nshortened:\n{short}") from None


def supported(number: int) -> None:
    """Graph `number`, which has two ops of the table in turn, reached as they should be."""
    names, losses = list(OPS), list(LOSSES)
    focus = [names[(2 * number + i) % len(names)] for i in range(2)]
    loss = losses[number % len(losses)]
    for attempt in range(ATTEMPTS):
        drawn = recipe(number + APART * attempt, focus, loss, STEPS)
        try:
            graph, outcome = checked(drawn, single=number % 8 == 0, by_model=number % 9 == 8)
        except (IllConditioned, Skip):
            continue
        wanted = [OPS[name].reaches for name in focus] + [LOSSES[loss][1]]
        if graph.written.issuperset(focus) and all(set(w) & outcome.reached for w in wanted if w):
            return
    pytest.fail(f"graph {number}: no draw of {focus} and {loss} reaches {wanted} in {ATTEMPTS}")


@pytest.mark.parametrize("first", range(0, GRAPHS, PIECE))
def test_supported_ops(first: int) -> None:
    for number in range(first, min(first + PIECE, GRAPHS)):
        supported(number)


@pytest.mark.parametrize("first", range(0, GRAPHS // 10, PIECE))
def test_unsupported_ops_among_them(first: int) -> None:
    """The results are right, and where torch autograd had to be used that is said."""
    losses = list(LOSSES)
    for number in range(first, min(first + PIECE, GRAPHS // 10)):
        for attempt in range(ATTEMPTS):
            seed = number + APART * (ATTEMPTS + attempt)
            drawn = recipe(seed, [], losses[number % len(losses)], STEPS - 2, foreign=2)
            try:
                graph = build(drawn)
                if graph.torch_is_wrong:
                    continue
                checked(drawn, whole=False)
            except (IllConditioned, Skip):
                continue
            break
        else:
            pytest.fail(f"graph {number}: no draw in {ATTEMPTS} is well conditioned")


def test_every_lowering_is_drawn() -> None:
    """A new lowering needs an op in tests/random_graphs, or an entry in REWRITTEN."""
    drawn = {name for op in OPS.values() for name in op.reaches}
    drawn |= {name for _, reaches in LOSSES.values() for name in reaches}
    rewritten = set(REWRITTEN.split())
    assert set(LOWERINGS) - drawn == rewritten
    assert drawn - set(LOWERINGS) == set()
