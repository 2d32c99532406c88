"""The callback that lets a Trainer of transformers call a tracker. Importing this file imports transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "TrackCallback: expected the package transformers, found none; install it first"
    ) from error

if TYPE_CHECKING:
    from torch import nn

    from flatcore.track import Tracker

__all__ = ["TrackCallback"]


class TrackCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Measures at the start, at every step that is due and at the end, on the tracker's own fixed batch.

    tracker: what `flatcore.track` gave, on the model that the Trainer trains.
    trainer: the Trainer, for its log: ``trainer.add_callback(TrackCallback(tracker, trainer))``. Without it the numbers
        go to the log history of its state, which its reporting integrations do not see.
    edge_of_stability: compare with the threshold of the Trainer's own optimizer.

    Names in the log begin with "flatness/"; numbers that are not finite are left out. Where the Trainer trains in mixed
    precision, the model is measured in its own.
    """

    def __init__(self, tracker: Tracker, trainer: Any = None, *, edge_of_stability: bool = False) -> None:
        from flatcore.track import Tracker

        if not isinstance(tracker, Tracker):
            raise TypeError(
                f"tracker: expected what flatcore.track gives, got {type(tracker).__name__}; call that first"
            )
        if trainer is not None and not callable(getattr(trainer, "log", None)):
            raise TypeError(
                f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}; pass it or None"
            )
        self.tracker, self.trainer = tracker, trainer
        self._edge, self._last = edge_of_stability, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        own = self.tracker.objective.model
        if model is not None and all(module is not own for module in model.modules()):
            raise ValueError(
                "tracker: expected an objective of the model that the Trainer trains, got one of another; "
                "make it with trainer.model"
            )
        optimizer = kwargs.get("optimizer")
        if self._edge and optimizer is not None:
            self.tracker.follow(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
        self._look(state, control, due=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state, control, due=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state, control, due=True)

    def _look(self, state: Any, control: Any, due: bool) -> None:
        step = state.global_step
        if step == self._last:
            return
        with _full_precision(self.tracker.objective.model):
            row = self.tracker.measure(step) if due else self.tracker.step(step)
        if row is None:
            return
        self._last = step
        shown = {k: v for k, v in row.items() if k not in ("step", "status") and math.isfinite(v)}
        logs = {f"flatness/{name}": value for name, value in shown.items()}
        if self.trainer is None:
            epoch = {} if state.epoch is None else {"epoch": state.epoch}
            state.log_history.append({**logs, **epoch, "step": step})
            return
        due_itself = control.should_log  # a log of the Trainer's own, which this one would count as done
        self.trainer.log(logs)
        control.should_log = due_itself


@contextlib.contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate puts around a model's forward: such products are not symmetric."""
    wrapped = [m for m in model.modules() if {"forward", "_original_forward"} <= vars(m).keys()]
    forwards = [vars(m)["forward"] for m in wrapped]
    try:
        for module in wrapped:
            module.forward = vars(module)["_original_forward"]
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            module.forward = forward
