"""The numbers of a simulated GPU: what torch does on a device is done again by the CPU's kernel on the same memory.

torch's CUDA operation runs first, with all that it asks of CUDA; its kernels do nothing. Device memory is the host's:
the same operation is then given tensors on the CPU over the same bytes, and what it finds is written into the device's
result. A replay of a graph is followed by the work it recorded.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# They compute nothing, or wait for the copy they make.
NOTHING_TO_COMPUTE = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.resize_.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.record_stream.default,
    aten.is_pinned.default,
    aten._pin_memory.default,
    aten._local_scalar_dense.default,
}
# The size of the result depends on values: there is none on a device whose kernels do nothing.
SIZE_BY_VALUE = {
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
}
# Of torch.linalg those that leave no report of errors to look at, or (Cholesky) one that may be written later.
ON_DEVICE = re.compile("norm|cholesky_ex|diagonal|cross|vecdot")
MIXED_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def over_same_memory(t: Tensor) -> Tensor:
    if not t.is_cuda:
        return t
    if t._is_zerotensor():  # has no memory
        return torch.zeros(t.shape, dtype=t.dtype)
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(t.shape, dtype=t.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    out = torch.empty(0, dtype=t.dtype, device="cpu").set_(raw, t.storage_offset(), t.shape, t.stride())
    return out.conj() if t.is_conj() else out


def on_host(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return over_same_memory(leaf)
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    if isinstance(leaf, torch.Generator) and leaf.device.type == "cuda":
        return None
    return leaf


def mixed_product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product with a float32 result of 16-bit operands, which torch has on CUDA alone."""
    if name in ("aten::mm", "aten::bmm"):
        product = torch.matmul(args[0].float(), args[1].float())
    else:
        added = kwargs.get("beta", 1) * args[0].float()
        product = added + kwargs.get("alpha", 1) * torch.matmul(args[1].float(), args[2].float())
    return kwargs["out"].copy_(product) if kwargs.get("out") is not None else product


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(on_host, (args, kwargs))
    for option in ("pin_memory", "non_blocking"):
        if option in kwargs:
            kwargs[option] = False
    name, _, overload = func.name().partition(".")
    if name in MIXED_PRODUCTS and "dtype" in overload:
        return mixed_product(name, args, kwargs)
    if name == "aten::log_sigmoid_backward":  # the device's has no use for the buffer that the CPU's keeps
        args = (*args[:2], aten.log_sigmoid_forward(args[1])[1])
    return func(*args, **kwargs)


def on_host_alone(func: Any, args: tuple[Any, ...]) -> bool:
    if func.name() == "aten::index.Tensor":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    name: str = func.name()
    solver = name.startswith(("aten::linalg_", "aten::_linalg_")) and not ON_DEVICE.search(name)
    return solver or name in SIZE_BY_VALUE


def is_view(func: Any, result: Any, sources: list[Tensor]) -> bool:
    """Its memory is an argument's: nothing was computed. An operation that may view, such as reshape, may also copy."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    memories = {t.untyped_storage()._cdata for t in sources}
    return all(t.untyped_storage()._cdata in memories for t in tensors(result))


class Numerics(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = tensors((args, kwargs))
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if (
            func.namespace != "aten"
            or fake
            or any(type(t) not in (Tensor, torch.nn.Parameter) for t in sources)
        ):
            return func(*args, **kwargs)
        device = next((t.device for t in sources if t.is_cuda), None)
        if device is not None and on_host_alone(func, args):
            return tree_map(
                lambda t: self._put(t, device) if isinstance(t, Tensor) else t, computed(func, args, kwargs)
            )
        result = func(*args, **kwargs)
        on_device = device is not None or any(t.is_cuda for t in tensors(result))
        if not on_device or func in NOTHING_TO_COMPUTE or is_view(func, result, sources):
            return result
        found = computed(func, args, kwargs)
        if not tensors(result):
            return found  # a number, which was read from memory
        self._write(func, result, found)
        return result

    @staticmethod
    def _put(t: Tensor, device: torch.device) -> Tensor:
        out = torch.empty(t.shape, dtype=t.dtype, device=device)
        over_same_memory(out).copy_(t)
        return out

    @staticmethod
    def _write(func: Any, result: Any, found: Any) -> None:
        results, all_found = tree_flatten(result)[0], tree_flatten(found)[0]
        returns = func._schema.returns
        for i, (into, value) in enumerate(zip(results, all_found, strict=True)):
            alias = returns[i].alias_info if len(returns) == len(results) else None
            if not isinstance(into, Tensor) or (alias is not None and alias.is_write):
                continue  # the CPU's kernel has written it
            if into.numel() == 0 or value.numel() == 0:
                continue  # such as a workspace, which one kernel has and the other has not
            if into._is_zerotensor():
                continue
            if into.shape != value.shape or into.dtype != value.dtype:
                raise RuntimeError(
                    f"{func}: {into.shape} {into.dtype} on the device, {value.shape} {value.dtype} on the CPU"
                )
            over_same_memory(into).copy_(value)


def start() -> None:
    """From now on, in this thread; and in what replays of flatcore's graphs leave behind."""
    Numerics().__enter__()
    from flatcore import graphs

    def capture(work: Any, device: torch.device) -> Any:
        replay = graphs.cuda_graph(work, device)

        def replay_and_compute() -> None:
            replay()
            work()

        return replay_and_compute

    graphs.Graphs.__init__.__defaults__ = (capture,)
