"""The callback in a real Trainer of transformers: its numbers come into the log, and training takes the same course."""

import json

import pytest
import torch
from untouched import one_thread  # noqa: F401

import flatcore as fc

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
pytest.importorskip("accelerate", reason="the package accelerate, which the Trainer needs, is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
CLOCK = ("runtime", "per_second")


def trainer(folder, **options):
    """A tiny BERT with dropout, four steps of two batches each, evaluated and logged."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
    )
    rows = [{"input_ids": torch.randint(20, (5,)), "labels": i % 3} for i in range(16)]
    every_step = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    rates = {"learning_rate": 1e-2, "warmup_steps": 1}
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(folder), **{**every_step, **rates, **accumulated, **quiet, **options}
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])


def tracked(own, through_log=True):
    rows = own.train_dataset
    batch = {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    t = fc.track((own.model, fc.hf_loss(), batch), every=2)
    own.add_callback(t.trainer_callback(own if through_log else None, edge_of_stability=True))
    return t


def logged_by_itself(own):
    """What the Trainer logs without a callback, but for times."""
    entries = [entry for entry in own.state.log_history if "flatness/loss" not in entry]
    return [{k: v for k, v in entry.items() if not any(word in k for word in CLOCK)} for entry in entries]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    own = trainer(tmp_path_factory.mktemp("alone"))
    own.train()
    return own


@pytest.mark.parametrize("through_log", [True, False])
def test_numbers_in_the_log_and_the_same_course(alone, tmp_path, through_log):
    own = trainer(tmp_path)
    t = tracked(own, through_log)
    own.train()
    assert all(map(torch.equal, own.model.state_dict().values(), alone.model.state_dict().values()))
    assert logged_by_itself(own) == logged_by_itself(alone)
    entries = [entry for entry in own.state.log_history if "flatness/loss" in entry]
    assert [entry["step"] for entry in entries] == t.columns["step"] == [0, 2, 4]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    for name in ("loss", "lambda_max", "trace", "edge"):
        assert [entry[f"flatness/{name}"] for entry in entries] == t.columns[name]
    # The schedule starts and ends at a step size of 0; Adam's threshold stands between.
    assert t.columns["edge"][0] == t.columns["edge"][2] == 0 < t.columns["edge"][1]
    rate = own.args.learning_rate * 2 / 3
    assert t.columns["threshold"][1] == pytest.approx(38 / rate)
    json.dumps(own.state.log_history, allow_nan=False)


def test_the_model_is_measured_in_its_own_precision(tmp_path):
    """Under mixed precision accelerate replaces the model's forward by one in bfloat16, whose products are no
    symmetric matrix's."""
    courses = []
    for with_callback in (False, True):
        own = trainer(tmp_path, bf16=True, max_steps=2, eval_strategy="no")
        t = tracked(own) if with_callback else None
        own.train()
        courses.append(own.model.state_dict())
    assert all(map(torch.equal, courses[0].values(), courses[1].values()))
    assert "_original_forward" in vars(own.model)
    same = transformers.BertForSequenceClassification(own.model.config)
    same.load_state_dict(own.model.state_dict())
    objective = fc.Objective(same.eval(), fc.hf_loss(), t.objective.data.again)
    assert t.columns["loss"][-1] == objective.loss()
    assert t.columns["trace"][-1] == fc.trace(fc.Hessian(objective), rtol=0.05).value


def test_a_second_training_goes_on(tmp_path):
    own = trainer(tmp_path, max_steps=1, eval_strategy="no")
    t = tracked(own)
    own.train()
    own.train()
    assert t.columns["step"] == [0, 1, 0, 1]
