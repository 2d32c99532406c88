"""Models and losses with operations that have no rule, and the dense operators of them by plain double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

EXAMPLES, WIDTH = 5, 8
INDEX = torch.tensor([[0, 2, 1, 1, 3, 0, 2, 2]]).expand(EXAMPLES, WIDTH)
MASK = torch.tensor([True, False, True, True, False])


class Square(torch.autograd.Function):
    """x^2 with a backward that can be differentiated, and a factor that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * dy * x, None


class Ends(torch.autograd.Function):
    """Two outputs of two inputs, and an index; the backward of the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        index = x.argmax(1)
        ctx.mark_non_differentiable(index)
        return x * w, w.sin(), index

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dz: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).sum(0) + dz * w.cos()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy * ctx.saved_tensors[0]


class InPlace(torch.autograd.Function):
    """x^2 / 2, in the first column doubled through a view; below autograd's bookkeeping a view is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.square() / 2
        y[:, 0].mul_(2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx = dy * ctx.saved_tensors[0]
        dx[:, 0].mul_(2)
        return dx


def spectrum(h: Tensor, w: Tensor) -> Tensor:
    return torch.fft.rfft(h * w).abs()


def gram(h: Tensor) -> Tensor:
    return h.T @ h + torch.eye(WIDTH, dtype=h.dtype)


def ends(h: Tensor, w: Tensor) -> Tensor:
    y, z, index = Ends.apply(h, w)
    return y * z + h.gather(1, index[:, None])


def attention(h: Tensor, w: Tensor) -> Tensor:
    q = (h * w).view(-1, 1, 4, 2)
    seen = (q @ q.mT > 0.3) | torch.eye(4, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, q.flip(-1), q, attn_mask=seen).flatten(1)


def unpooled(h: Tensor, w: Tensor) -> Tensor:
    y, index = F.max_pool2d((h * w).view(-1, 1, 2, 4), (1, 2), return_indices=True)
    return F.max_unpool2d(y.square(), index, (1, 2), output_size=(2, 4)).flatten(1)


# name -> f(h, w): (examples, WIDTH) and (WIDTH,) to (examples, anything). The examples stay apart.
ROWWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max both outputs": lambda h, w: h * torch.mul(*(h * w).max(1, keepdim=True)),
    "sort": lambda h, w: (h * w).sort(1)[0] * w,
    "sort both outputs": lambda h, w: torch.mul(*(h * w).sort(1)),
    "topk": lambda h, w: (h * w).topk(3, 1)[0].square(),
    "topk indices": lambda h, w: h.gather(1, (h * w).topk(3, 1)[1]) ** 2,
    "median": lambda h, w: h * (h * w).median(1, keepdim=True)[0],
    "prod": lambda h, w: h + (h * w).prod(1, keepdim=True),
    "cumprod": lambda h, w: (h * w).cumprod(1),
    "logcumsumexp": lambda h, w: (h * w).logcumsumexp(1),
    "conv3d": lambda h, w: F.conv3d(h.view(-1, 1, 2, 2, 2), w.view(1, 1, 2, 2, 2), padding=1).flatten(1),
    "avg_pool3d": lambda h, w: F.avg_pool3d((h * w).view(-1, 1, 2, 2, 2), 2, 1, 1).flatten(1).square(),
    "scatter_add": lambda h, w: h.new_zeros(len(h), 4).scatter_add(1, INDEX[: len(h)], h * w).square(),
    "index_put": lambda h, w: h.index_put((slice_rows(h), INDEX[: len(h)]), h * w, accumulate=True) ** 2,
    "rfft": spectrum,
    "norm of order 3": lambda h, w: h * (h * w).norm(3, 1, keepdim=True),
    "det": lambda h, w: torch.linalg.det((h * w)[:, :4].view(-1, 2, 2))[:, None] * h,
    "inverse": lambda h, w: torch.linalg.inv(
        (h * w)[:, :4].view(-1, 2, 2) + 3 * torch.eye(2, dtype=h.dtype)
    ).flatten(1),
    "logdet": lambda h, w: torch.logdet((h * w)[:, :4].view(-1, 2, 2) + 3 * torch.eye(2, dtype=h.dtype))[
        :, None
    ],
    "bilinear": lambda h, w: F.bilinear(h[:, :4], h[:, 4:], torch.outer(w, w[:4]).view(2, 4, 4)),
    "cosine_similarity": lambda h, w: h * F.cosine_similarity(h * w, h.flip(1))[:, None],
    "where of an argmax": lambda h, w: torch.where((h.argmax(1) > 3)[:, None], h * w, h.square()),
    "argmax as a number": lambda h, w: h * w * h.argmax(1, keepdim=True).to(h),
    "count": lambda h, w: h * (h * w > 0).sum(1, keepdim=True),
    "max_unpool": unpooled,
    "attention with a mask of its own": attention,
    "function": lambda h, w: Square.apply(h * w, 0.7),
    "function of two outputs": ends,
    "function in place": lambda h, w: InPlace.apply(h * w),
    "twice the same": lambda h, w: (h * w).cumprod(1) + w.cumprod(0) * (h + w).cumprod(1),
}
# The same, of all examples together.
TOGETHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logdet of all": lambda h, w: h * torch.logdet(gram(h * w)),
    "inverse of all": lambda h, w: h @ torch.inverse(gram(h * w)),
    "cdist": lambda h, w: torch.cdist(h * w, h.square() + 3, compute_mode="use_mm_for_euclid_dist"),
    "constant mask": lambda h, w: h * w + (h * w)[MASK].square().mean(0),
    "own mask": lambda h, w: h * h[h * w > 0].square().mean(),
}


def slice_rows(h: Tensor) -> Tensor:
    return torch.arange(len(h))[:, None].expand(len(h), WIDTH)


class Inner(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(1 + 0.5 * torch.randn(WIDTH))
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h, self.w)


class Around(nn.Module):
    """Native layers around one without a rule; `inner` runs twice, so its parameter is shared."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], twice: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.twice = nn.Linear(4, WIDTH), Inner(function), twice
        features = function(torch.ones(EXAMPLES, WIDTH), torch.ones(WIDTH)).shape[1]
        self.last = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(self.inner(self.inner(h) if self.twice else h))


def built(
    function: Callable[[Tensor, Tensor], Tensor], **options: Any
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Around(function, **options).double().eval()
    return model, (torch.randn(EXAMPLES, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0]))


class Dense:
    """Hessian, GGN and covariance of loss(model(x), y) by autograd twice, one row at a time."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]
    ) -> None:
        self.model, self.loss, self.batch = model, loss, batch
        self.theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def output(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only form with second derivatives
            return functional_call(self.model, self.theta, (x,))

    def rows(self, values: Tensor, inputs: list[Tensor]) -> Tensor:
        """The Jacobian of a vector."""
        found = [
            torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
            for value in values.reshape(-1)
        ]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in found])

    def gradient(self, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
        loss = self.loss(self.output(x), y)
        found = torch.autograd.grad(
            loss, list(self.theta.values()), create_graph=create_graph, materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in found])

    def hessian(self) -> Tensor:
        return self.rows(self.gradient(*self.batch, create_graph=True), list(self.theta.values()))

    def ggn(self) -> Tensor:
        z = self.output(self.batch[0])
        J = self.rows(z, list(self.theta.values()))
        leaf = z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(self.loss(leaf, self.batch[1]), leaf, create_graph=True)
        return J.T @ self.rows(dz, [leaf]) @ J

    def covariance(self) -> Tensor:
        x, y = self.batch
        g = torch.stack([self.gradient(x[n : n + 1], y[n : n + 1]) for n in range(len(x))])
        return g.T @ g / len(x)
