"""FGM: the second pass really sees the moved table, and the step adds both gradients up."""

from __future__ import annotations

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import ConfigError, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.adversarial import Fgm
from propeller.paddle.train.step import plain_step


@pytest.fixture
def data(examples):
    return Dataset.from_list(examples(90, seed=1)).padded_batch(16).repeat()


@pytest.fixture
def watched(toy):
    """The toy model, with SGD, that keeps the table of each forward pass in training."""

    class Watched(toy):
        tables: list = []

        def forward(self, features):
            if self.training:
                self.tables.append(self.table.weight.numpy().copy())
            return super().forward(features)

        def optimizer(self):
            return paddle.optimizer.SGD(0.1, parameters=self.parameters())

    Watched.tables = []
    return Watched


def test_one_step_by_the_formula(watched, run_config, data, weights_of):
    """`table + epsilon * g / |g|` in the second pass; the update has the gradients of both."""
    gradients, losses = [], []

    class Spy:
        """Reads the gradient after each backward pass."""

        def __init__(self, step):
            self._step = step

        def __getattr__(self, name):
            return getattr(self._step, name)

        def backward(self):
            losses.append(self._step.backward())
            gradients.append({name: p.grad.numpy().copy() for name, p in self._step.parameters.items()})
            return losses[-1]

    fgm = Fgm("table.*", epsilon=0.7)
    learner = propeller.Learner(watched, run_config(max_steps=1))
    before = weights_of(learner.model)
    learner.train(data, step_strategy=lambda step: fgm(Spy(step)))
    first, second = watched.tables
    np.testing.assert_array_equal(first, before["table.weight"])
    moved = gradients[0]["table.weight"]
    np.testing.assert_allclose(second, first + 0.7 * moved / np.linalg.norm(moved), rtol=0, atol=1e-6)
    assert np.linalg.norm(second - first) == pytest.approx(0.7, rel=1e-5)
    assert losses[1] > losses[0], "the worst direction"
    for name, array in weights_of(learner.model).items():
        np.testing.assert_allclose(array, before[name] - 0.1 * gradients[1][name], rtol=0, atol=1e-6)
        assert (gradients[1][name] != gradients[0][name]).any(), "the second pass adds its own"


def test_the_loss_is_that_of_the_first_pass(toy, run_config, data, recorder):
    """So that curves with and without it can be compared: the first step's is the same."""
    first = []
    for name, strategy in (("plain", plain_step), ("fgm", Fgm("table.*"))):
        hook = recorder()
        learner = propeller.Learner(toy, run_config(name, max_steps=1))
        learner.train(data, hooks=[hook], step_strategy=strategy)
        first.append(hook.results[0])
    assert first[0] == first[1]


def test_micro_batches_make_the_same_update(toy, run_config, data, weights_of, recorder):
    weights, losses = [], []
    for parts in (1, 3):
        hook = recorder()
        config = run_config(str(parts), max_steps=10, micro_batches=parts)
        learner = propeller.Learner(toy, config)
        learner.train(data, step_strategy=Fgm("table.*", 0.5), hooks=[hook])
        weights.append(weights_of(learner.model))
        losses.append([result.loss for result in hook.results])
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-6)
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], rtol=0, atol=1e-6, err_msg=name)


def test_a_table_without_a_gradient_stays_where_it_is(toy, run_config, data, weights_of, assert_same_bits):
    class Unused(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.other = paddle.nn.Embedding(5, 3)

    learner = propeller.Learner(Unused, run_config(max_steps=2))
    before = weights_of(learner.model)["other.weight"]
    learner.train(data, step_strategy=Fgm("other.weight"))
    np.testing.assert_array_equal(weights_of(learner.model)["other.weight"], before)


def test_several_tables_move_each_by_itself(toy, run_config, data):
    seen = []

    class Two(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.second_table = paddle.nn.Embedding(50, 16)

        def forward(self, features):
            if self.training:
                seen.append([t.weight.numpy().copy() for t in (self.table, self.second_table)])
            features = dict(features)
            logits = super().forward(features)["logits"]
            return {"logits": logits + self.out(self.second_table(features["input_ids"]).mean(1))}

    propeller.Learner(Two, run_config(max_steps=1)).train(data, step_strategy=Fgm("*table.weight", 0.25))
    for before, after in zip(*seen, strict=True):
        assert np.linalg.norm(after - before) == pytest.approx(0.25, rel=1e-5)


def test_an_error_in_the_second_pass_puts_the_table_back(toy, run_config, data, weights_of, assert_same_bits):
    class Fragile(toy):
        calls = 0

        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            self.calls += 1
            return total * (np.nan if self.calls == 4 else 1.0), weight

    learner = propeller.Learner(Fragile, run_config("fragile", max_steps=5))
    with pytest.raises(NonFiniteLossError, match="at step 2 "):
        learner.train(data, step_strategy=Fgm("table.*"))
    undisturbed = propeller.Learner(toy, run_config("undisturbed", max_steps=5, run_steps=1))
    undisturbed.train(data, step_strategy=Fgm("table.*"))
    assert_same_bits(weights_of(learner.model), weights_of(undisturbed.model))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_an_epsilon_that_moves_nothing(epsilon):
    with pytest.raises(ConfigError, match="FGM needs an epsilon above 0, got"):
        Fgm("*", epsilon)


def test_a_pattern_that_fits_nothing(toy, run_config, data):
    message = r"FGM moves the parameters 'tabel.\*', but no trained one is called so"
    with pytest.raises(ConfigError, match=message):
        propeller.Learner(toy, run_config()).train(data, step_strategy=Fgm("tabel.*"))

    class Frozen(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.table.weight.stop_gradient = True

    with pytest.raises(ConfigError, match=r"FGM moves the parameters 'table.\*'"):
        propeller.Learner(Frozen, run_config("frozen")).train(data, step_strategy=Fgm("table.*"))
