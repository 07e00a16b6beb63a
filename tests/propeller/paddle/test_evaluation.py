"""Evaluation, prediction and the loss that a model returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import CheckpointError, ConfigError, DataError
from propeller.metrics import Acc, Metric
from propeller.paddle.runtime import paddle
from propeller.types import RunMode

# Weights that are random on purpose: nothing of nothing is loaded.
RANDOM = propeller.WarmStartSetting(dict, predicate=lambda name: False)


def test_modes_are_put_back_after_an_error(toy, run_config, dev_data):
    learner = propeller.Learner(toy, run_config(), None, RANDOM)
    broken = dev_data.map(lambda batch: {"x": batch["label"]})
    for use in (lambda: learner.evaluate(broken), lambda: list(learner.predict(broken))):
        with pytest.raises(DataError, match=r"has the columns \['x'\].*missing: \['input_ids'\]"):
            use()
        assert learner.model.mode is RunMode.TRAIN and learner.model.training


def test_evaluation_data_that_cannot_be_used(toy, run_config, train_data, dev_data):
    learner = propeller.Learner(toy, run_config(), None, RANDOM)
    with pytest.raises(DataError, match="The evaluation data gave no batch"):
        learner.evaluate(Dataset.from_list([]).padded_batch(2))
    unlabelled = dev_data.map(lambda batch: {"input_ids": batch["input_ids"]})
    with pytest.raises(DataError, match=r"no column \['label'\] to learn from; it has \['input_ids'\]"):
        learner.evaluate(unlabelled)
    with pytest.raises(DataError, match=r"no column \['label'\] to learn from"):
        learner.train(unlabelled)
    assert len(list(learner.predict(unlabelled))) == 100


def test_predictions_are_one_a_row_in_order(toy, run_config, train_data, dev_data, weights_of):
    config = run_config(max_steps=4, save_steps=2)
    learner = propeller.train_and_eval(toy, {}, config, train_data, dev_data)
    rows = list(learner.predict(dev_data))
    assert len(rows) == 100
    learner.model.mode = RunMode.PREDICT
    one_by_one = []
    for batch in dev_data:
        for ids in batch["input_ids"]:
            tensor = paddle.to_tensor(ids[ids > 0][None])
            one_by_one.append(learner.model({"input_ids": tensor})["logits"].numpy()[0])
    np.testing.assert_allclose([row["logits"] for row in rows], one_by_one, atol=1e-5)
    fresh = propeller.Learner(toy, config)
    for ckpt in (None, -1, 4):
        again = [row["logits"] for row in fresh.predict(dev_data, ckpt=ckpt)]
        np.testing.assert_array_equal(again, [row["logits"] for row in rows])
    assert fresh.evaluate(dev_data, ckpt=-1) == learner.evaluate(dev_data)
    assert fresh.evaluate(dev_data, ckpt=2) != learner.evaluate(dev_data)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3; it has \[2, 4\]"):
        fresh.evaluate(dev_data, ckpt=3)


def test_no_checkpoint_to_predict_with(toy, run_config, dev_data):
    with pytest.raises(CheckpointError, match="has no checkpoint. Train first"):
        next(propeller.Learner(toy, run_config()).predict(dev_data, ckpt=-1))


def test_a_lone_tensor_and_all_numeric_columns(toy, run_config, examples):
    """`inputs = None` hands every numeric column but the labels to `forward`; outputs are `logits`."""
    seen = set()

    class Plain(toy):
        inputs = None

        def forward(self, features):
            seen.update(features)
            return super().forward(features)["logits"]

        def loss(self, predictions, labels):
            return super().loss({"logits": predictions}, labels)

    data = Dataset.from_list([{**row, "weight": 1.5} for row in examples(32, seed=1)]).padded_batch(8)
    learner = propeller.train_and_eval(Plain, {}, run_config(max_steps=2), data, data)
    assert seen == {"input_ids", "weight"}
    assert list(next(learner.predict(data))) == ["logits"]


def test_a_scalar_loss_is_the_mean_over_the_examples(toy, run_config, train_data, dev_data, weights_of):
    class Scalar(toy):
        def loss(self, predictions, labels):
            return paddle.nn.functional.cross_entropy(predictions["logits"], labels)

    results, weights = [], []
    for name, model in (("pair", toy), ("scalar", Scalar)):
        config = run_config(name, max_steps=10)
        learner = propeller.train_and_eval(model, {}, config, train_data, dev_data)
        results.append(learner.evaluate(dev_data))  # the last batch is smaller than the others
        weights.append(weights_of(learner.model))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)
    assert results[0]["acc"] == results[1]["acc"]
    for key, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][key], atol=1e-5)


def test_evaluation_loss_divides_once_by_the_whole_weight(toy, run_config, dev_data):
    class Weighted(toy):
        def loss(self, predictions, labels):
            each = paddle.nn.functional.cross_entropy(predictions["logits"], labels, reduction="none")
            weight = 1.0 + 2.0 * labels.astype("float32")
            return (each * weight).sum(), weight.sum()

    learner = propeller.Learner(Weighted, run_config(), None, RANDOM)
    logits = np.stack([row["logits"] for row in learner.predict(dev_data)]).astype(np.float64)
    labels = np.concatenate([batch["label"] for batch in dev_data])
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(100), labels]
    expected = np.average(each, weights=1 + 2 * labels)
    assert learner.evaluate(dev_data)["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_weight_is_an_error(toy, run_config, train_data):
    class Weightless(toy):
        def loss(self, predictions, labels):
            return super().loss(predictions, labels)[0], paddle.zeros([])

    message = r"^At step 1: The loss of a batch has the weight 0: there is nothing in it .*\. Leave out exa"
    with pytest.raises(DataError, match=message):
        propeller.Learner(Weightless, run_config()).train(train_data)
    with pytest.raises(DataError, match="^The evaluation data has a loss of the weight 0"):
        propeller.Learner(Weightless, run_config(), None, RANDOM).evaluate(train_data.take(1))


def test_of_several_sets_the_empty_one_is_named(toy, run_config, train_data, dev_data):
    sets = {"dev": dev_data, "held out": Dataset.from_list([]).padded_batch(2)}
    with pytest.raises(DataError, match="^The evaluation set 'held out' gave no batch"):
        propeller.Learner(toy, run_config(max_steps=1)).train(train_data, eval_datasets=sets)


def test_a_name_that_is_taken_is_refused_before_anything_is_run(toy, run_config, dev_data):
    class Clash(toy):
        def metrics(self):
            return {"acc": Acc(), "n": Acc()}

        def forward(self, features):
            raise AssertionError("nothing was to be run")

    with pytest.raises(ConfigError, match="A metric cannot be called 'n': every evaluation has that already"):
        propeller.Learner(Clash, run_config(), None, RANDOM).evaluate(dev_data)
    with pytest.raises(ConfigError, match="A metric cannot be called 'n'"):
        propeller.Learner(Clash, run_config()).train(dev_data, eval_datasets={"dev": dev_data})
    assert not Path(run_config().model_dir).exists()


def test_eval_max_steps_and_host_columns(toy, run_config, dev_data):
    texts = []

    class Watching(Metric):
        def reset(self):
            pass

        def update(self, predictions, labels, features):
            texts.extend(features["id"])
            assert len(labels) == len(predictions["logits"])

        def compute(self):
            return np.float32(0.5)  # as user code gives it; JSON knows no numpy

        def state(self):
            return {}

        def merge(self, state):
            pass

    class WithMetric(toy):
        def metrics(self):
            return {"watching": Watching()}

    learner = propeller.Learner(WithMetric, run_config(eval_max_steps=2), None, RANDOM)
    results = learner.evaluate(dev_data)
    assert results["n"] == len(texts) == 64
    assert texts[:2] == ["row 0", "row 1"]
    assert type(results["watching"]) is float
