"""What is checked of a model, a loss and data before anything is computed. One sentence per fault."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatcore.capture.batch import batch_leaves
from flatcore.data import Batch
from flatcore.errors import first_line
from flatcore.evaluate import Evaluation, ModelLoss, hf_loss, once_differentiable

_NORMS_WITH_STATISTICS = nn.modules.batchnorm._NormBase


def check_kinds(model: Any, loss: Any) -> None:
    """What model and loss are, before either is called."""
    _check_model(model)
    if isinstance(loss, type):
        raise TypeError(
            f"loss: expected a callable(output, target), got the class {loss.__name__}; make one of it"
        )
    if loss is hf_loss:
        raise TypeError("loss: expected hf_loss(), got the function hf_loss itself; call it")
    if not callable(loss) and not isinstance(loss, ModelLoss):
        raise TypeError(
            f"loss: expected a callable(output, target) or ModelLoss(fn), got {type(loss).__name__}; give a loss of "
            "torch.nn, say"
        )
    if isinstance(loss, ModelLoss) and not callable(loss.fn):
        raise TypeError(
            f"loss: expected ModelLoss of a callable, got one of {type(loss.fn).__name__}; give a function"
        )
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()) > any(
        True for _ in model.parameters()
    ):
        raise ValueError(
            f"model: expected a module with parameters, got {type(model).__name__} without, while the loss, "
            f"{type(loss).__name__}, has some; give the model first, then the loss"
        )


def _check_model(model: Any) -> None:
    if isinstance(model, type):
        raise TypeError(f"model: expected a torch.nn.Module, got the class {model.__name__}; make one of it")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; wrap functions in one"
        )
    compiled = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if compiled is not None:
        raise TypeError(
            f"model: expected a torch.nn.Module, got one of torch.jit{f' as {compiled!r}' if compiled else ''}, whose "
            "code is compiled already; use the module that it was made from"
        )
    if {p.device.type for p in model.parameters()} == {"meta"}:
        raise ValueError(
            "model: expected parameters with numbers, got them on device meta; load their values, or call to_empty() "
            "and initialise them"
        )


def check_finite(tensors_by_name: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors_by_name.items():
        finite = torch.isfinite(tensor.detach())
        if tensor.is_floating_point() and not bool(finite.all()):
            bad = int((~finite).sum())
            raise ValueError(
                f"model: expected finite {what}s, got {bad} of {tensor.numel()} entries not finite in "
                f"{name!r}"
            )


def check_mode(model: nn.Module, allow_train_mode: bool) -> None:
    """Refuses layers whose loss is random in train mode, and unless allowed those that make examples interact."""
    random_layers = [
        describe for name, module in model.named_modules() if (describe := _random_layer(name, module))
    ]
    statistics = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _NORMS_WITH_STATISTICS) and module.training and _updates_statistics(module)
    ]
    found = random_layers + ([] if allow_train_mode else statistics)
    if found:
        shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        if allow_train_mode:
            advice = "call eval() on these layers: allow_train_mode=True is for normalisation"
        else:
            advice = "call model.eval()"
            advice += ", or pass allow_train_mode=True to normalise by each batch's own statistics" * (
                not random_layers
            )
        raise ValueError(
            f"model: expected a loss that is the same every time, got layers in train mode: {shown}; {advice}"
        )


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or bool(
        getattr(module, "track_running_stats", False)
    )


def _random_layer(name: str, module: nn.Module) -> str:
    if not module.training:
        return ""
    if isinstance(module, nn.RReLU) and module.lower < module.upper:
        return f"{name!r} (RReLU)"
    probability: Any = 0.0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        probability = module.dropout
    elif "drop" in type(module).__name__.lower():
        probability = next(
            (getattr(module, a) for a in ("p", "drop_prob", "drop_rate") if hasattr(module, a)), 0.0
        )
    if isinstance(probability, int | float) and probability > 0:
        return f"{name!r} ({type(module).__name__}, p = {probability:g})"
    return ""


def check_batch_statistics(model: nn.Module) -> None:
    """Refuses normalisation over the batch where examples must not interact."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is None:
                how, instead = "without running statistics", "use track_running_stats=True"
            elif module.training:
                how, instead = "in train mode", "call model.eval()"
            else:
                continue
            raise ValueError(
                f"model: expected examples that do not interact, got {name!r} ({type(module).__name__}) {how}, "
                f"which normalises over the batch, so that no example has a gradient of its own; {instead}"
            )


def check_unchanged(evaluation: Evaluation) -> None:
    if evaluation.changed:
        raise ValueError(
            f"model: expected a forward pass that changes no parameter, got {evaluation.changed[0]!r} changed in "
            "place (an embedding's max_norm does that); run the model on the data once, then make the objective"
        )


def evaluate(
    evaluator: Callable[[Batch, Mapping[str, Tensor]], Evaluation],
    batch: Batch,
    parameters: Mapping[str, Tensor],
    index: int,
    twice: bool = True,
) -> Evaluation:
    """Evaluates one batch; a batch that the model or the loss rejects is told with its shapes, its cause
    chained.

    twice: so that second derivatives can be taken, which costs memory where there is attention.
    """
    try:
        run = partial(_evaluated, evaluator, batch, parameters)
        result = run() if twice else once_differentiable(run)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"data: the model or the loss rejected batch {index} of shapes {_shapes(batch)}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    check_loss(result.loss, index)
    return result


def _evaluated(
    evaluator: Callable[[Batch, Mapping[str, Tensor]], Evaluation],
    batch: Batch,
    parameters: Mapping[str, Tensor],
) -> Evaluation:
    """A model that takes gradients itself (a penalty on them, say) needs a graph also where only a value is asked."""
    if torch.is_grad_enabled():
        return evaluator(batch, parameters)
    try:
        return evaluator(batch, parameters)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        result = evaluator(batch, {n: p.detach().requires_grad_() for n, p in parameters.items()})
    outputs = tuple(z.detach() for z in result.outputs)
    loss = result.loss.detach() if isinstance(result.loss, Tensor) else result.loss
    return dataclasses.replace(result, loss=loss, outputs=outputs)


def check_loss(loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__} on batch {index}")
    if loss.dim():
        raise ValueError(
            f"loss: expected one number, a mean over the batch, got shape {tuple(loss.shape)} on batch "
            f"{index}; use "
            'reduction="mean"'
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss: expected a real floating number, got {loss.dtype} on batch {index}")


def check_finite_loss(value: float, index: int) -> None:
    if not math.isfinite(value):
        raise ValueError(f"loss: expected a finite number, got {value} on batch {index}")


def check_repeats(model: nn.Module, first: float, second: float, dtype: torch.dtype) -> None:
    """Refuses a loss that differs between two evaluations by more than the order of additions can explain."""
    if not math.isfinite(first) or abs(first - second) <= 100 * torch.finfo(dtype).eps * max(
        abs(first), abs(second)
    ):
        return
    noise = "random numbers of the model's code or the loss (draw them once and give them with the batch)"
    suspects = ", ".join([*list(_suspects(model))[:4], noise])
    raise ValueError(
        f"model: expected the same loss from two evaluations of one batch, got {first:.9g} and {second:.9g}; "
        f"suspects are {suspects}"
    )


def _suspects(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if any(word in kind.lower() for word in ("drop", "noise", "random", "stoch", "sampl")):
            yield f"{name!r} ({kind})"
    if model.training:
        yield "the model itself, which is in train mode (call model.eval())"


def _shapes(batch: Batch) -> str:
    return ", ".join(str(tuple(t.shape)) for t in batch_leaves(batch)) or "none"
