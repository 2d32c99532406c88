"""External ops are tried before anyone relies on them: two derivatives, a symmetric second one, and their cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from ..errors import CaptureError, NotTwiceDifferentiableError
from .cost import Cost
from .external import External, OnceDifferentiableError
from .interpreter import meaning
from .program import Op, Program

NOT_DERIVATIVE = "torch's second derivative of it is not the derivative of its first"


def gradient_sizes(dtype: torch.dtype) -> tuple[float, float, float]:
    """Sizes to try a backward with: powers of two, which round nothing. What puts the gradient into one matrix with
    the data (matrix_exp) loses as many digits as the two are apart: half of all, less six bits for rounding, is what
    an agreement to half of the digits has room for."""
    large = 2.0 ** (round(-math.log2(torch.finfo(dtype).eps) / 2) - 6)
    return 1 / large, 1.0, large


def tried(program: Program, parameters: Mapping[str, Tensor], constants: Mapping[int, Tensor]) -> Program:
    """The program with the measured costs of its external ops.

    Raises CaptureError, naming operation and module, for an op that does not run here, that torch cannot differentiate
    twice (NotTwiceDifferentiableError), or that it differentiates wrongly.
    """
    values = {i: parameters[name].detach() for i, name in program.parameters.items()} | dict(constants)
    active, ops = program.active(), []
    for op in program.ops:
        inputs = [None if i is None else values[i] for i in op.inputs]
        if op.external:
            given = [x for x in inputs if x is not None]
            op = _tried(op, op.external, given, [i in active for i in op.present])
        with torch.no_grad():
            values[op.output] = meaning(op.kind, op.attrs, inputs)
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(ops))


def _tried(op: Op, function: External, inputs: Sequence[Tensor], active: Sequence[bool]) -> Op:
    versions = [x._version for x in inputs]
    try:
        function.check_twice_differentiable(inputs, active)
        problem, measured = _differentiated(function, inputs, active)
        if versions != [x._version for x in inputs]:
            problem = "writes into its arguments"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever torch or the user's own function raises
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        refused = isinstance(error, OnceDifferentiableError) or "is not implemented" in first_line
        kind = NotTwiceDifferentiableError if refused else CaptureError
        reason = f"torch cannot differentiate it twice ({first_line.rstrip('.')})"
        raise kind(reason, op=function.name, path=op.path) from error
    if problem:
        raise CaptureError(problem, op=function.name, path=op.path)
    return dataclasses.replace(op, attrs={"function": measured})


def _differentiated(
    function: External, inputs: Sequence[Tensor], active: Sequence[bool]
) -> tuple[str, External]:
    """What is wrong with the derivatives for random directions, and the function with what they cost."""
    y = function.forward(inputs)
    if tuple(y.shape) != function.shape or y.dtype != function.dtype:
        return f"gives {y.dtype} of shape {tuple(y.shape)} where export found {function.shape}", function
    draw = torch.Generator("cpu").manual_seed(0)
    u = torch.randn(y.shape, generator=draw, dtype=torch.float64, device="cpu").to(y)
    pairs = [
        torch.randn((2, *x.shape), generator=draw, dtype=torch.float64, device="cpu").to(x) if a else None
        for x, a in zip(inputs, active, strict=True)
    ]
    first = [None if t is None else t[:1] for t in pairs]
    with Cost() as cost, saved_tensors_hooks(cost.note, lambda t: t):
        function.tangent(inputs, first)
        function.adjoint(inputs, first, u, u[None], active)
    problem = _no_transpose(function, inputs, first, u, active)
    second = function.adjoint(inputs, pairs, u, None, active)
    differs = _is_written_by_hand(function) and _differs_from_differences(function, inputs, pairs, u, second)
    measured = dataclasses.replace(
        function,
        flops=cost.flops,
        workspace=cost.saved // y.element_size(),
        note=NOT_DERIVATIVE if differs else "",
    )
    return problem or _asymmetry(pairs, second, _eps(function)), measured


def _eps(function: External) -> float:
    return torch.finfo(torch.float32 if function.rounds else function.dtype).eps


def _no_transpose(
    function: External,
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    u: Tensor,
    active: Sequence[bool],
) -> str:
    """<u, J t> = <J' u, t>, to half the digits, for small and large u: a backward that clips or normalises what it
    is given is no transpose of anything, and products made of it are none of the model's."""
    Jt = function.tangent(inputs, tangents)[0].double()
    for size in gradient_sizes(torch.float32 if function.rounds else function.dtype):
        pulled = function.adjoint(inputs, [None] * len(inputs), None, (size * u)[None], active)
        pairs = [
            (t.double().flatten(), g.double().flatten())
            for t, g in zip(tangents, pulled, strict=True)
            if t is not None and g is not None
        ]
        direct, scale = size * float((u.double() * Jt).sum()), size * float(u.double().norm() * Jt.norm())
        through = sum(float(t @ g) for t, g in pairs)
        scale += sum(float(t.norm() * g.norm()) for t, g in pairs)
        if math.isfinite(scale) and abs(direct - through) > math.sqrt(_eps(function)) * scale:
            return "its backward is not linear in the gradient it is given, so it is no derivative"
    return ""


def _is_written_by_hand(function: External) -> bool:
    nodes = function.function.graph.nodes if isinstance(function.function, fx.GraphModule) else ()
    return any(getattr(node.target, "__qualname__", "").endswith(".apply") for node in nodes)


def _differs_from_differences(
    function: External,
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    u: Tensor,
    products: Sequence[Tensor | None],
) -> bool:
    """Are central differences of J' u along the first direction, which agree among themselves, something else than
    torch's derivative? So it is where a tensor made in forward is saved, which torch takes for a constant. At a kink
    the differences for two steps do not agree, and nothing follows."""
    active = [t is not None for t in directions]
    # The step at which truncation and rounding weigh alike.
    step = _eps(function) ** (1 / 3)

    def pulled(shift: float) -> Tensor:
        moved = [x if t is None else x + shift * t[0] for x, t in zip(inputs, directions, strict=True)]
        found = function.adjoint(moved, [None] * len(inputs), None, u[None], active)
        return torch.cat([g.double().flatten() for g in found if g is not None])

    coarse, fine = ((pulled(h) - pulled(-h)) / (2 * h) for h in (step, step / 2))
    exact = torch.cat([p[0].double().flatten() for p in products if p is not None])
    gap = (fine - exact).norm()
    return bool(gap > 0.01 * (fine.norm() + exact.norm()) and (coarse - fine).norm() < 0.01 * gap)


def _asymmetry(directions: Sequence[Tensor | None], products: Sequence[Tensor | None], eps: float) -> str:
    """<a, H b> = <b, H a>, to half the digits, for a and b in the two rows of `directions`."""
    pairs = [(t, Ht) for t, Ht in zip(directions, products, strict=True) if t is not None and Ht is not None]
    crossed, scale = 0.0, 0.0
    for t, Ht in pairs:
        a, b, Ha, Hb = (x.double().flatten() for x in (*t, *Ht))
        crossed += float(a @ Hb - b @ Ha)
        scale += float(a.norm() * Hb.norm() + b.norm() * Ha.norm())
    if math.isfinite(scale) and abs(crossed) > math.sqrt(eps) * scale:
        return "torch's second derivative of it is not symmetric, so it is wrong"
    return ""
