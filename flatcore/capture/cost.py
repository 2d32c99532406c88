"""What a computation by torch costs: floating-point operations and bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, strided
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Cost(TorchDispatchMode):
    """Counts while it is entered. FlopCounterMode also hooks into modules, which fails with shared parameters.

    flops: by torch's own formulas, and one operation per element of any other result.
    made:  bytes of all results, no less than what is held of them.
    saved: bytes kept for a backward pass, where `note` is the pack hook of saved tensors.
    older: where those of them lie in memory that were there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self.made = 0
        self._storages: dict[int, int] = {}
        self._fresh: set[int] = set()

    @property
    def older(self) -> set[int]:
        return self._storages.keys() - self._fresh

    @property
    def saved(self) -> int:
        return sum(self._storages.values())

    def note(self, tensor: Tensor) -> Tensor:
        """Gives back what holds no graph: a saved result that held its own would never be freed."""
        if tensor.layout == strided:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = isinstance(result, Tensor) and result.layout == strided and not func.is_view
        if fresh:
            self.made += result.nbytes
        if not func.is_view and not func._schema.is_mutable:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.layout == strided:
                    self._fresh.add(leaf.untyped_storage().data_ptr())
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif fresh:
            self.flops += result.numel()
        return result
