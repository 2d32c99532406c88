"""Products of matrices, convolutions, attention, normalisation, pooling, resampling, reductions."""

from __future__ import annotations

from math import prod

from .builder import Builder, Skip, op
from .templates import expressions

expressions(
    {
        "{x}.sum()": "sum.default",
        "{vector}.sum({dims}, keepdim={flag})": "sum.dim_IntList",
        "{x}.mean()": "mean.default",
        "{vector}.mean({dims}, keepdim={flag})": "mean.dim",
        "({vector} + 0.3).norm(2, {dims}, keepdim={flag})": "linalg_vector_norm.default",
        "torch.linalg.vector_norm({vector} + 0.1, 1, {dim})": "linalg_vector_norm.default",
        "{x}.add(0.2).norm()": "linalg_vector_norm.default",
        "F.normalize({matrix} + 0.2, dim={dim}, eps=0.1)": "",
        "{vector}.max({dim}, keepdim={flag})[0]": "max.dim",
        "{vector}.min({dim}, keepdim={flag})[0]": "min.dim",
        "{vector}.amax({dims}, keepdim={flag})": "amax.default",
        "{vector}.amin({dims}, keepdim={flag})": "amin.default",
        "{x}.max()": "max.default",
        "{x}.min()": "min.default",
        "{vector}.cumsum({dim})": "cumsum.default",
        "{x}.softmax(0) if {x}.dim() == 0 else {x}.softmax(-1)": "softmax.int",
        "torch.softmax({vector}, {dim})": "softmax.int",
        "F.softmin({vector}, dim={dim})": "softmax.int",
        "F.log_softmax({vector}, {dim})": "log_softmax.int",
        "torch.logsumexp({vector}, {dims}, keepdim={flag})": "logsumexp.default",
    }
)


@op("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def spread(b: Builder) -> None:
    x = b.pick(min_rank=1)
    dims = b.axes(x)
    correction = b.choice([0, 1])
    if prod(b.size(x, axis) for axis in dims) <= correction + 1:
        raise Skip
    name = b.choice(["var", "std", "var_mean", "std_mean"])
    if name.startswith("std") and b._evaluate(f"{x}.std({dims}, correction=0)").min() < 0.05:
        raise Skip  # too near the point where the root has no derivative
    arguments = f"{x}, dim={dims}, correction={correction}, keepdim={b.chance()}"
    b.let(f"torch.{name}({arguments})", count=2 if "mean" in name else 1)


# --- products ---


@op("linear.default")
def linear(b: Builder) -> None:
    x = b.pick(min_rank=1)
    width, out = b.size(x, -1), b.integer(1, 5)
    bias = f", {b.weight((out,))}" if b.chance() else ""
    b.let(f"F.linear({x}, {b.weight((out, width), width**-0.5)}{bias})")


@op("matmul.default", "mm.default")
def mm(b: Builder) -> None:
    x = b.pick(2, 2)
    n, m = b.shape(x)
    k = b.integer(1, 5)
    b.let(
        b.choice(
            [
                f"torch.mm({x}, {b.weight((m, k))})",
                f"torch.mm({b.weight((k, n))}, {x})",
                f"{x}.t() @ {x}",
                f"{x} @ {b.weight((k, m))}.t()",
            ]
        )
    )


@op("bmm.default")
def bmm(b: Builder) -> None:
    x = b.pick(3, 3)
    n, i, j = b.shape(x)
    k = b.integer(1, 4)
    b.let(
        b.choice(
            [
                f"torch.bmm({x}, {b.weight((n, j, k))})",
                f"torch.bmm({b.weight((n, k, i))}, {x})",
                f"torch.bmm({x}, {x}.mT)",
            ]
        )
    )


@op("matmul.default", "_unsafe_view.default")
def matmul(b: Builder) -> None:
    x = b.pick(min_rank=1)
    shape = b.shape(x)
    k = b.integer(1, 4)
    way = b.integer(0, 4)
    if way == 0:
        b.let(f"torch.matmul({x}, {b.weight((shape[-1],))})")
    elif way == 1:
        b.let(f"{x} @ {b.weight((shape[-1], k))}")
    elif way == 2:
        front = b.broadcastable(shape[:-2]) if b.chance() else (b.integer(1, 2), *shape[:-2])
        b.let(f"{x} @ {b.weight((*front, shape[-1], k))}")
    elif way == 3 and len(shape) >= 2:
        front = b.broadcastable(shape[:-2])
        b.let(f"{b.weight((*front, k, shape[-2]))} @ {x}")
    elif len(shape) >= 2:
        b.let(f"{b.weight((shape[-2],))} @ {x}")
    else:
        raise Skip


@op("mv.default")
def mv(b: Builder) -> None:
    x = b.pick(2, 2)
    b.let(f"torch.mv({x}, {b.weight((b.size(x, 1),))})")


@op("dot.default")
def dot(b: Builder) -> None:
    x = b.pick(1, 1)
    b.let(f"torch.dot({x}, {b.weight(b.shape(x))})")


@op("vdot.default")
def vdot(b: Builder) -> None:
    x = b.pick(1, 1)
    b.let(f"torch.vdot({b.weight(b.shape(x))}, {x})")


@op("addmm.default")
def addmm(b: Builder) -> None:
    x = b.pick(2, 2)
    n, m = b.shape(x)
    k = b.integer(1, 4)
    scales = b.choice(["", f", alpha={b.number()}", f", beta={b.number()}", ", alpha=0.7, beta=1.3"])
    b.let(f"torch.addmm({b.weight(b.broadcastable((n, k)))}, {x}, {b.weight((m, k))}{scales})")


@op("addmv.default")
def addmv(b: Builder) -> None:
    x = b.pick(2, 2)
    n, m = b.shape(x)
    b.let(f"torch.addmv({b.weight((n,))}, {x}, {b.weight((m,))}, alpha={b.number()}, beta={b.number()})")


@op("baddbmm.default")
def baddbmm(b: Builder) -> None:
    x = b.pick(3, 3)
    n, i, j = b.shape(x)
    k = b.integer(1, 3)
    b.let(
        f"torch.baddbmm({b.weight(b.broadcastable((n, i, k)))}, {x}, {b.weight((n, j, k))}, alpha={b.number()})"
    )


@op()
def einsum(b: Builder) -> None:
    x = b.pick(min_rank=2, max_rank=4)
    letters = "abcd"[: b.rank(x)]
    other = "".join(b.rng.sample(letters, b.integer(1, len(letters)))) + b.choice(["", "z"])
    sizes = dict(zip(letters, b.shape(x), strict=True)) | {"z": b.integer(1, 3)}
    joint = sorted(set(letters + other))
    result = "".join(b.rng.sample(joint, b.integer(0, len(joint))))
    y = b.weight([sizes[letter] for letter in other])
    b.let(f"torch.einsum('{letters},{other}->{result}', {x}, {y})")


@op()
def outer(b: Builder) -> None:
    x = b.pick(1, 1)
    b.let(f"torch.outer({x}, {b.weight((b.integer(1, 5),))})")


@op()
def tensordot(b: Builder) -> None:
    x = b.pick(min_rank=2, max_rank=3)
    b.let(f"torch.tensordot({x}, {b.weight((b.size(x, 1), b.size(x, 0), 2))}, dims=([0, 1], [1, 0]))")


# --- attention ---


@op("scaled_dot_product_attention.default")
def attention(b: Builder) -> None:
    q = b.pick(min_rank=3, max_rank=4)
    *front, length, width = b.shape(q)
    keys = b.integer(1, 4)
    options = []
    way = b.rng.random()
    shared = len(front) == 2 and front[1] % 2 == 0 and b.chance(0.4)
    groups = [front[0], front[1] // 2] if shared else front
    if way < 0.25:
        options.append(f"attn_mask={b.constant(b._normal((length, keys)) > -0.5)}")
    elif way < 0.5:
        shape = b.broadcastable((*front, length, keys)) if not shared else (length, keys)
        shape = shape if len(shape) >= 2 else (length, keys)
        options.append(f"attn_mask={b.numbers(shape)}")
    elif way < 0.65:
        options.append(f"attn_mask={b.weight((length, keys))}")
    elif way < 0.85:
        keys = length
        options.append("is_causal=True")
    if b.chance(0.3):
        options.append("scale=0.8")
    if shared:
        options.append("enable_gqa=True")
    k = q if (keys == length and not shared and b.chance(0.3)) else b.weight((*groups, keys, width))
    v = b.weight((*groups, keys, b.integer(1, 3)))
    b.let(f"F.scaled_dot_product_attention({', '.join([q, k, v, *options])})")


# --- normalisation ---


@op("layer_norm.default")
def layer_norm(b: Builder) -> None:
    x = b.pick(min_rank=1)
    shape = b.shape(x)[-b.integer(1, b.rank(x)) :]
    if prod(shape) < 2:
        raise Skip
    affine = b.choice(["", f", {b.weight(shape)}", f", {b.weight(shape)}, {b.weight(shape)}"])
    b.let(f"F.layer_norm({x}, {shape}{affine}, eps={b.choice([0.01, 0.1])})")


@op("rms_norm.default")
def rms_norm(b: Builder) -> None:
    x = b.pick(min_rank=1)
    shape = b.shape(x)[-b.integer(1, b.rank(x)) :]
    weight = b.choice(["None", b.weight(shape)])
    b.let(f"F.rms_norm({x}, {shape}, {weight}, 0.03)")


@op("group_norm.default")
def group_norm(b: Builder) -> None:
    x = b.pick(min_rank=2)
    channels = b.size(x, 1)
    if prod(b.shape(x)[1:]) < 2:
        raise Skip
    groups = b.choice([g for g in range(1, channels + 1) if channels % g == 0])
    affine = b.choice(["", f", {b.weight((channels,))}, {b.weight((channels,))}"])
    b.let(f"F.group_norm({x}, {groups}{affine}, eps=0.05)")


@op("instance_norm.default")
def instance_norm(b: Builder) -> None:
    x = b.pick(3, 4)
    channels = b.size(x, 1)
    if prod(b.shape(x)[2:]) < 2:
        raise Skip
    affine = b.choice(["", f", weight={b.weight((channels,))}, bias={b.weight((channels,))}"])
    b.let(f"F.instance_norm({x}{affine}, eps=0.05)")


@op("batch_norm.default", "_native_batch_norm_legit_no_training.default")
def batch_norm(b: Builder) -> None:
    x = b.pick(min_rank=2)
    channels = b.size(x, 1)
    mean, variance = b.numbers((channels,)), b.constant(b._normal((channels,)).square() + 0.3)
    # torch 2.13 differentiates wrongly through a weight that is not contiguous (finite differences side with us).
    affine = b.choice(["", f", {b.weight((channels,))}.contiguous(), {b.weight((channels,))}"])
    b.let(f"F.batch_norm({x}, {mean}, {variance}{affine})")


@op()
def cosine_similarity(b: Builder) -> None:
    """With the default eps: where a norm is below eps, torch's gradient is not that of the function."""
    x = b.pick(min_rank=2)
    axis = b.axis(x)
    if b.size(x, axis) == 1:
        raise Skip  # plus or minus one, and derivatives in which all cancels
    b.let(f"F.cosine_similarity({x} + 0.3, {b.weight(b.shape(x))}, dim={axis})")


@op("_weight_norm.default")
def weight_norm(b: Builder) -> None:
    x = b.pick(min_rank=2)
    axis = b.choice([0, b.rank(x) - 1])
    shape = [size if i == axis else 1 for i, size in enumerate(b.shape(x))]
    b.let(f"weight_norm({x} + 0.1, {b.weight(shape)}, {axis})")
