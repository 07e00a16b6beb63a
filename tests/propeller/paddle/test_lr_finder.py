"""The learning-rate trial: what it suggests, when it ends, and that it leaves no trace."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.types import RunMode


@pytest.fixture
def trial(toy, run_config, train_data):
    """`trial(...)` makes one with a new learner."""

    def run(model=toy, data=train_data, hparams=None, **settings):
        config = run_config(micro_batches=settings.pop("micro_batches", 1))
        return propeller.Learner(model, config, hparams).find_learning_rate(data, **settings)

    return run


def next_numbers():
    """What the three generators give next."""
    return paddle.rand([3]).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


class WithBuffers(paddle.nn.Layer):
    """A batch norm, whose running mean every step changes."""

    def __init__(self):
        super().__init__()
        self.inner = paddle.nn.BatchNorm1D(16)

    def forward(self, inputs):
        return self.inner(inputs)


# Paddle's word on every forward of a batch norm.
@pytest.mark.filterwarnings("ignore:When training, we now always track global mean")
@pytest.mark.parametrize("mode", [RunMode.TRAIN, RunMode.EVAL])
def test_it_leaves_no_trace(toy, run_config, train_data, weights_of, assert_same_bits, mode):
    class Buffered(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.norm = WithBuffers()

    config = run_config()
    learner = propeller.Learner(Buffered, config, {"dropout": 0.3})
    model = learner.model
    model.mode = mode
    before = weights_of(model)
    assert any("_mean" in name for name in before)
    tensors = {name: id(tensor) for name, tensor in model.state_dict().items()}
    generators = paddle.get_rng_state(), np.random.get_state(), random.getstate()
    expected = next_numbers()
    paddle.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    random.setstate(generators[2])
    found = learner.find_learning_rate(train_data, num_steps=40)
    assert next_numbers() == expected
    assert_same_bits(weights_of(model), before)
    assert {name: id(tensor) for name, tensor in model.state_dict().items()} == tensors
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.mode is mode and model.training is (mode is RunMode.TRAIN)
    assert not Path(config.model_dir).exists()
    assert np.ptp(found.losses) > 0.05, "else nothing was tried"


def test_a_run_after_it_is_the_run_without_it(toy, run_config, train_data, weights_of, assert_same_bits):
    weights = []
    for name in ("without", "with"):
        learner = propeller.Learner(toy, run_config(name, max_steps=5), {"dropout": 0.3})
        if name == "with":
            learner.find_learning_rate(train_data, num_steps=40)
        learner.train(train_data)
        weights.append(weights_of(learner.model))
    assert_same_bits(*weights)


def test_a_run_in_model_dir_is_left_alone(toy, run_config, train_data):
    config = run_config(max_steps=2)
    propeller.Learner(toy, config).train(train_data)

    def contents():
        files = sorted(path for path in Path(config.model_dir).rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = contents()
    propeller.Learner(toy, config).find_learning_rate(train_data, num_steps=10)
    assert contents() == before


def test_a_trace_is_removed_after_an_error_too(toy, run_config, train_data, weights_of, assert_same_bits):
    def explode(batch):
        raise RuntimeError("a bad row")

    learner = propeller.Learner(toy, run_config())
    before = weights_of(learner.model)
    seen = []

    def failing(step):
        step.backward()
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        step.update()
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        learner.find_learning_rate(train_data, step_strategy=failing)
    assert_same_bits(weights_of(learner.model), before)
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    with pytest.raises(DataError, match="a bad row"):
        learner.find_learning_rate(train_data.map(explode))


def test_it_suggests_what_learns(trial, toy, run_config, train_data, dev_data):
    found = trial(num_steps=100)
    assert 1e-3 < found.suggestion < 1.0
    losses = []
    for factor in (1e-3, 1.0):
        hparams = {"learning_rate": found.suggestion * factor}
        learner = propeller.Learner(toy, run_config(str(factor)), hparams)
        learner.train(train_data)
        losses.append(learner.evaluate(dev_data)["loss"])
    assert losses[1] < 0.5 < losses[0]


def test_the_rates_rise_evenly_on_a_log_scale(trial):
    found = trial(lowest=1e-5, highest=1e-1, num_steps=41)
    np.testing.assert_allclose(found.rates, np.logspace(-5, -1, 41), rtol=1e-9)
    assert len(found.losses) == 41
    best = int(np.argmin(found.losses))
    assert found.suggestion == pytest.approx(found.rates[best] / 10)


def test_micro_batches_try_the_same(trial):
    whole, parts = (trial(num_steps=20, micro_batches=count).losses for count in (1, 4))
    np.testing.assert_allclose(whole, parts, rtol=0, atol=1e-5)


def test_the_table(trial):
    lines = trial(num_steps=30).table(rows=5).splitlines()
    assert [float(line.split()[0]) for line in lines[1:6:4]] == [1e-7, 1.0]
    assert lines[0].split() == ["rate", "loss"] and len(lines) == 7
    assert lines[-1].startswith("suggested learning rate: 0.")
    assert len(trial(num_steps=10).table(rows=50).splitlines()) == 12, "never a row twice"


def sgd(model):
    return paddle.optimizer.SGD(0.1, parameters=model.parameters())


def test_it_stops_when_it_diverges(toy, trial):
    class Sgd(toy):
        optimizer = sgd

    found = trial(Sgd, highest=1e6, num_steps=100)
    assert 10 < len(found.rates) < 100
    assert found.losses[-1] > 4 * min(found.losses)
    assert found.suggestion < found.rates[-1] / 10


def test_it_diverges_early(toy, trial):
    """Before ten steps: the data is not to blame."""

    class Sgd(toy):
        optimizer = sgd

    found = trial(Sgd, lowest=1e3, highest=1e9)
    assert len(found.rates) < 10
    assert found.suggestion < 1e4


def test_a_loss_that_becomes_nan_ends_it(toy, trial):
    class Fragile(toy):
        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            return total * (np.nan if np.abs(self.out.bias.numpy()).max() > 0.01 else 1.0), weight

    found = trial(Fragile, num_steps=60)
    assert found.losses[-1] == np.inf and np.isfinite(found.losses[:-1]).all()
    assert found.suggestion < found.rates[-1]

    class Broken(toy):
        def loss(self, predictions, labels):
            return predictions["logits"].sum() * np.nan, 1

    with pytest.raises(NonFiniteLossError, match="loss of the first step is not finite"):
        trial(Broken)


@pytest.mark.parametrize("batches", [0, 1, 9])
def test_data_that_ends_early(trial, examples, batches):
    data = Dataset.from_list(examples(16 * batches, seed=1)).padded_batch(16)
    with pytest.raises(DataError, match=f"The data gave {batches} batches; .* needs 10 at least"):
        trial(data=data)


def test_data_that_ends_in_between_is_enough(trial, examples):
    data = Dataset.from_list(examples(16 * 12, seed=1)).padded_batch(16)
    assert len(trial(data=data).rates) == 12


@pytest.mark.parametrize(
    "settings",
    [
        {"lowest": 0.0},
        {"lowest": -1e-3},
        {"lowest": 1.0},
        {"lowest": 1e-2, "highest": 1e-3},
        {"num_steps": 9},
        {"lowest": float("nan")},
        {"highest": float("nan")},
    ],
    ids=str,
)
def test_rates_that_do_not_rise(trial, settings):
    with pytest.raises(ConfigError, match="needs 0 < lowest < highest and 10 steps at least, got"):
        trial(**settings)


def test_the_model_has_its_warm_start(toy, run_config, train_data, weights_of):
    source = {
        name: tensor + 1.0 for name, tensor in propeller.Learner(toy, run_config()).model.state_dict().items()
    }
    seen = []

    class Watched(toy):
        def forward(self, features):
            seen.append(self.out.bias.numpy().copy())
            return super().forward(features)

    learner = propeller.Learner(
        Watched, run_config(), warm_start_setting=propeller.WarmStartSetting(source=lambda: source)
    )
    learner.find_learning_rate(train_data, num_steps=10)
    np.testing.assert_array_equal(seen[0], source["out.bias"].numpy())
