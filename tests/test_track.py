"""Curvature followed during training: the numbers of fresh calls, for fewer products, and nothing else changed."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from untouched import one_thread, untouched  # noqa: F401

import flatcore as fc

pytestmark = pytest.mark.usefixtures("one_thread")
TOL = 1e-4


def problem(layers=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), *layers, nn.Linear(12, 4)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(40, 8).double(), torch.randint(4, (40,)))


def descend(model, loss, data, optimizer):
    optimizer.zero_grad()
    loss(model(data[0]), data[1]).backward()
    optimizer.step()


def test_values_are_those_of_fresh_calls_for_fewer_products():
    model, loss, data = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    t = fc.track((model, loss, data), every=2, tol=TOL, optimizer=optimizer, seed=3, measures=["fisher_rao"])
    only_eigenvalue = fc.track((model, loss, data), every=2, tol=TOL, trace=False, seed=3)
    cold = warm = 0
    for step in range(9):
        row, alone = t.step(step), only_eigenvalue.step(step)
        assert (row is None) == (step % 2 != 0)
        if row is not None:
            objective = fc.Objective(model, loss, data)
            H = fc.Hessian(objective)
            fresh = fc.eigsh(H, 1, which="LA", tol=TOL, seed=3)
            # Two pairs with residuals r lie within r² / gap, and certainly r, of the same eigenvalue.
            bound = row["lambda_max_error"] + float(fresh.residuals[0])
            assert abs(row["lambda_max"] - float(fresh.values[0])) <= bound
            assert row["lambda_max"] == pytest.approx(
                float(torch.linalg.eigvalsh(H.to_dense())[-1]), abs=bound
            )
            assert row["trace"] == fc.trace(H, rtol=0.05, seed=3).value
            assert row["fisher_rao"] == fc.measures.fisher_rao(objective).value
            assert row["loss"] == pytest.approx(objective.loss(), rel=1e-14)
            assert row["threshold"] == pytest.approx(20)
            assert row["edge"] == pytest.approx(row["lambda_max"] / 20)
            if step:
                cold, warm = cold + fresh.matvecs, warm + alone["products"]
        descend(model, loss, data, optimizer)
    assert warm < cold
    assert t.columns["step"] == [0, 2, 4, 6, 8]


def test_a_step_changes_nothing():
    model, loss, data = problem([nn.BatchNorm1d(12), nn.Dropout(0.2)])
    model.train()
    model[2].eval()  # modes differ
    descend(model, loss, data, torch.optim.SGD(model.parameters(), lr=0.1))
    with untouched(model, *data):
        t = fc.track((model, loss, data), measures={"noisy": lambda objective: float(torch.randn(()))})
        t.step()
    model.eval()
    eval_mode = fc.track(fc.Objective(model, loss, data)).step()
    assert t.history[0]["trace"] == eval_mode["trace"]


def test_adam_is_followed_once_it_has_a_state():
    model, loss, data = problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    t = fc.track((model, loss, data), optimizer=optimizer, trace=False)
    first = t.step()
    assert math.isnan(first["edge"]) and "take a step first" in first["status"]
    for _ in range(3):
        descend(model, loss, data, optimizer)
        row = t.step()
    expected = fc.measures.edge_of_stability(t.objective, optimizer)
    assert row["threshold"] == pytest.approx(expected.details["threshold"])
    assert row["edge"] == pytest.approx(expected.value, rel=2e-3)
    assert row["status"] == "converged"


def test_a_step_size_of_zero_is_stable():
    model, loss, data = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    t = fc.track((model, loss, data), optimizer=optimizer, trace=False)
    assert t.step()["edge"] == 0
    optimizer.param_groups[0]["lr"] = 0.1
    assert t.step()["threshold"] == pytest.approx(20)


def test_what_was_not_reached_is_said():
    t = fc.track(problem(), trace=False, measures=["width"])
    assert t.step()["status"].startswith("width: no curvature")


def test_train_mode_of_the_objective_is_kept():
    model, loss, data = problem([nn.BatchNorm1d(12)])
    model.train()
    t = fc.track(fc.Objective(model, loss, data, allow_train_mode=True))
    expected = fc.trace(fc.Hessian(t.objective), rtol=0.05).value
    model.eval()
    assert t.step()["trace"] == expected


def test_divergence_is_recorded_not_raised():
    model, loss, data = problem()
    t = fc.track((model, loss, data))
    t.step()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(fc.errors.FlatcoreWarning, match="step 1"):
        row = t.step()
    assert math.isnan(row["lambda_max"]) and math.isnan(row["trace"])
    assert "eigenvalues:" in row["status"]


def test_table_picture_and_json(tmp_path):
    from rich.console import Console

    model, loss, data = problem()
    t = fc.track((model, loss, data), eigenvalues=2, measures=["sam_sharpness"])
    for _ in range(2):
        t.step()
    t.to_json(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert [row["lambda_2"] for row in document["history"]] == t.columns["lambda_2"]
    console = Console(width=140)
    with console.capture() as capture:
        console.print(t.table())
    assert "sharpness" in capture.get() and "±" in capture.get()
    panels = [ax for ax in t.plot().axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == ["loss", "lambda_max", "lambda_2", "trace", "sam_sharpness"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every: expected"),
        ({"eigenvalues": 10_000}, ValueError, "eigenvalues: expected fewer than"),
        ({"measures": "fisher_roa"}, ValueError, "did you mean 'fisher_rao'"),
        ({"measures": 3}, TypeError, "measures: expected names or functions, got int"),
        ({"measures": [3]}, TypeError, "measures: expected names or functions, got int"),
        ({"measures": ["trace"]}, ValueError, "trace is a column already"),
        ({"measures": ["edge_of_stability"]}, ValueError, "track with an optimizer"),
        ({"measures": [lambda o: 1.0]}, ValueError, "expected a function with a name"),
        ({"measures": {"two": lambda a, b: 1.0}}, TypeError, "expected two to take the objective alone"),
        ({"optimizer": -0.1}, ValueError, "optimizer: expected"),
        ({"optimizer": "sgd"}, TypeError, "optimizer: expected a positive number, got 'sgd'"),
    ],
)
def test_wrong_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        fc.track(problem(), **arguments)


def test_wrong_objectives_and_optimizers():
    model, loss, data = problem()
    with pytest.raises(TypeError, match=r"objective: expected a flatcore.Objective or"):
        fc.track(model)
    with pytest.raises(TypeError, match="got another tuple"):
        fc.track((model, loss))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected an optimizer of the selected parameters"):
        fc.track((model, loss, data), optimizer=other)
    with pytest.raises(TypeError, match="expected text to give a number"):
        fc.track((model, loss, data), measures={"text": lambda o: "high"}).step()
    with pytest.raises(ValueError, match="call step"):
        fc.track((model, loss, data)).plot()


def test_transformers_stays_out_until_asked_for():
    code = "import sys, flatcore; assert 'transformers' not in sys.modules; assert not hasattr(flatcore, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)


class Trainer:
    """What a Trainer of transformers does with callbacks: its own handler, state, control and log."""

    def __init__(self, model, optimizer):
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import CallbackHandler

        self.handler = CallbackHandler([], model, None, optimizer, None)
        self.state, self.control = TrainerState(), TrainerControl()

    def log(self, logs):
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def fire(self, event):
        self.handler.call_event(event, None, self.state, self.control)


@pytest.mark.parametrize("through_log", [True, False])
def test_callback_of_a_trainer(through_log):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    model, loss, data = problem([nn.Dropout(0.5)])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer)
    t = fc.track((model, loss, data), every=2)
    callback = t.trainer_callback(trainer if through_log else None, edge_of_stability=True)
    assert isinstance(callback, fc.TrackCallback)
    trainer.handler.add_callback(callback)
    trainer.fire("on_train_begin")
    for _ in range(3):
        descend(model, loss, data, optimizer)
        trainer.state.global_step += 1
        with untouched(model, *data):
            trainer.fire("on_step_end")
    trainer.fire("on_train_end")
    assert [row["step"] for row in t.history] == [0, 2, 3]
    logged = trainer.state.log_history
    assert [entry["step"] for entry in logged] == [0, 2, 3]
    assert [entry["flatness/lambda_max"] for entry in logged] == t.columns["lambda_max"]
    assert "flatness/edge" not in logged[0] and "flatness/edge" in logged[1]


def test_callback_with_wrong_arguments():
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    model, loss, data = problem()
    t = fc.track((model, loss, data))
    with pytest.raises(TypeError, match=r"tracker: expected what flatcore.track gives, got int"):
        fc.TrackCallback(3)
    with pytest.raises(TypeError, match=r"trainer: expected a transformers.Trainer, got int"):
        t.trainer_callback(3)
    trainer = Trainer(nn.Linear(2, 2), None)
    trainer.handler.add_callback(t.trainer_callback(trainer))
    with pytest.raises(ValueError, match=r"make it with trainer.model"):
        trainer.fire("on_train_begin")
