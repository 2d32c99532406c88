"""The prelude: what no selected parameter reaches (masks, targets, frozen layers), run once per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

LOSS_PREFIX = (
    "loss:"  # no attribute path contains a colon, so the loss module's names cannot meet the model's
)


def named_tensors(model: nn.Module, loss: object) -> dict[str, Tensor]:
    """Parameters and buffers of the model by their names, and those of a loss module by "loss:" + their
    names.

    A tensor registered twice stands here once, under the name that `named_parameters()` or `named_buffers()`
    gives.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    if isinstance(loss, nn.Module):
        known = {id(t) for t in tensors.values()}
        for name, tensor in [*loss.named_parameters(), *loss.named_buffers()]:
            if id(tensor) not in known:
                tensors[LOSS_PREFIX + name] = tensor
    return tensors


@dataclass(frozen=True)
class Source:
    """An input of the prelude: a tensor leaf of the batch, a named tensor, or a tensor found in the code."""

    leaf: int | None = None
    name: str | None = None
    tensor: Tensor | None = None

    def __str__(self) -> str:
        if self.leaf is not None:
            return f"batch[{self.leaf}]"
        return self.name if self.name is not None else "tensor in the code"


@dataclass(frozen=True)
class Prelude:
    """A torch.fx graph from the batch and the frozen tensors to the constants `outputs` (value ids)."""

    module: fx.GraphModule
    sources: tuple[Source, ...]
    outputs: tuple[int, ...]

    def run(self, batch_leaves: Sequence[Tensor], frozen: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The constants of one batch, contiguous, by value id.

        batch_leaves: the tensors of the batch, as `capture.batch.batch_leaves` gives them.
        frozen:       as `named_tensors` gives them. What they hold is read and never written.
        """
        inputs = [self._fetch(source, batch_leaves, frozen) for source in self.sources]
        with torch.no_grad():
            results = self.module(*inputs)
        return {i: result.detach().contiguous() for i, result in zip(self.outputs, results, strict=True)}

    @staticmethod
    def _fetch(source: Source, batch_leaves: Sequence[Tensor], frozen: Mapping[str, Tensor]) -> Tensor:
        if source.leaf is not None:
            if source.leaf >= len(batch_leaves):
                raise ValueError(
                    f"batch: expected at least {source.leaf + 1} tensors like the captured batch, "
                    f"got {len(batch_leaves)}; capture a batch of another structure anew"
                )
            return batch_leaves[source.leaf]
        if source.name is not None:
            if source.name not in frozen:
                raise ValueError(f"frozen: expected a tensor named '{source.name}', got none of that name")
            return frozen[source.name]
        assert source.tensor is not None
        return source.tensor


class PreludeBuilder:
    """Grows a prelude: nodes copied from the exported graph, and calls that a lowering adds.

    A handle is a node of the prelude's own graph; its meta["val"] is a fake tensor with shape, dtype and
    device.
    """

    def __init__(
        self, sources: Mapping[fx.Node, Source], shape_only: Callable[[fx.Node], fx.node.Argument | None]
    ) -> None:
        self._graph = fx.Graph()
        self._sources = sources
        self._fill_value = shape_only
        self._handles: dict[fx.Node, fx.Node] = {}
        self._used: list[Source] = []
        fake = (node.meta.get("val") for node in sources)
        self._fake_mode = next((v.fake_mode for v in fake if isinstance(v, FakeTensor)), None)
        self._origin: dict[fx.Node, str] = {}
        self._values: dict[fx.Node, Tensor | None] = {}

    def take(self, node: fx.Node) -> fx.Node:
        """The handle of a node of the exported graph; copies it and what it needs."""
        pending = [node]
        while pending:  # a stack, not recursion: frozen networks can be deeper than Python's call stack
            current = pending[-1]
            missing = (
                []
                if self._is_leaf(current)
                else [n for n in current.all_input_nodes if n not in self._handles]
            )
            if current in self._handles or not missing:
                pending.pop()
            if current not in self._handles and not missing:
                self._handles[current] = self._copy(current)
            pending.extend(missing)
        return self._handles[node]

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A handle of function(*args); args are handles and plain data."""
        handle = self._graph.call_function(function, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake_mode or torch.no_grad():
            handle.meta["val"] = function(*values[0], **values[1])
        origins = dict.fromkeys(self._origin.get(n, "") for n in handle.all_input_nodes)
        self._origin[handle] = ", ".join(filter(None, origins))
        return handle

    def origin(self, handle: fx.Node) -> str:
        """What a constant is made of, for people."""
        return self._origin.get(handle, "")

    def value(self, handle: fx.Node) -> Tensor | None:
        """What a handle is for every batch; None where it reads the batch or what may change."""
        if handle not in self._values:
            values: dict[fx.Node, Any] = {}
            needed = self._needed(handle)
            for node in needed if all(node.op == "call_function" for node in needed) else ():
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            self._values[handle] = values.get(handle)
        return self._values[handle]

    def _needed(self, handle: fx.Node) -> list[fx.Node]:
        """The handle and all that it is computed from, in order."""
        needed = {handle}
        for node in reversed(self._graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        return [node for node in self._graph.nodes if node in needed]

    def finish(self, outputs: Mapping[int, fx.Node]) -> Prelude:
        """The prelude whose constants are `outputs`, value id -> handle."""
        self._graph.output(tuple(outputs.values()))
        self._graph.eliminate_dead_code()
        self._graph.lint()
        for node in self._graph.nodes:
            node.meta.clear()  # fake tensors, of no use once the shapes are known
        return Prelude(fx.GraphModule(nn.Module(), self._graph), tuple(self._used), tuple(outputs))

    def _is_leaf(self, node: fx.Node) -> bool:
        return node in self._sources or self._fill_value(node) is not None

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._sources:
            return self._placeholder(node)
        fill_value = self._fill_value(node)
        if fill_value is not None:
            value = node.meta["val"]
            handle = self._graph.call_function(
                torch.full, (tuple(value.shape), fill_value), {"dtype": value.dtype, "device": value.device}
            )
            self._origin[handle] = str(node.target)
        else:
            handle = self._graph.node_copy(node, lambda n: self._handles[n])
            self._origin[handle] = node.name
        handle.meta["val"] = node.meta["val"]
        return handle

    def _placeholder(self, node: fx.Node) -> fx.Node:
        # All placeholders must stand in front of all calls; the root stands behind the last node.
        first_call = next((n for n in self._graph.nodes if n.op != "placeholder"), self._graph._root)
        with self._graph.inserting_before(first_call):
            handle = self._graph.placeholder(f"source_{len(self._used)}")
        handle.meta["val"] = node.meta["val"]
        self._origin[handle] = str(self._sources[node])
        self._used.append(self._sources[node])
        return handle
