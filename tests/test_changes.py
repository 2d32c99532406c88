"""What is seen of a change before a product: traces of tensors and modules, and values compared by their bytes."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flatcore as fc
from flatcore.changes import Comparison, of_modules, versions
from flatcore.objective import Snapshot


def by_loop(model: nn.Module, loss: nn.Module | None) -> tuple[Any, ...]:
    """The slow twin of `of_modules`."""
    parameters, surroundings, modules = [], [], []
    for root in (model, loss):
        for module in root.modules() if root is not None else ():
            modules += [id(module), module.training]
            ours = parameters if root is model else surroundings
            ours += [version(p) for p in module._parameters.values() if p is not None]
            surroundings += [version(b) for b in module._buffers.values() if b is not None]
    return tuple(parameters), tuple(surroundings), tuple(modules)


def version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), -1 if t.is_inference() else t._version


def net() -> nn.Sequential:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.BatchNorm1d(3), nn.Sequential(shared, nn.Linear(3, 2, bias=False)))


def weighted() -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(weight=torch.ones(2))


def replace_storage(model: nn.Sequential, _: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "nothing": lambda model, loss: None,
    "a parameter in place": lambda model, loss: model[0].bias.detach().add_(1),
    "its storage": replace_storage,
    "another parameter": lambda model, loss: setattr(model[2][1], "weight", nn.Parameter(torch.ones(2, 3))),
    "one gone": lambda model, loss: setattr(model[0], "bias", None),
    "a buffer in place": lambda model, loss: model[1].running_mean.add_(1),
    "a buffer of the loss": lambda model, loss: loss.weight.mul_(2),
    "the mode of one module": lambda model, loss: model[1].eval(),
    "the mode of the loss": lambda model, loss: loss.eval(),
    "a module more": lambda model, loss: model.append(nn.Tanh()),
    "another module": lambda model, loss: model[2].__setitem__(0, nn.Linear(3, 3)),
    "a parameter of the loss": lambda model, loss: loss.register_parameter("s", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_traces_change_where_a_plain_loop_sees_a_change(change: str) -> None:
    model, loss = net(), weighted()
    kept = [*model.modules(), *model.parameters(), *model.buffers()]  # whose memory is not given to others
    before, slow = of_modules(model, loss), by_loop(model, loss)
    CHANGES[change](model, loss)
    now = [a == b for a, b in zip(before, of_modules(model, loss), strict=True)]
    assert now == [a == b for a, b in zip(slow, by_loop(model, loss), strict=True)]
    assert all(now) == (change == "nothing")
    assert len(kept)


def test_each_module_counts_once_and_other_mappings_do_too() -> None:
    model = net()
    parameters, buffers, modules = of_modules(model, None)
    assert (len(parameters), len(buffers), len(modules)) == (5 * 16, 3 * 16, 5 * 16)
    for module in model.modules():
        module.__dict__["_parameters"] = OrderedDict(module._parameters)
    assert of_modules(model, None) == (parameters, buffers, modules)


def test_versions_of_tensors() -> None:
    with torch.inference_mode():
        inside = torch.ones(2)
    tensors = [torch.ones(3), torch.zeros(0), inside, torch.ones(2, 2).to_sparse()]
    before = versions(tensors)
    assert versions(iter(tensors)) == before != versions(tensors[::-1])
    tensors[0].add_(0)
    assert versions(tensors) != before
    assert versions([]) == b""


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_any_entry_of_any_tensor_counts(dtype: torch.dtype) -> None:
    """Also of those that do not lie like their copies, or with gaps, or behind an odd address."""
    generator = torch.Generator().manual_seed(0)
    before = [
        torch.randint(2, s, generator=generator).to(dtype) for s in ((3, 4), (5,), (), (0,), (17,), (3, 4))
    ]
    gaps = torch.zeros(3, 8, dtype=dtype)[:, ::2]
    odd = torch.zeros(18, dtype=dtype)[1:]
    now = [transposed(before[0]), before[1].clone(), before[2].clone(), before[3].clone(), odd, gaps]
    for there, value in zip(now[4:], before[4:], strict=True):
        there.copy_(value)
    assert Comparison(before, now).equal()
    for t in now:
        for i in np.ndindex(*t.shape):
            t[i] = 1 - t[i].to(torch.int64)
            comparison = Comparison(before, now)
            assert not comparison.equal()
            assert not comparison.equal()
            t[i] = 1 - t[i].to(torch.int64)
    assert Comparison(before, now).equal()


def test_the_least_change_of_a_number_counts() -> None:
    before, now = [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0])]
    for other in (1 + torch.finfo(torch.float32).eps, math.nan):
        now[0][0] = other
        assert not Comparison(before, now).equal()
    now[0][0], now[0][1] = 1, 1e-45
    assert not Comparison(before, now).equal()


def test_more_tensors_than_go_into_one_launch() -> None:
    before = [torch.full((n % 7,), float(n)) for n in range(350)]
    now = [t.clone() for t in before]
    assert Comparison(before, now).equal()
    for n in (1, 99, 100, 199, 200, 348):
        now[n][-1] += 1
        assert not Comparison(before, now).equal()
        now[n][-1] -= 1


def test_a_large_tensor() -> None:
    """In pieces, by all threads."""
    size = (1 << 20) + 3
    before, now = [torch.zeros(size)], [torch.zeros(size)]
    assert Comparison(before, now).equal()
    for i in (0, size // 2, size - 1):
        now[0][i] = 1
        assert not Comparison(before, now).equal()
        now[0][i] = 0


def test_other_kinds_differ() -> None:
    one = torch.ones(2)
    for other in (torch.ones(1, 2), torch.ones(3), one.double(), one.to("meta")):
        assert not Comparison([one], [other]).equal()
    assert Comparison([], []).equal()
    with pytest.raises(ValueError, match="now: expected as many tensors"):
        Comparison([one], [])


@pytest.mark.parametrize("meanwhile", [False, True], ids=["at once", "as on a GPU"])
def test_work_at_the_present_parameters(meanwhile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done again only where nothing but the values tells that the last snapshot is an old one."""
    monkeypatch.setattr("flatcore.objective._goes_on_meanwhile", lambda device: meanwhile)
    model = nn.Linear(2, 1)
    objective = fc.Objective(model, nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    seen: list[Snapshot] = []

    def work(at: Snapshot) -> Tensor:
        seen.append(at)
        return at.values["weight"]

    def runs() -> int:
        count = len(seen)
        assert torch.equal(objective.at_present(work), model.weight)
        return len(seen) - count

    assert runs() == 1
    assert runs() == 1
    model.weight.data[0, 1] += 1
    assert runs() == (2 if meanwhile else 1)
    assert runs() == 1
    with torch.no_grad():
        model.weight.mul_(2)
    assert runs() == 1
    assert len(set(map(id, seen))) == 3


@pytest.mark.parametrize("meanwhile", [False, True], ids=["at once", "as on a GPU"])
def test_a_product_after_an_unseen_write(meanwhile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatcore.objective._goes_on_meanwhile", lambda device: meanwhile)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    data = (torch.randn(4, 2).double(), torch.randn(4, 1).double())
    H = fc.Hessian(fc.Objective(model, nn.MSELoss(), data))
    v = torch.randn(H.shape[0]).double()
    before = H @ v
    model[0].weight.data[1, 1] += 0.5
    now = H @ v
    assert not torch.equal(before, now)
    assert torch.equal(now, fc.Hessian(fc.Objective(model, nn.MSELoss(), data)) @ v)


def test_an_error_of_an_old_point_is_none_of_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatcore.objective._goes_on_meanwhile", lambda device: True)
    model = nn.Linear(2, 1)
    objective = fc.Objective(model, nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    old = objective.snapshot()

    def fails_at_the_old(at: Snapshot) -> float:
        if at is old:
            raise ValueError("loss: not finite")
        return float(at.values["weight"][0, 1])

    with pytest.raises(ValueError, match="not finite"):
        objective.at_present(fails_at_the_old)
    model.weight.data[0, 1] = 3.0
    assert objective.at_present(fails_at_the_old) == 3.0


class Twin(Tensor):
    """A tensor of Python's, of which the extension sees no memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Twin":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(a.inner if isinstance(a, Twin) else a for a in args), **(kwargs or {}))


def test_tensors_of_python_are_compared_by_their_own_rule() -> None:
    one, other = Twin(torch.ones(3)), Twin(torch.ones(3))
    assert Comparison([one], [other]).equal()
    other.inner[1] = 2
    assert not Comparison([one], [other]).equal()
    versions([one, other])
