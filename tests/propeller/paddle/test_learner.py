"""The Learner and its loop: order of events, steps, modes, data, prediction."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    Interrupted,
    NonFiniteLossError,
    PropellerError,
)
from propeller.metrics import Acc
from propeller.paddle.runtime import paddle
from propeller.types import RunMode


class Notes(propeller.Exporter):
    """An exporter that writes down when it was called."""

    def __init__(self):
        self.began, self.steps, self.results = [], [], []

    def begin(self, state):
        self.began.append(state.step)

    def export(self, model, state, results, columns):
        assert model.mode is RunMode.TRAIN
        assert "input_ids" in columns
        self.steps.append(state.step)
        self.results.append(results)


def test_learns_the_toy_task(toy, run_config, train_data, dev_data):
    learner = propeller.train_and_eval(toy, {"dropout": 0.1}, run_config(), train_data, dev_data)
    results = learner.evaluate(dev_data)
    majority = max(np.mean([row for batch in dev_data for row in batch["label"]]), 0.5)
    assert majority < 0.75
    assert results["acc"] > 0.85
    assert results["loss"] < 0.4
    assert results["n"] == 100


def test_the_order_of_one_run(toy, run_config, train_data, dev_data, recorder):
    """The last step evaluates, saves and exports, though nothing is due there."""
    hook, notes = recorder(), Notes()
    state = propeller.Learner(toy, run_config(max_steps=5, eval_steps=2, save_steps=4)).train(
        train_data, eval_datasets={"dev": dev_data, "again": dev_data}, hooks=[hook], exporters=[notes]
    )
    step = [[("step_begin", number - 1), ("step_end", number)] for number in range(1, 6)]
    assert hook.events == [
        ("train_begin", 0, 5),
        *step[0],
        *step[1],
        ("eval_end", 2),
        *step[2],
        *step[3],
        ("eval_end", 4),
        ("checkpoint_saved", 4),
        *step[4],
        ("eval_end", 5),
        ("checkpoint_saved", 5),
        ("train_end", 5, None),
    ]
    assert (notes.began, notes.steps) == ([0], [2, 4, 5])
    assert list(notes.results[0]) == ["dev", "again"]
    assert notes.results[0]["dev"] == notes.results[0]["again"]
    assert (state.step, state.epoch, state.examples) == (5, 0, 80)
    ids = [row["input_ids"] for row, _ in zip(train_data, range(5), strict=False)]
    assert state.tokens == sum(np.count_nonzero(batch) for batch in ids)
    assert state.tokens < sum(batch.size for batch in ids), "padding must not count"


def test_the_export_comes_before_the_checkpoint_which_its_failure_does_not_prevent(
    toy, run_config, train_data, dev_data, recorder
):
    """Killed between the two, the step is evaluated once more; the other order would lose its best."""
    hook = recorder()

    class Failing(Notes):
        def export(self, model, state, results, columns):
            hook.events.append(("export", state.step))
            if state.step == 4:
                raise ExportError("no room")

    config = run_config(eval_steps=2, save_steps=2)
    with pytest.raises(ExportError, match="no room"):
        propeller.Learner(toy, config).train(
            train_data, eval_datasets={"dev": dev_data}, hooks=[hook], exporters=[Failing()]
        )
    shown = [event[:2] for event in hook.events if not event[0].startswith("step")]
    assert shown == [
        ("train_begin", 0),
        *[("export", 2), ("eval_end", 2), ("checkpoint_saved", 2)],
        *[("export", 4), ("checkpoint_saved", 4)],
        ("train_end", 4),
    ]
    # What failed is made up for before the next step.
    again, notes = recorder(), Notes()
    propeller.Learner(toy, run_config(max_steps=4, eval_steps=2, save_steps=2)).train(
        train_data, eval_datasets={"dev": dev_data}, hooks=[again], exporters=[notes]
    )
    assert notes.steps == again.steps_of("eval_end") == [4] and again.steps_of("step_end") == []


def test_the_batch_to_compare_exports_on_is_read_once(toy, run_config, train_data, dev_data):
    opened = []

    def batches():
        opened.append(1)
        yield from dev_data

    config = run_config(max_steps=6, eval_steps=2)
    notes = Notes()
    propeller.Learner(toy, config).train(
        train_data, eval_datasets={"dev": Dataset.from_generator_func(batches)}, exporters=[notes]
    )
    assert notes.steps == [2, 4, 6] and len(opened) == 3 + 1


def test_without_evaluation_sets_nothing_is_evaluated(toy, run_config, train_data, recorder):
    hook = recorder()
    config = run_config(max_steps=2, eval_steps=1)
    with pytest.raises(ConfigError, match="no evaluation set"):
        propeller.Learner(toy, config).train(train_data, exporters=[Notes()])
    propeller.Learner(toy, config).train(train_data, hooks=[hook])
    assert hook.steps_of("eval_end") == []
    assert hook.steps_of("checkpoint_saved") == [2]


def test_epochs_are_counted(toy, run_config, train_data, recorder):
    states = []
    hook = recorder(act=lambda event, state: states.append(state) if event == "step_end" else None)
    propeller.Learner(toy, run_config(max_steps=33)).train(train_data, hooks=[hook])
    assert [state.epoch for state in states] == [0] * 16 + [1] * 16 + [2]


def test_modes_switch_dropout_and_are_put_back(toy, run_config, train_data, dev_data):
    seen = []

    class Watched(toy):
        def forward(self, features):
            seen.append((self.mode, self.training, self.dropout.training))
            return super().forward(features)

    learner = propeller.Learner(Watched, run_config(max_steps=2, eval_steps=1), {"dropout": 0.5})
    learner.train(train_data, eval_datasets={"dev": dev_data})
    train, evaluation = (RunMode.TRAIN, True, True), (RunMode.EVAL, False, False)
    assert seen == [train, *[evaluation] * 4, train, *[evaluation] * 4]
    assert learner.model.mode is RunMode.TRAIN and learner.model.dropout.training
    assert learner.evaluate(dev_data) == learner.evaluate(dev_data)
    assert learner.model.dropout.training
    del seen[:]
    first, second = (np.stack([row["logits"] for row in learner.predict(dev_data)]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert set(seen) == {(RunMode.PREDICT, False, False)}
    assert learner.model.mode is RunMode.TRAIN and learner.model.dropout.training
    batch = {"input_ids": paddle.to_tensor(next(iter(dev_data))["input_ids"])}
    one, two = (learner.model(batch)["logits"].numpy() for _ in range(2))
    assert not np.array_equal(one, two), "in training dropout is on"


def test_run_steps_end_the_session_and_not_the_schedule(toy, run_config, train_data, recorder):
    config = run_config(run_steps=25)
    rates, reached = [], []
    for _ in range(4):
        hook = recorder()
        reached.append(propeller.Learner(toy, config).train(train_data, hooks=[hook]).step)
        rates += [result.learning_rate for result in hook.results]
    assert reached == [25, 50, 60, 60]
    np.testing.assert_allclose(rates, [0.01 * (1 - step / 60) for step in range(60)], rtol=1e-6)


def test_a_run_that_is_done_does_nothing(toy, run_config, train_data, dev_data, recorder):
    config = run_config(max_steps=4, eval_steps=2)
    propeller.train_and_eval(toy, {}, config, train_data, dev_data)
    before = (Path(config.model_dir) / "metrics.jsonl").read_bytes()
    hook, notes = recorder(), Notes()
    propeller.train_and_eval(toy, {}, config, train_data, dev_data, train_hooks=[hook], exporters=[notes])
    assert hook.events == [("train_begin", 4, 4), ("train_end", 4, None)]
    assert (notes.began, notes.steps) == ([4], [])
    assert (Path(config.model_dir) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("skip_steps", "due"), [(12, [15, 20]), (15, [15, 20]), (100, [20])])
def test_skip_steps(toy, run_config, train_data, dev_data, recorder, skip_steps, due):
    hook = recorder()
    config = run_config(max_steps=20, eval_steps=5, save_steps=5, skip_steps=skip_steps)
    propeller.train_and_eval(toy, {}, config, train_data, dev_data, train_hooks=[hook])
    assert hook.steps_of("eval_end") == hook.steps_of("checkpoint_saved") == due


def test_data_that_ends_ends_the_run(toy, run_config, examples, dev_data, recorder):
    data = Dataset.from_list(examples(70, seed=1)).padded_batch(16)
    config = run_config(max_steps=None)
    hook = recorder()
    learner = propeller.train_and_eval(toy, {}, config, data, dev_data, train_hooks=[hook])
    assert hook.steps_of("step_end") == [1, 2, 3, 4, 5]
    assert hook.steps_of("eval_end") == hook.steps_of("checkpoint_saved") == [5]
    assert hook.events[0] == ("train_begin", 0, None)
    hook = recorder()
    assert learner.train(data, eval_datasets={"dev": dev_data}, hooks=[hook]).step == 5
    assert hook.events == [("train_begin", 5, None), ("train_end", 5, None)]


@pytest.mark.parametrize(
    "data",
    [
        Dataset.from_list([]).padded_batch(4),
        Dataset.from_list([]).repeat().padded_batch(4),
        Dataset.from_list([{"input_ids": np.ones(2, np.int64), "label": 0}]).padded_batch(
            4, drop_remainder=True
        ),
    ],
    ids=["empty", "empty-repeated", "smaller-than-a-batch"],
)
def test_no_training_data_is_an_error(toy, run_config, data, recorder):
    hook = recorder()
    with pytest.raises(DataError):
        propeller.Learner(toy, run_config()).train(data, hooks=[hook])
    event, step, error = hook.events[-1]
    assert (event, step) == ("train_end", 0) and isinstance(error, DataError)


def test_an_error_of_the_reader_reaches_the_caller(toy, run_config, examples, recorder):
    def explode(row):
        if row["id"] == "row 40":
            raise RuntimeError("a bad row")
        return row

    data = Dataset.from_list(examples(64, seed=1)).map(explode).padded_batch(8).buffered(2)
    hook = recorder()
    with pytest.raises(DataError, match="a bad row"):
        propeller.Learner(toy, run_config()).train(data, hooks=[hook])
    assert 3 <= hook.steps_of("step_end")[-1] <= 5


def test_a_function_makes_the_model(toy, run_config, train_data):
    calls = []

    def make(hparams, mode, config):
        calls.append((dict(hparams), mode, config))
        return toy(hparams, mode, config)

    config = run_config(max_steps=1)
    learner = propeller.Learner(make, config, {"dropout": 0.25})
    learner.train(train_data)
    assert calls == [({"dropout": 0.25}, RunMode.TRAIN, config)]
    assert isinstance(learner.model, toy) and learner.model.dropout.p == 0.25
    with pytest.raises(ConfigError, match="returned Linear, expected a propeller Model"):
        propeller.Learner(lambda *_: paddle.nn.Linear(2, 2), config).train(train_data)


def test_metrics_file_of_a_run_and_its_resume(toy, run_config, train_data, dev_data, metrics_of, recorder):
    straight = run_config("straight")
    propeller.train_and_eval(toy, {}, straight, train_data, dev_data)
    lines = metrics_of(straight)
    assert [(line["event"], line["step"]) for line in lines] == [
        *[("train", 10), ("train", 20), ("eval", 20), ("train", 30), ("train", 40), ("eval", 40)],
        *[("train", 50), ("train", 60), ("eval", 60)],
    ]
    assert lines[0].keys() == {
        *["event", "step", "epoch", "loss", "learning_rate", "examples_per_s", "tokens_per_s"]
    }
    assert lines[0]["learning_rate"] == pytest.approx(0.01 * 51 / 60)
    assert lines[0]["examples_per_s"] > 0 and lines[0]["tokens_per_s"] > lines[0]["examples_per_s"]
    assert lines[2].keys() == {"event", "step", "dataset", "loss", "acc", "n"}
    assert (lines[2]["dataset"], lines[2]["n"]) == ("eval", 100)

    class Crash(Exception):
        pass

    def act(event, state):
        if event == "step_end" and state.step == 35:
            raise Crash

    resumed = run_config("resumed")
    learner = propeller.Learner(toy, resumed)
    with pytest.raises(Crash):
        learner.train(train_data, eval_datasets={"eval": dev_data}, hooks=[recorder(act=act)])
    assert metrics_of(resumed)[-1]["step"] == 30
    propeller.train_and_eval(toy, {}, resumed, train_data, dev_data)

    def without_speed(config):
        return [
            {key: value for key, value in line.items() if not key.endswith("_per_s")}
            for line in metrics_of(config)
        ]

    assert without_speed(resumed) == without_speed(straight)


def test_run_file_has_the_resolved_configuration(toy, run_config, train_data, caplog):
    config = run_config(max_steps=1, seed=5)
    with caplog.at_level("INFO", logger="propeller"):
        propeller.Learner(toy, config, {"dropout": 0.5, "label_weight": math.inf}).train(train_data)
    stored = json.loads((Path(config.model_dir) / "run.json").read_text("utf-8"))
    assert propeller.RunConfig.from_dict(stored["run_config"]) == config
    assert stored["hparams"] == {"dropout": 0.5, "label_weight": "Infinity"}
    assert stored["versions"].keys() == {"ernie-propeller", "paddle", "numpy", "python"}
    assert stored["versions"]["paddle"] == paddle.__version__
    assert stored["device"] == paddle.get_device()
    assert '"seed": 5' in caplog.text, "the resolved configuration is printed"


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seed_decides_everything(toy, run_config, train_data, weights_of, assert_same_bits, seed):
    weights, orders = [], []

    class Watched(toy):
        def forward(self, features):
            orders[-1].append(features["input_ids"].numpy().tolist())
            return super().forward(features)

    for name, used in (("a", seed), ("b", seed), ("c", seed ^ 1)):
        orders.append([])
        learner = propeller.Learner(Watched, run_config(name, max_steps=3, seed=used), {"dropout": 0.5})
        learner.train(train_data)
        weights.append(weights_of(learner.model))
    assert orders[0] == orders[1] != orders[2]
    assert_same_bits(weights[0], weights[1])
    assert not np.array_equal(weights[0]["out.weight"], weights[2]["out.weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    toy, run_config, train_data, recorder, bad, weights_of, assert_same_bits
):
    weights = {}

    class Exploding(toy):
        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            weights[self.steps] = weights_of(self)
            self.steps += 1
            return total * (bad if self.steps == 8 else 1.0), weight

        steps = 0

    hook = recorder()
    config = run_config(save_steps=5)
    learner = propeller.Learner(Exploding, config)
    with pytest.raises(NonFiniteLossError, match=r"at step 8 .*Last good checkpoint: .*step_00000005"):
        learner.train(train_data, hooks=[hook])
    assert hook.steps_of("step_end")[-1] == 7
    event, step, error = hook.events[-1]
    assert (event, step) == ("train_end", 7) and isinstance(error, NonFiniteLossError)
    checkpoints = Path(config.model_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000005"]
    assert_same_bits(weights_of(learner.model), weights[7])
    early = propeller.Learner(Exploding, run_config("early"))
    early.model.steps = 7
    with pytest.raises(NonFiniteLossError, match="at step 1 .*none was saved yet"):
        early.train(train_data)


def test_weights_that_are_not_finite_are_not_saved(toy, run_config, train_data, recorder):
    config = run_config(save_steps=2)
    learner = propeller.Learner(toy, config)

    def act(event, state):
        if event == "step_end" and state.step == 4:  # what an overflowing update would leave
            learner.model.out.bias.set_value(np.array([np.nan, 0], np.float32))

    with pytest.raises(NonFiniteLossError, match=r"After step 4 .* not finite: out\.bias"):
        learner.train(train_data, hooks=[recorder(act=act)])
    assert [path.name for path in (Path(config.model_dir) / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_model_dir_that_cannot_be_used(toy, run_config, train_data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PropellerError, match="file cannot be made or written"):
        propeller.Learner(toy, run_config("file")).train(train_data)


def test_a_short_run_logs_its_loss(toy, run_config, train_data, metrics_of):
    config = run_config(max_steps=3, log_steps=100)
    propeller.Learner(toy, config).train(train_data)
    assert [(line["event"], line["step"]) for line in metrics_of(config)] == [("train", 3)]


def test_random_weights_are_never_used_in_silence(toy, run_config, train_data, dev_data, tmp_path):
    fresh = propeller.Learner(toy, run_config())
    with pytest.raises(CheckpointError, match="has no checkpoint. Train first"):
        next(fresh.predict(dev_data))
    with pytest.raises(CheckpointError, match="Train first"):
        fresh.evaluate(dev_data)
    with pytest.raises(CheckpointError, match="Train first"):
        fresh.export(tmp_path / "bundle", dev_data)
    trained = propeller.Learner(toy, run_config())
    trained.train(train_data)
    live = trained.evaluate(dev_data)
    assert propeller.Learner(toy, run_config()).evaluate(dev_data) == live  # the newest checkpoint


def test_a_second_training_without_a_checkpoint_begins_anew(
    toy, run_config, train_data, dev_data, recorder, weights_of, assert_same_bits
):
    class Crash(Exception):
        pass

    def act(event, state):
        if event == "step_end" and state.step == 3:
            raise Crash

    for setting in (None, propeller.WarmStartSetting(dict, predicate=lambda name: False)):
        straight, failed = (run_config(f"{name} {setting is None}", max_steps=6) for name in ("a", "b"))
        undisturbed = propeller.Learner(toy, straight)
        undisturbed.train(train_data)
        learner = propeller.Learner(toy, failed, None, setting)
        model = learner.model
        if setting is not None:
            learner.evaluate(dev_data)
        with pytest.raises(Crash):
            learner.train(train_data, hooks=[recorder(act=act)])
        assert learner.model is model, "nothing was learnt before"
        assert learner.train(train_data).step == 6
        assert learner.model is not model
        assert_same_bits(weights_of(learner.model), weights_of(undisturbed.model))


def test_weights_of_a_checkpoint_that_is_gone_are_not_trained_on(
    toy, run_config, train_data, dev_data, weights_of, assert_same_bits
):
    config = run_config(max_steps=3)
    first = propeller.Learner(toy, config)
    first.train(train_data)
    learner = propeller.Learner(toy, config)
    learner.evaluate(dev_data)
    shutil.rmtree(config.model_dir)
    learner.train(train_data)
    assert_same_bits(weights_of(learner.model), weights_of(first.model))


def test_a_signal_cuts_an_evaluation_short_and_nothing_is_lost(
    toy, run_config, train_data, dev_data, recorder, metrics_of, weights_of, assert_same_bits
):
    """The evaluation is made up for on resume: the run ends like one that nobody disturbed."""
    evaluated = []

    def interrupting(batch):
        evaluated.append(1)
        if len(evaluated) == 6:  # in the second evaluation, of four batches each
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    sets = {"dev": dev_data}
    straight, disturbed = run_config("straight"), run_config("disturbed")
    undisturbed = propeller.Learner(toy, straight)
    undisturbed.train(train_data, eval_datasets=sets, exporters=[Notes()])
    with pytest.raises(Interrupted):
        propeller.Learner(toy, disturbed).train(
            train_data, eval_datasets={"dev": dev_data.map(interrupting)}, exporters=[Notes()]
        )
    assert len(evaluated) < 8, "the evaluation went on to its end"
    notes = Notes()
    resumed = propeller.Learner(toy, disturbed)
    resumed.train(train_data, eval_datasets=sets, exporters=[notes])
    assert notes.steps == [40, 60]
    assert_same_bits(weights_of(resumed.model), weights_of(undisturbed.model))
    evaluations = [[line for line in metrics_of(c) if line["event"] == "eval"] for c in (straight, disturbed)]
    assert evaluations[0] == evaluations[1]


def test_metrics_cannot_take_the_names_of_every_evaluation(toy, run_config, train_data, dev_data):
    class Clash(toy):
        def metrics(self):
            return {"loss": Acc()}

    with pytest.raises(ConfigError, match="cannot be called 'loss'"):
        propeller.Learner(Clash, run_config(max_steps=1)).train(train_data, eval_datasets={"dev": dev_data})


def test_a_start_that_does_nothing_is_not_remembered(toy, run_config, train_data, caplog):
    for max_steps in (4, 2, 4, 6):
        with caplog.at_level("INFO", logger="propeller"):
            propeller.Learner(toy, run_config(max_steps=max_steps)).train(train_data)
    assert sum("nothing to do" in message for message in caplog.messages) == 2
    (change,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert change.endswith("run_config.max_steps: 4 -> 6")


def test_what_changed_since_the_last_start_is_said(toy, run_config, train_data, caplog):
    propeller.Learner(toy, run_config(max_steps=2), {"dropout": 0.1}).train(train_data)
    with caplog.at_level("WARNING", logger="propeller"):
        propeller.Learner(toy, run_config(max_steps=3), {"dropout": 0.2}).train(train_data)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "changed since this run was last started: run_config.max_steps: 2 -> 3",
        "changed since this run was last started: hparams.dropout: 0.1 -> 0.2",
    ]
