"""The simulated runtime itself: what it must complain of, and the numbers."""

import ctypes

import pytest
import torch

CUDA = ctypes.CDLL(None)
pytestmark = [
    pytest.mark.skipif(not hasattr(CUDA, "simulated_complaints"), reason="only under tools/gpu_simulated"),
    pytest.mark.filterwarnings("default"),
]
ADDRESS = ctypes.c_void_p


@pytest.fixture
def complaints():
    from tests.simulated import plugin

    return plugin.complaints


def sizes(*xyz):
    return (ctypes.c_uint * 3)(*xyz)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "refused"),
    [
        ((1, 65535, 1), (1024, 1, 1), 227 << 10, False),
        ((1, 65536, 1), (32, 1, 1), 0, True),
        ((1, 1, 1), (1025, 1, 1), 0, True),
        ((0, 1, 1), (32, 1, 1), 0, True),
        ((1, 1, 1), (32, 1, 1), (227 << 10) + 1, True),
    ],
)
def test_launch_limits(grid, block, shared, refused, complaints):
    status = CUDA.simulated_launch(b"some_kernel", sizes(*grid), sizes(*block), ctypes.c_size_t(shared), None)
    assert (status != 0) == refused
    assert ["some_kernel" in complaint for complaint in complaints()] == [True] * refused
    CUDA.cudaGetLastError()


def test_a_stream_of_another_device(complaints):
    stream = torch.cuda.Stream(0)
    memory = torch.zeros(4, device="cuda:0")
    with torch.cuda.device(1):
        CUDA.cudaMemsetAsync(ADDRESS(memory.data_ptr()), 0, ctypes.c_size_t(16), ADDRESS(stream.cuda_stream))
        CUDA.cudaGetLastError()
        CUDA.simulated_launch(
            b"some_kernel", sizes(1, 1, 1), sizes(32, 1, 1), ctypes.c_size_t(0), ADDRESS(stream.cuda_stream)
        )
        CUDA.cudaGetLastError()
    assert complaints() == [f"stream of device 0 on device 1: {what}" for what in ("a memset", "some_kernel")]


@pytest.mark.parametrize("excess", [0, 1])
def test_an_operand_that_leaves_its_memory(excess, complaints):
    """B is the last 4 x 4 of 64 floats, or a column more."""
    memory, one = ADDRESS(), ctypes.c_float(1)
    CUDA.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(64 * 4))
    operand = ADDRESS(memory.value + 48 * 4)
    handle, alpha = ADDRESS(torch.cuda.current_blas_handle()), ctypes.byref(one)
    columns = 4 + excess  # of B
    CUDA.cublasSgemm_v2(handle, 0, 0, 4, columns, 4, alpha, memory, 4, operand, 4, alpha, memory, 4)
    found = complaints()
    assert len(found) == excess
    assert all("operand B" in complaint and "by 16 bytes" in complaint for complaint in found)
    assert CUDA.cudaFree(memory) == 0


def read(a, stream):
    a.sum().item()


def copy_pageable(a, stream):
    host, on = torch.ones(8), ADDRESS(stream.cuda_stream)
    CUDA.cudaMemcpyAsync(ADDRESS(a.data_ptr()), ADDRESS(host.data_ptr()), ctypes.c_size_t(32), 4, on)


def leave_the_stream(a, stream):
    with torch.cuda.stream(torch.cuda.default_stream()):
        a.add(1)


def free(a, stream):
    CUDA.cudaFree(ADDRESS(a.data_ptr()))


def wait(a, stream):
    torch.cuda.synchronize()


def record(work, a, stream):
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        a.add(1)
        work(a, stream)


@pytest.mark.parametrize("mistake", [read, copy_pageable, leave_the_stream, free, wait])
def test_what_a_recording_may_not_do(mistake, complaints):
    a, stream = torch.ones(8, device="cuda"), torch.cuda.Stream()
    with pytest.raises(RuntimeError):
        record(mistake, a, stream)
    CUDA.cudaGetLastError()
    assert complaints()
    record(lambda a, stream: a.mul(2), a, stream)
    assert not complaints()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_the_cpus(dtype):
    a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    A, B = a.cuda(), b.cuda()
    for there, here in [
        (A @ B, a @ b),
        (A.t() @ A, a.t() @ a),
        (A[:, 1:3], a[:, 1:3]),
        (A.t().contiguous(), a.t()),
        (A.sum(0), a.sum(0)),
        (A[A > 0], a[a > 0]),
        (torch.zeros(5, 3, dtype=dtype, device="cuda").addmm_(A, B, alpha=2), 2 * (a @ b)),
    ]:
        assert torch.equal(there.cpu(), here)
