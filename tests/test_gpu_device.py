"""What a product on a GPU may not do to the program around it: streams, devices, waiting, memory."""

import pytest
import torch

import flatcore as fc
from flatcore.backend import backend_for
from tests.cases import CASES
from tests.gpu import DEVICE, net, objective_there, on_cuda, on_gpu
from tests.test_engine import EXACT, directions, relative

pytestmark = [on_gpu, pytest.mark.filterwarnings("default")]
NAMED = {case.name: case for case in CASES}
SOME = ("bench-mlp", "resnet", "bench-decoder")


@pytest.mark.parametrize("name", SOME)
def test_graphs_change_nothing(name, monkeypatch):
    H = fc.Hessian(objective_there(NAMED[name]))
    V = directions(H.shape[0], 3).to(DEVICE)
    recorded = [H @ V for _ in range(3)]
    monkeypatch.setattr("flatcore.native.pays", lambda V: False)
    launched = H @ V
    assert all(torch.equal(product, launched) for product in recorded)


@pytest.mark.parametrize("name", SOME)
def test_new_directions_and_new_parameters(name):
    """A graph holds addresses: neither the vectors nor the parameters of its recording."""
    objective = objective_there(NAMED[name])
    H = fc.Hessian(objective)
    V, W = (directions(H.shape[0], 6)[:, part].to(DEVICE) for part in (slice(0, 3), slice(3, 6)))
    for _ in range(3):
        H @ V
    other = H @ W
    with torch.no_grad():
        for p in objective.model.parameters():
            p.mul_(1.1)
    moved = [H @ W for _ in range(3)]
    again = fc.Hessian(objective_there(NAMED[name]))
    assert relative(other, again @ W) <= EXACT
    with torch.no_grad():
        for p in again.objective.model.parameters():
            p.mul_(1.1)
    expected = again @ W
    assert all(relative(product, expected) <= EXACT for product in moved)
    assert relative(other, expected) > 1e-3


@on_cuda
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("graphs", [True, False])
def test_the_current_stream_is_obeyed(name, graphs, monkeypatch):
    """The directions are written on another stream, late: work on any other would read NaN."""
    if not graphs:
        monkeypatch.setattr("flatcore.native.pays", lambda V: False)
    H = fc.Hessian(objective_there(NAMED[name]))
    V = directions(H.shape[0], 3).to(DEVICE)
    expected = H @ V
    stream = torch.cuda.Stream()
    for _ in range(3):
        late = torch.full_like(V, float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(V)
            product = H @ late
        torch.cuda.current_stream().wait_stream(stream)
        assert relative(product, expected) <= EXACT


@on_cuda
@pytest.mark.parametrize("graphs", [True, False])
def test_a_write_that_leaves_no_trace(graphs, monkeypatch):
    """Through `.data`, and still to come when the product is asked for: only the values tell."""
    if not graphs:
        monkeypatch.setattr("flatcore.native.pays", lambda V: False)
    objective = objective_there(NAMED["bench-mlp"])
    H = fc.Hessian(objective)
    V = directions(H.shape[0], 3).to(DEVICE)
    before = [H @ V for _ in range(3)][-1]
    parameters = list(objective.model.parameters())
    torch.cuda._sleep(20_000_000)
    parameters[-1].data[-1] += 0.5
    now = H @ V
    assert relative(now, before) > 1e-3
    with torch.no_grad():
        parameters[-1].add_(0)  # counted: taken again
    assert torch.equal(H @ V, now)


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no second CUDA device")
@pytest.mark.parametrize("name", SOME)
def test_another_device_is_current(name):
    H = fc.Hessian(objective_there(NAMED[name]))
    V = directions(H.shape[0], 3).to(DEVICE)
    expected = H @ V
    with torch.cuda.device(1):
        for _ in range(3):
            assert relative(H @ V, expected) <= EXACT
        assert torch.cuda.current_device() == 1


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no second CUDA device")
def test_several_devices_in_one_process():
    found = []
    for index in (0, 1, 0):
        H = fc.Hessian(net(20, 30, 5, examples=40, dtype=torch.float64, device=torch.device("cuda", index)))
        V = directions(H.shape[0], 3).to(f"cuda:{index}")
        found += [(H @ V).cpu() for _ in range(3)]
        assert (H @ V).device.index == index
    assert all(relative(product, found[0]) <= EXACT for product in found)


@on_cuda
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("mode", ["hessian", "ggn"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_product_waits_for_nothing(name, mode, graphs, monkeypatch):
    """Between the comparison of the parameters and the result nothing is read back."""
    if not graphs:
        monkeypatch.setattr("flatcore.native.pays", lambda V: False)
    objective = objective_there(NAMED[name])
    backend, at = backend_for(objective, mode), objective.snapshot()
    V = directions(objective.layout.size, 3).T.contiguous().to(DEVICE)
    Y = torch.empty_like(V)
    for _ in range(2):  # states, and the graph
        backend.product(mode, V, Y, at)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.product(mode, V, Y, at)
    finally:
        torch.cuda.set_sync_debug_mode("default")


MIB = 1 << 20


class Crowded:
    """Leaves `spare` bytes on the device beyond what is held now."""

    def __init__(self, spare: int) -> None:
        self.spare = spare

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + self.spare) / total)

    def __exit__(self, *failure: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@on_cuda
def test_fewer_directions_where_memory_runs_out():
    """Of 64 directions one layer's tangents take 1 GiB, and 768 MiB are left, for the result too."""
    H = fc.Hessian(net(64, 512, 512, 10, examples=8192, memory=1 << 45))
    V = torch.randn(64, H.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    expected = torch.cat([H @ V[:, :4], H @ V[:, 4:8]], 1)
    assert H.plan().directions >= 64
    with Crowded(768 * MIB):
        product = H @ V
    assert H.plan().directions < 64
    assert relative(product[:, :8], expected.double()) <= 1e-5
    assert torch.isfinite(product).all()


@on_cuda
def test_fewer_directions_of_a_small_net():
    """Of 64 directions one layer's tangents take 2 MiB, and 5 MiB are left for all."""
    H = fc.Hessian(net(16, 32, 32, 4, examples=256, memory=1 << 45))
    V = torch.randn(64, H.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    expected = H @ V
    assert H.plan().directions >= 64
    H = fc.Hessian(net(16, 32, 32, 4, examples=256, memory=1 << 45))
    H @ V[:, :1]
    with Crowded(5 * MIB):
        product = H @ V
    assert 1 <= H.plan().directions < 64
    assert relative(product, expected.double()) <= 1e-5


@on_cuda
def test_not_even_one_direction():
    """The tangents of one layer take 256 MiB."""
    H = fc.Hessian(net(64, 512, 512, 10, examples=1 << 17, memory=1 << 45))
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = H @ v
    with (
        Crowded(8 * MIB),
        pytest.raises(torch.OutOfMemoryError, match="out of memory for a product with one direction"),
    ):
        H @ v
    assert relative(H @ v, expected.double()) <= 1e-5


@pytest.mark.parametrize("loaded", [True, False])
def test_data_on_the_cpu(loaded):
    """A loader's batches, and a list's, which may change in place."""
    there = net(6, 5, 3, examples=8, dtype=torch.float64)
    ((x, y),) = there.data
    host = [(x[:5].cpu(), y[:5].cpu()), (x[5:].cpu(), y[5:].cpu())]
    source = (
        torch.utils.data.DataLoader([*zip(x.cpu(), y.cpu(), strict=True)], batch_size=5) if loaded else host
    )
    H = fc.Hessian(fc.Objective(there.model, there.loss_function, source))
    V = directions(H.shape[0], 2).to(DEVICE)
    assert relative(H @ V, fc.Hessian(there) @ V) <= EXACT
    if not loaded:
        host[0][0].mul_(2)
        x[:5].mul_(2)
        assert relative(H @ V, fc.Hessian(there) @ V) <= EXACT
