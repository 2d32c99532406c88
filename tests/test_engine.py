"""The engine's products over the table of cases, against torch.func.

float64: relative error at most 1e-10. float32: at most twice that of the same product by autograd in float32, both
against float64, with a floor of 2e-6.
"""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import flatcore as fc
from flatcore._C import engine
from tests.cases import CASES, Case
from tests.reference import Reference

VECTORS = (1, 3, 8, 33)
EXACT = 1e-10
FLOOR32 = 2e-6
# Losses whose examples have weights of their own: a mean of per-example terms they are not.
NOT_A_PLAIN_MEAN = {
    "ce-weighted",
    "ce-ignore",
    "ce-smoothing",
    "ce-soft",
    "ce-none",
    "ce-sum",
    "mse-sum",
    "nll",
}
NOT_A_PLAIN_MEAN |= {
    "ce-positions",
    "ce-one-example",
    "penalised",
    "logistic-scalar",
    "language-model-by-model",
}


def objective_of(case: Case, dtype=torch.float64):
    model, loss, batch = case.build(0, dtype)
    wrapped = fc.ModelLoss(loss) if case.loss_kind == "model_batch" else loss
    return fc.Objective(model, wrapped, batch), Reference(model, loss, batch, case.loss_kind)


def directions(P: int, K: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(P, K, generator=torch.Generator().manual_seed(K), dtype=torch.float64).to(dtype)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.norm().item()
    return (got.double() - expected).norm().item() / (scale if scale > 0 else 1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian(case):
    obj, reference = objective_of(case)
    H = fc.Hessian(obj)
    assert H.plan().native_fraction == 1.0
    dense = reference.hessian()
    for K in VECTORS:
        V = directions(H.shape[0], K)
        assert relative(H @ V, dense @ V) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian_float32(case):
    obj, _ = objective_of(case, torch.float32)
    H = fc.Hessian(obj)
    _, exact = objective_of(case)
    _, single = objective_of(case, torch.float32)
    # The float32 model's parameters are the float64 ones rounded; compare at the rounded ones.
    exact.flat.copy_(single.flat)
    dense, dense32 = exact.hessian(), single.hessian()
    for K in VECTORS:
        V = directions(H.shape[0], K, torch.float32)
        truth = dense @ V.double()
        allowed = max(2 * relative(dense32 @ V, truth), FLOOR32)
        assert relative(H @ V, truth) <= allowed


@pytest.mark.parametrize("case", [c for c in CASES if c.loss_kind == "output_target"], ids=str)
def test_ggn(case):
    obj, reference = objective_of(case)
    if case.name == "nll":
        # Log-softmax and nll_loss are one cross-entropy, cut in front of the log-softmax: behind it the loss is linear.
        model, _, batch = case.build(0, torch.float64)
        reference = Reference(
            model[0], torch.nn.CrossEntropyLoss(obj.loss_function.weight), batch, case.loss_kind
        )
    G = fc.GGN(obj)
    dense = reference.ggn()
    for K in VECTORS:
        V = directions(G.shape[0], K)
        assert relative(G @ V, dense @ V) <= EXACT


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NOT_A_PLAIN_MEAN], ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_gradient_covariance(case, centered):
    obj, reference = objective_of(case)
    C = fc.GradientCovariance(obj, centered=centered)
    dense = reference.covariance(obj.examples)
    if centered:
        g = reference.gradient()
        dense = dense - g[:, None] * g
    for K in VECTORS:
        V = directions(C.shape[0], K)
        # Centring subtracts; the error is relative to what was there before.
        scale = reference.covariance(obj.examples).norm() * V.norm()
        assert (C @ V - dense @ V).norm() <= EXACT * scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_symmetric_linear_reproducible(case):
    obj, _ = objective_of(case)
    H = fc.Hessian(obj)
    V = directions(H.shape[0], 5)
    Y = H @ V
    assert torch.equal(Y, H @ V)
    eps = torch.finfo(torch.float64).eps
    scale = H.shape[0] ** 0.5 * eps * Y.norm() * V.norm() * 16
    assert (V.T @ Y - Y.T @ V).abs().max() <= scale
    # A column does not depend on its neighbours; GEMMs of other shapes round differently.
    for k in range(5):
        assert (H @ V[:, k] - Y[:, k]).norm() <= 64 * eps * H.shape[0] ** 0.5 * Y[:, k].norm().clamp_min(
            1e-300
        )
    assert (H @ torch.zeros_like(V)).count_nonzero() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_some_parameters_only(case):
    """Half of the parameters at random: the block of the whole Hessian, whatever inputs of an op are constant then."""
    model, loss, batch = case.build(0, torch.float64)
    wrapped = fc.ModelLoss(loss) if case.loss_kind == "model_batch" else loss
    whole = fc.Hessian(fc.Objective(model, wrapped, batch))
    slices = whole.objective.parameter_slices
    for seed in range(2):
        order = torch.randperm(len(slices), generator=torch.Generator().manual_seed(seed)).tolist()
        names = {list(slices)[i] for i in order[: (len(slices) + 1) // 2]} - {"spare.weight", "spare.bias"}
        part = fc.Hessian(fc.Objective(model, wrapped, batch, params=lambda n, p, names=names: n in names))
        places = torch.cat([torch.arange(s.start, s.stop) for n, s in slices.items() if n in names])
        V = torch.zeros(whole.shape[0], 3, dtype=torch.float64)
        V[places] = directions(part.shape[0], 3)
        expected = (whole @ V)[places]
        assert (part @ V[places] - expected).norm() <= EXACT * max(expected.norm().item(), 1e-3)


def test_memory_layout_of_a_batch_does_not_matter():
    case = next(c for c in CASES if c.name == "resnet")
    model, loss, (x, y) = case.build(0, torch.float64)
    V = None
    products = []
    for layout in (torch.contiguous_format, torch.channels_last):
        H = fc.Hessian(fc.Objective(model, loss, (x.contiguous(memory_format=layout), y)))
        V = directions(H.shape[0], 3)
        products.append(H @ V)
    assert torch.equal(*products)


def test_layouts_of_directions():
    """(P, K) of any strides gives the same product; strides (1, P) are used in place and handed back."""
    obj, _ = objective_of(CASES[0])
    H = fc.Hessian(obj)
    V = directions(H.shape[0], 6)
    expected = H @ V
    assert expected.stride() == (1, H.shape[0])
    for other in (V.T.contiguous().T, V.repeat_interleave(2, 0)[::2], torch.cat([V, V], 1)[:, :6]):
        before = other.clone()
        assert torch.equal(H @ other, expected)
        assert torch.equal(other, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_asked_for_are_used(threads):
    """In a process of its own: the number of threads is a setting of the process."""
    code = f"""import torch
torch.set_num_threads({threads})
from flatcore._C import engine
print(engine.threads_used())"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.strip() == str(threads), done.stderr


def test_results_do_not_depend_on_threads():
    """Kernels and sums are cut the same way for any number of threads; GEMMs may round differently."""
    obj, _ = objective_of(next(c for c in CASES if c.name == "resnet"))
    H = fc.Hessian(obj)
    V = directions(H.shape[0], 4)
    before = torch.get_num_threads()
    try:
        products = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products.append(H @ V)
    finally:
        torch.set_num_threads(before)
    assert relative(products[0], products[1]) <= 1e-13


def leaf_program(ops, values, cut=(1,)):
    return engine.Program(values, ops, {0: 0}, 4, len(values) - 1, list(cut))


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([("nonsense", [0], 1, {}, "net.layer")], r"op 0 \(nonsense, net.layer\): unknown op kind"),
        ([("unary", [0], 1, {}, "net")], "attribute 'function' is missing"),
        ([("unary", [0], 1, {"function": 3}, "net")], "attribute 'function' has the wrong type"),
        ([("unary", [0, 0], 1, {"function": "relu"}, "net")], "takes 1 to 1 inputs, got 2"),
        ([("unary", [2], 1, {"function": "relu"}, "net")], "value 2 is read before it is computed"),
        ([("unary", [0], 0, {"function": "relu"}, "net")], "value 0 is computed twice"),
        ([("unary", [7], 1, {"function": "relu"}, "net")], "value 7 does not exist"),
        ([("permute", [0], 1, {"dims": [1]}, "net")], "dims must be a permutation"),
        ([("sum", [0], 1, {"dims": [3], "keepdim": False, "scale": 1.0}, "net")], "axis 3 does not exist"),
    ],
)
def test_wrong_programs_are_refused(ops, message):
    values = [("parameter", [4]), ("activation", [4]), ("activation", [])]
    end = ("sum", [1], 2, {"dims": [0], "keepdim": False, "scale": 1.0}, "")
    with pytest.raises(ValueError, match=message):
        leaf_program([*ops, end], values)


def test_wrong_directions_are_refused():
    values = [("parameter", [4]), ("activation", [4]), ("activation", [])]
    ops = [
        ("unary", [0], 1, {"function": "tanh"}, ""),
        ("sum", [1], 2, {"dims": [0], "keepdim": False, "scale": 1.0}, ""),
    ]
    program = leaf_program(ops, values)
    state = engine.Linearization(program, {0: torch.zeros(4)}, 1.0)
    good = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"V: expected \(K, 4\)"):
        state.product(torch.zeros(2, 5), good, "hessian", False, 1, 1.0)
    with pytest.raises(TypeError, match="V: expected float"):
        state.product(good.double(), good, "hessian", False, 1, 1.0)
    with pytest.raises(ValueError, match="Y: expected 2 directions"):
        state.product(good, torch.zeros(3, 4), "hessian", False, 1, 1.0)
    with pytest.raises(ValueError, match="mode: expected hessian"):
        state.product(good, good.clone(), "fisher", False, 1, 1.0)
    with pytest.raises(ValueError, match="value 0 of the program has no tensor"):
        engine.Linearization(program, {}, 1.0)
    with pytest.raises(ValueError, match="expected shape"):
        engine.Linearization(program, {0: torch.zeros(5)}, 1.0)


def test_other_threads_run_during_a_product():
    """The GIL is released: a clock in another Python thread ticks in the middle of a product."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    batch = (torch.randn(2048, 256), torch.randint(10, (2048,)))
    H = fc.Hessian(fc.Objective(model, torch.nn.CrossEntropyLoss(), batch))
    V = torch.randn(64, H.shape[0]).T
    H @ V[:, :1]
    ticks, done = [], threading.Event()

    def clock():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=clock)
    thread.start()
    begin = time.perf_counter()
    H @ V
    end = time.perf_counter()
    done.set()
    thread.join()
    margin = (end - begin) / 4
    assert any(begin + margin < tick < end - margin for tick in ticks)
