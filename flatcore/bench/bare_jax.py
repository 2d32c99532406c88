"""The same products by jax, jitted, on the CPU, for fully connected nets with cross-entropy.

Weights, data and directions are those of the torch model. The program is compiled before it is timed; parameters and
data are its arguments, so that nothing is computed at compile time. XLA's pool gets as many threads as torch has: it is
made when jax computes for the first time in a process, and stays as it is afterwards.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.bench.bare_torch import Directions, joined
from flatcore.bench.workloads import MLP, Built

Arrays = tuple[Any, ...]  # of jax
Way = Callable[[], Arrays]


def fits(built: Built) -> bool:
    """Whether jax is installed and the workload can be written in it here."""
    model, loss, (inputs, _) = built
    return (
        importlib.util.find_spec("jax") is not None
        and isinstance(model, MLP)
        and isinstance(loss, nn.CrossEntropyLoss)
        and inputs.device.type == "cpu"
    )


def ways(built: Built, V: Directions, operator: str) -> dict[str, Callable[[], Way]]:
    """Name -> a function that prepares the way, bound to the directions, which go through at once by vmap."""
    prepare = _ggn if operator == "ggn" else _hessian
    linearized = "jax (jit) linearize + vjp" if operator == "ggn" else "jax (jit) linearize"
    anew = "jax (jit) jvp + vjp" if operator == "ggn" else "jax (jit) jvp(grad)"
    return {
        anew: lambda: prepare(built, V, kept=False),
        linearized: lambda: prepare(built, V, kept=True),
    }


def to_torch(products: Arrays) -> Tensor:
    """Flat products (K, P)."""
    import numpy as np

    return joined(tuple(torch.from_numpy(np.array(p)) for p in products))


def _hessian(built: Built, V: Directions, kept: bool) -> Way:
    jax = _started()
    parameters, inputs, target, directions = _arrays(jax, built, V)

    def gradient(parameters: Arrays, inputs: Any, target: Any) -> Any:
        return jax.grad(lambda p: _cross_entropy(jax, _network(jax, p, inputs), target))(parameters)

    if kept:
        push = jax.linearize(lambda p: gradient(p, inputs, target), parameters)[1]
        return _jitted(jax, lambda push, V: jax.vmap(push)(V), push, directions)

    def products(parameters: Arrays, inputs: Any, target: Any, V: Arrays) -> Any:
        return jax.vmap(lambda v: jax.jvp(lambda p: gradient(p, inputs, target), (parameters,), (v,))[1])(V)

    return _jitted(jax, products, parameters, inputs, target, directions)


def _ggn(built: Built, V: Directions, kept: bool) -> Way:
    jax = _started()
    parameters, inputs, target, directions = _arrays(jax, built, V)

    def slope(z: Any, target: Any) -> Any:
        return jax.grad(lambda z: _cross_entropy(jax, z, target))(z)

    if kept:
        z, push = jax.linearize(lambda p: _network(jax, p, inputs), parameters)
        curve = jax.linearize(lambda z: slope(z, target), z)[1]
        pull = jax.vjp(lambda p: _network(jax, p, inputs), parameters)[1]

        def from_kept(push: Any, curve: Any, pull: Any, V: Arrays) -> Any:
            return jax.vmap(lambda v: pull(curve(push(v)))[0])(V)

        return _jitted(jax, from_kept, push, curve, pull, directions)

    def products(parameters: Arrays, inputs: Any, target: Any, V: Arrays) -> Any:
        def product(v: Arrays) -> Any:
            network = lambda p: _network(jax, p, inputs)  # noqa: E731
            z, Jv = jax.jvp(network, (parameters,), (v,))
            HJv = jax.jvp(lambda z: slope(z, target), (z,), (Jv,))[1]
            return jax.vjp(network, parameters)[1](HJv)[0]

        return jax.vmap(product)(V)

    return _jitted(jax, products, parameters, inputs, target, directions)


def _network(jax: Any, parameters: Arrays, x: Any) -> Any:
    """What `MLP` computes; parameters: weight (outputs, inputs) and bias of each layer in turn."""
    *hidden, (weight, bias) = zip(parameters[::2], parameters[1::2], strict=True)
    for W, b in hidden:
        x = jax.numpy.tanh(x @ W.T + b)
    return x @ weight.T + bias


def _cross_entropy(jax: Any, logits: Any, target: Any) -> Any:
    chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)
    return -chosen.mean()


def _started() -> Any:
    os.environ["PJRT_NPROC"] = str(torch.get_num_threads())
    jax: Any = importlib.import_module("jax")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # allows float64; what is float32 stays so
    return jax


def _arrays(jax: Any, built: Built, V: Directions) -> tuple[Arrays, Any, Any, Arrays]:
    model, _, (inputs, target) = built

    def array(tensor: Tensor) -> Any:
        return jax.numpy.array(tensor.detach().numpy())

    return tuple(array(p) for p in model.parameters()), array(inputs), array(target), tuple(map(array, V))


def _jitted(jax: Any, products: Callable[..., Any], *arguments: Any) -> Way:
    run = jax.jit(products)
    return lambda: jax.block_until_ready(run(*arguments))
