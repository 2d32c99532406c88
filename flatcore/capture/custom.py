"""Calls of torch.autograd.Function: recorded while a model is traced, where export would keep the forward alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError

Call = Callable[[Sequence[Tensor]], list[Tensor]]

# In the traced graph a call is this operation, and `key` says which call it is.
_LIBRARY = torch.library.Library("flatcore", "FRAGMENT")
_LIBRARY.define("external(Tensor[] inputs, int key) -> Tensor[]")
_KEYS = itertools.count()
_CALLS: dict[int, Call] = {}


@torch.library.register_fake("flatcore::external", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shapes(inputs: Sequence[Tensor], key: int) -> list[Tensor]:
    return [torch.empty_like(output) for output in _CALLS[key]([x.detach() for x in inputs])]


@contextlib.contextmanager
def recorded_functions() -> Iterator[None]:
    """While it lasts, each call by this thread that has a gradient becomes one node of the traced graph."""
    tracing = threading.get_ident()
    keys = []
    apply: Any = torch.autograd.Function.__dict__["apply"].__func__

    def recording(cls: type, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if threading.get_ident() != tracing or not any(t.requires_grad for t in tensors):
            return apply(cls, *args, **kwargs)
        name = f"{cls.__name__}.apply"
        if issubclass(cls, BackwardHookFunction):
            raise CaptureError(
                "is a hook that may alter the gradient, of which the graph shows nothing", op=name
            )
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def run(inputs: Sequence[Tensor]) -> Any:
            given = list(others)
            for place, x in zip(places, inputs, strict=True):
                given[place] = x
            its_args, its_kwargs = pytree.tree_unflatten(given, spec)
            return apply(cls, *its_args, **its_kwargs)

        def call(inputs: Sequence[Tensor]) -> list[Tensor]:
            return [output for output in pytree.tree_leaves(run(inputs)) if isinstance(output, Tensor)]

        call.__qualname__ = name
        detached = [t.detach() for t in tensors]
        with _Arguments(name):
            outputs, form = pytree.tree_flatten(run(detached))
        key = next(_KEYS)
        _CALLS[key] = call
        keys.append(key)
        results = iter(torch.ops.flatcore.external(tensors, key))
        return pytree.tree_unflatten([next(results) if isinstance(o, Tensor) else o for o in outputs], form)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(recording)):
        try:
            yield
        finally:
            for key in keys:
                del _CALLS[key]


def restore_functions(graph: fx.Graph) -> None:
    """Puts the recorded functions themselves in the place of their nodes."""
    for node in graph.nodes:
        if node.target is torch.ops.flatcore.external.default:
            inputs, key = node.args
            node.target, node.args = _CALLS[key], (inputs,)


class _Arguments(TorchFunctionMode):
    """Refuses a function that reads a tensor with a gradient besides its arguments, given to it detached."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise CaptureError(
                    "reads a parameter that is not among its arguments; pass it as one", op=self._name
                )
        return func(*args, **(kwargs or {}))
