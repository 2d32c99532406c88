"""Ops that work element by element: arithmetic, scalar functions, comparisons, choices, in-place writes."""

from __future__ import annotations

from .builder import Builder, Skip, op
from .templates import expressions

expressions(
    {
        "torch.add({x}, {y}, alpha={number})": "add.Tensor",
        "{number} + {x}": "add.Tensor",
        "{x} - {y}": "sub.Tensor",
        "torch.sub({x}, {y}, alpha={number})": "sub.Tensor",
        "torch.rsub({x}, {number}, alpha={number})": "rsub.Scalar",
        "torch.rsub({x}, {y}, alpha={number})": "rsub.Tensor",
        "-{x}": "neg.default",
        "{x} * {y}": "mul.Tensor",
        "{x} * {x}": "mul.Tensor",
        "{x} / (1.5 + torch.tanh({y}))": "div.Tensor",
        "{x} / {number}": "div.Tensor",
        "{number} / {positive}": "reciprocal.default",
        "torch.true_divide({x}, {y}.square() + 0.7)": "true_divide.Tensor",
        "torch.addcmul({x}, {y}, {y}, value={number})": "addcmul.default",
        "torch.lerp({x}, {same}, {fraction})": "lerp.Scalar",
        "F.relu({x})": "relu.default",
        "torch.tanh({x})": "tanh.default",
        "torch.sigmoid({x})": "sigmoid.default",
        "F.silu({x})": "silu.default",
        "({fraction} * {x}).exp()": "exp.default",
        "{positive}.log()": "log.default",
        "{positive}.sqrt()": "sqrt.default",
        "{positive}.rsqrt()": "rsqrt.default",
        "{positive}.reciprocal()": "reciprocal.default",
        "torch.sin({x})": "sin.default",
        "torch.cos({x})": "cos.default",
        "{x}.abs()": "abs.default",
        "{x}.square()": "square.default",
        "hardsigmoid({x})": "hardsigmoid.default",
        "F.hardswish({x})": "hardswish.default",
        "F.mish({x})": "mish.default",
        "torch.erf({x})": "erf.default",
        "{positive}.log1p()": "log1p.default",
        "torch.expm1({fraction} * {x})": "expm1.default",
        "F.gelu({x})": "gelu.default",
        "F.gelu({x}, approximate='tanh')": "gelu.default",
        "F.leaky_relu({x}, {fraction})": "leaky_relu.default",
        "F.elu({x}, {fraction})": "elu.default",
        "F.selu({x})": "selu.default",
        "F.softplus({x}, beta=1.5, threshold=2.5)": "softplus.default",
        "F.logsigmoid({x})": "log_sigmoid.default",
        "{positive} ** {number}": "pow.Tensor_Scalar",
        "{x} ** 3": "pow.Tensor_Scalar",
        "{positive} ** -0.5": "pow.Tensor_Scalar",
        "1.7 ** {x}": "pow.Scalar",
        "{x}.clamp(-{fraction}, {fraction})": "clamp.default",
        "torch.clip({x}, {number}, 1.7)": "clip.default",
        "{x}.clamp_min({number})": "clamp_min.default",
        "{x}.clamp_max({number})": "clamp_max.default",
        "F.hardtanh({x}, -0.7, 0.6)": "hardtanh.default",
        "F.relu6(3 * {x})": "relu6.default",
        "torch.log2({positive})": "log2.default",
        "torch.log10({positive})": "log10.default",
        "torch.exp2({x})": "exp2.default",
        "torch.logaddexp({x}, {y})": "logaddexp.default",
        "F.threshold({x}, {number}, {number})": "threshold.default",
        "{x} * torch.sign({y})": "sign.default",
        "{x} * torch.sgn({y})": "sgn.default",
        "torch.maximum({x}, {y})": "maximum.default",
        "torch.minimum({x}, {y})": "minimum.default",
        "torch.clamp_min({x}, {y})": "clamp_min.Tensor",
        "torch.clamp_max({x}, {y})": "clamp_max.Tensor",
        "torch.where({x} > {number}, {y}, {y})": "gt.Scalar",
        "({x} < {number}) * {x}.sin()": "lt.Scalar",
        "{x}.masked_fill({x} >= {number}, {number})": "ge.Scalar",
        "torch.where({x} <= {number}, {x}, {y})": "le.Scalar",
        "torch.where({x} > {y}, {x}, {y})": "gt.Tensor",
        "torch.where({x} < {y}, {x}, {number})": "lt.Tensor",
        "({x} >= {y}).to({x}.dtype) * {x}": "ge.Tensor",
        "torch.where({x} <= {y}, {number}, {x}.cos())": "le.Tensor",
        "torch.where(torch.logical_not({x} > {number}), {x}, {y})": "logical_not.default",
        "torch.where(~({x} > {number}), {x}, {y})": "bitwise_not.default",
        "torch.where(torch.logical_and({x} > -1.0, {mask}), {y}, {x})": "logical_and.default",
        "torch.where(({x} > -1.0) & ({x} < {fraction}), {x}.exp(), {y})": "bitwise_and.Tensor",
        "torch.where({mask}, {x}, {y})": "where.self",
        "torch.where({mask}, {x}, {number})": "where.ScalarOther",
        "torch.where({mask}, {number}, {x})": "where.ScalarSelf",
        "{x}.masked_fill({mask}, {number})": "masked_fill.Scalar",
        "{x} + torch.full_like({x}, {number})": "",
        "F.softshrink({x}, {fraction})": "",
        "F.hardshrink({x}, {fraction})": "",
        "F.softsign({x})": "",
        "({x}.square() + {y}.square() + 0.3).sqrt()": "",
        "torch.where({x} > 0.2, {x}.clamp_min(0.1).log(), {y})": "",
    }
)


@op("celu.default")
def celu(b: Builder) -> None:
    """torch's backward rounds alpha to float32, so one that float32 holds."""
    b.let(f"F.celu({b.pick()}, alpha={b.choice([0.5, 0.75, 1.25])})")


@op("prelu.default")
def prelu(b: Builder) -> None:
    x = b.pick(min_rank=2)
    slopes = b.weight((b.choice([1, b.size(x, 1)]),), 0.5)
    b.let(f"F.prelu({x}, {slopes})")


@op("masked_fill.Tensor")
def masked_fill_by_value(b: Builder) -> None:
    x = b.pick()
    b.let(f"{x}.masked_fill({b.mask(b.shape(x))}, {b.weight(())})")


@op("_to_copy.default")
def rounded(b: Builder) -> None:
    """A cast to float32 and back: from there on the graph agrees to float32's precision."""
    if not (b.focus or b.chance(0.2)):
        raise Skip
    b.let(f"{b.pick()}.float().double()")
    b.state.casts = True


@op()
def dropout_in_eval(b: Builder) -> None:
    x = b.pick(2, 3)
    b.let(b.choice([f"F.dropout({x}, 0.3, training=False)", f"F.dropout1d({x}, 0.3, training=False)"]))


# --- writes in place ---


@op()
def in_place_arithmetic(b: Builder) -> None:
    x = b.pick()
    copy = b.let(f"{x}.clone()")
    y = b.weight(b.broadcastable(b.shape(x)))
    for _ in range(b.integer(1, 3)):
        b.do(
            b.choice(
                [
                    f"{copy}.mul_({b.number()})",
                    f"{copy}.add_({y}, alpha={b.number()})",
                    f"{copy}.sub_({y})",
                    f"{copy}.div_(1.7)",
                    f"{copy}.neg_()",
                    f"{copy}.masked_fill_({b.mask(b.shape(copy))}, 0.3)",
                    f"{copy} += {x}.cos()",
                ]
            ),
            copy,
        )
    # Behind one that keeps its result for the backward pass no other write may come.
    b.do(f"{copy}.{b.choice(['tanh_', 'exp_', 'sigmoid_', 'relu_', 'sin_', 'abs_'])}()", copy)
    b.let(f"{copy} * 1.25")


@op("slice_scatter.default", "copy.default", "fill.Tensor")
def overwritten_slice(b: Builder) -> None:
    x = b.pick(min_rank=1)
    copy = b.let(f"{x}.clone()")
    axis = b.integer(0, b.rank(x) - 1)
    start = b.integer(0, b.size(x, axis) - 1)
    end = b.integer(start + 1, b.size(x, axis))
    shape = list(b.shape(x))
    shape[axis] = end - start
    colons = ":, " * axis
    b.do(f"{copy}[{colons}{start}:{end}] = {b.weight(b.broadcastable(shape))}", copy)
    b.let(f"{copy}.sin()")


@op("select_scatter.default", "fill.Tensor")
def overwritten_element(b: Builder) -> None:
    x = b.pick(min_rank=1)
    copy = b.let(f"{x}.clone()")
    axis = b.integer(0, b.rank(x) - 1)
    place = b.integer(-b.size(x, axis), b.size(x, axis) - 1)
    shape = [size for i, size in enumerate(b.shape(x)) if i != axis]
    colons = ":, " * axis
    b.do(f"{copy}[{colons}{place}] {b.choice(['=', '*=', '+='])} {b.weight(b.broadcastable(shape))}", copy)
    b.let(f"{copy} * {copy}.cos()")


@op("clone.default", "alias.default")
def write_through_a_view(b: Builder) -> None:
    """A view and its base, both read after one of the two was written into."""
    x = b.pick(min_rank=1)
    base = b.let(f"{x}.clone()", plain=True)
    axis = b.integer(0, b.rank(x) - 1)
    views = [f"{base}.transpose(0, {axis})", f"{base}[{base}.shape[0] // 2 :]"]
    if b.state.tensors[base].is_contiguous():  # a clone has the strides of what it copies
        views.append(f"{base}.view(-1)")
    view = b.let(b.choice(views), plain=True)
    target = b.choice([base, view])
    b.do(f"{target}.mul_({b.number()}).add_({b.number()})", target)
    if b.chance():
        b.do(f"{target}[0].exp_()" if b.shape(target)[0] > 1 else f"{target}.exp_()", target)
    b.let(f"{base}.sum() * {view}")
    b.let(f"{base}.tanh()")
