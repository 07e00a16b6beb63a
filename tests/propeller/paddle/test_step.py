"""One update of the weights: parts of a batch against the whole of it, and the loss scale of float16."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import DataError, NonFiniteLossError
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle
from propeller.paddle.train import precision as precisions
from propeller.paddle.train.precision import Precision
from propeller.paddle.train.profiling import Profiler
from propeller.paddle.train.step import Step, micro_batches, plain_step

F = paddle.nn.functional
STEPS = 20


class Tagger(propeller.Model):
    """Tags tokens; the loss is divided by how many have a label, which differs from row to row."""

    inputs = (propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len")),)

    def __init__(self, hparams, mode, run_config):
        super().__init__(hparams, mode, run_config)
        self.table = paddle.nn.Embedding(50, 8, padding_idx=0)
        self.out = paddle.nn.Linear(8, 3)

    def forward(self, features):
        return self.out(self.table(features["input_ids"]))

    def loss(self, predictions, labels):
        total = F.cross_entropy(predictions.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, (labels != -100).sum()

    def optimizer(self):
        return paddle.optimizer.Adam(0.01, parameters=self.parameters())


def tagged(count: int, seed: int) -> list[dict]:
    """Rows of three to eleven tokens; every third row has no label at all."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(1, 50, size=rng.integers(3, 12), dtype=np.int64)
        labels = np.where(rng.random(len(ids)) < 0.7, ids % 3, -100)
        rows.append({"input_ids": ids, "label": np.full_like(ids, -100) if number % 3 == 1 else labels})
    return rows


@pytest.fixture
def learnt(run_config, recorder, weights_of):
    """`learnt(model, data, **config)` trains `STEPS` steps; returns results of each step and the weights."""

    def run(model, data, *, hparams=None, strategy=plain_step, **config):
        name = "-".join(["run", *map(str, config.values())])
        hook = recorder()
        learner = propeller.Learner(model, run_config(name, max_steps=STEPS, **config), hparams)
        learner.train(data, hooks=[hook], step_strategy=strategy)
        return hook.results, weights_of(learner.model)

    return run


def assert_equal_runs(one, other):
    """Losses, counts and weights of two runs, to 1e-6."""
    (results, weights), (other_results, other_weights) = one, other
    losses, other_losses = ([result.loss for result in both] for both in (results, other_results))
    assert len(losses) == STEPS and np.ptp(losses) > 0.05, "else nothing was learnt that could differ"
    np.testing.assert_allclose(losses, other_losses, rtol=0, atol=1e-6)
    for field in ("learning_rate", "num_examples", "num_tokens"):
        assert [getattr(r, field) for r in results] == [getattr(r, field) for r in other_results]
    for name, array in weights.items():
        np.testing.assert_allclose(array, other_weights[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("parts", [3, 16])
def test_parts_of_a_batch_are_the_whole_batch(toy, learnt, examples, parts):
    """Batches of 16 and, at the end of each pass, of 10; with 16 parts those leave some without a row."""
    data = Dataset.from_list(examples(90, seed=1)).padded_batch(16).repeat()
    whole, cut = (learnt(toy, data, micro_batches=count) for count in (1, parts))
    assert_equal_runs(whole, cut)
    assert {result.num_examples for result in whole[0]} == {16, 10}


def test_more_parts_than_rows(toy, learnt, examples):
    data = Dataset.from_list(examples(9, seed=3)).padded_batch(3).repeat()
    assert_equal_runs(learnt(toy, data, micro_batches=1), learnt(toy, data, micro_batches=8))


def test_losses_weighed_by_tokens(learnt):
    """A mean of the parts' means would be another loss: parts differ in how many labels they have."""
    data = Dataset.from_list(tagged(60, seed=1)).padded_batch(9, {"label": -100}).repeat()
    whole = learnt(Tagger, data, micro_batches=1)
    assert_equal_runs(whole, learnt(Tagger, data, micro_batches=3))


def test_a_part_of_weight_0_adds_nothing(learnt):
    """With three parts of batches of nine, all rows of the second part have no label."""
    rows = tagged(60, seed=1)
    parts = micro_batches_of(Dataset.from_list(rows).padded_batch(9, {"label": -100}), 3)
    assert [int((part["label"] != -100).sum()) > 0 for part in parts] == [True, False, True]
    nothing = [{**row, "label": np.full_like(row["label"], -100)} for row in rows]
    with pytest.raises(DataError, match="has the weight 0: there is nothing in it to learn from"):
        learnt(Tagger, Dataset.from_list(nothing).padded_batch(9, {"label": -100}), micro_batches=3)


def micro_batches_of(data, count):
    """The columns of the parts of the first batch."""
    columns = next(iter(data))
    return [{name: value[part::count] for name, value in columns.items()} for part in range(count)]


class Regular(Tagger):
    """Adds to the loss what belongs to rows that have no label, and so no weight."""

    def loss(self, predictions, labels):
        total, weight = super().loss(predictions, labels)
        return total + 0.01 * predictions.square().sum(), weight


def test_what_a_part_of_weight_0_adds_to_the_sum_is_learnt_from(learnt):
    data = Dataset.from_list(tagged(60, seed=1)).padded_batch(9, {"label": -100}).repeat()
    assert_equal_runs(learnt(Regular, data, micro_batches=1), learnt(Regular, data, micro_batches=3))


def test_a_mean_counts_by_its_examples(toy, learnt, examples):
    """A scalar loss is the mean over the rows; parts of 10 rows have 4, 3 and 3."""

    class Mean(toy):
        def loss(self, predictions, labels):
            return F.cross_entropy(predictions["logits"], labels)

    data = Dataset.from_list(examples(90, seed=1)).padded_batch(10).repeat()
    whole, cut = (learnt(Mean, data, micro_batches=count) for count in (1, 3))
    assert_equal_runs(whole, cut)
    assert_equal_runs(whole, learnt(toy, data, log_steps=5))


def test_parameters_that_only_some_parts_use(toy, learnt, examples):
    """A missing gradient counts as zero; a parameter that no part uses is left alone, also by decay."""

    class Rare(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.rare, self.never = (
                self.create_parameter([16], default_initializer=paddle.nn.initializer.Constant(1.0))
                for _ in range(2)
            )

        def forward(self, features):
            logits = super().forward(features)["logits"]
            long = (features["input_ids"] != 0).sum(1, keepdim=True) == 11
            if long.any():
                shift = self.rare.mean() * paddle.to_tensor([1.0, -1.0])
                logits = logits + long.astype("float32") * shift
            return {"logits": logits}

    data = Dataset.from_list(examples(90, seed=1)).padded_batch(16).repeat()
    whole, cut = (learnt(Rare, data, micro_batches=count) for count in (1, 4))
    assert_equal_runs(whole, cut)
    assert (cut[1]["rare"] != 1.0).all() and (cut[1]["never"] == 1.0).all()


def twice(step):
    """A strategy that learns twice from one batch."""
    step.backward()
    loss = step.backward()
    step.update()
    return loss


def test_a_strategy_may_call_backward_again(toy, learnt, examples):
    """Both gradients add up, in one part as in many: as with twice the loss."""

    class Sgd(toy):
        def optimizer(self):
            return paddle.optimizer.SGD(0.05 * self.hparams.get("rate", 1.0), parameters=self.parameters())

    data = Dataset.from_list(examples(90, seed=1)).padded_batch(16).repeat()
    plain = learnt(Sgd, data, hparams={"rate": 2.0})
    for parts in (1, 4):
        results, weights = learnt(Sgd, data, strategy=twice, micro_batches=parts)
        np.testing.assert_allclose([r.loss for r in results], [r.loss for r in plain[0]], rtol=0, atol=1e-6)
        for name, array in weights.items():
            np.testing.assert_allclose(array, plain[1][name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bad", [[1, 2, 3], 5, None])
def test_columns_without_the_same_rows(toy, learnt, examples, bad):
    data = Dataset.from_list(examples(90, seed=1)).padded_batch(16).map(lambda batch: {**batch, "more": bad})
    learnt(toy, data, log_steps=5)  # in one part nobody cuts it
    rows = len(bad) if isinstance(bad, list) else None
    with pytest.raises(
        DataError, match=rf"cut into 4 parts by its rows.*'more': {rows}.*expected the same number in all"
    ):
        learnt(toy, data, micro_batches=4)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_row_is_in_one_part_of_one_rank(toy, run_config, examples, size, count):
    model = propeller.Learner(toy, run_config()).model
    columns = next(iter(Dataset.from_list(examples(11, seed=1)).padded_batch(11)))
    parts = [micro_batches(model, columns, Ranks(rank, size), count) for rank in range(size)]
    assert sorted(row for rank in parts for part in rank for row in part.columns["id"]) == sorted(
        columns["id"]
    )
    assert sum(part.num_tokens for rank in parts for part in rank) == np.count_nonzero(columns["input_ids"])
    assert all(len(rank) <= count for rank in parts)
    sizes = [part.num_examples for rank in parts for part in rank]
    assert max(sizes) - min(sizes) <= 1 and 0 not in sizes


@pytest.fixture
def by_hand(toy, run_config, examples):
    """`by_hand(precision, parts)` gives a model, its optimizer, and a function that makes one update."""

    def make(precision, parts=1):
        model = propeller.Learner(toy, run_config()).model
        optimizer = model.optimizer()
        parameters = dict(model.named_parameters())
        columns = next(iter(Dataset.from_list(examples(11, seed=1)).padded_batch(11)))

        def update(strategy=plain_step):
            batches = micro_batches(model, columns, Ranks(), parts)
            return strategy(
                Step(
                    model, optimizer, parameters, batches,
                    ranks=Ranks(), precision=precision, profiler=Profiler(False),
                )
            )  # fmt: skip

        return model, optimizer, update

    return make


@pytest.fixture
def fp16(monkeypatch):
    """float16's loss scale without its casts, which Paddle does not make on a CPU and warns of."""
    monkeypatch.setattr(precisions._Fp16, "autocast", lambda self: contextlib.nullcontext())
    return precisions._Fp16()


@pytest.mark.parametrize("parts", [1, 3])
def test_the_loss_scale_changes_nothing(by_hand, fp16, weights_of, assert_same_bits, parts):
    """To the bit: it is a power of two."""
    runs = []
    for precision in (Precision("fp32"), fp16):
        model, _, update = by_hand(precision, parts)
        losses = {"losses": np.array([update() for _ in range(5)])}
        runs.append({**weights_of(model), **losses})
    assert_same_bits(*runs)
    assert fp16.state() == {"scale": precisions.INITIAL_SCALE, "good_steps": 5}


@pytest.mark.parametrize("parts", [1, 3])
def test_an_overflow_skips_the_update_and_halves_the_scale(
    by_hand, fp16, weights_of, assert_same_bits, parts
):
    model, optimizer, update = by_hand(fp16, parts)
    update()
    before = weights_of(model)
    moments = {key: value.numpy().copy() for key, value in optimizer.state_dict().items() if "moment" in key}

    def overflowing(step):
        loss = step.backward()
        gradient = step.parameters["out.weight"].grad
        gradient.copy_(paddle.full_like(gradient, np.inf), True)
        step.update()
        return loss

    assert np.isfinite(update(overflowing))
    assert fp16.state() == {"scale": precisions.INITIAL_SCALE / 2, "good_steps": 0}
    assert_same_bits(weights_of(model), before)
    assert moments.keys() and all((optimizer.state_dict()[k].numpy() == v).all() for k, v in moments.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    update()
    assert fp16.state() == {"scale": precisions.INITIAL_SCALE / 2, "good_steps": 1}
    assert any((weights_of(model)[name] != array).any() for name, array in before.items())


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loss_that_overflows_skips_the_update_as_well(
    by_hand, fp16, weights_of, assert_same_bits, monkeypatch, parts
):
    model, _, update = by_hand(fp16, parts)
    before, loss = weights_of(model), type(model).loss
    calls = []

    def first_is_infinite(self, predictions, labels):
        total, weight = loss(self, predictions, labels)
        calls.append(1)
        return (total * np.inf if len(calls) == 1 else total), weight

    monkeypatch.setattr(type(model), "loss", first_is_infinite)
    assert update() == np.inf
    assert_same_bits(weights_of(model), before)
    assert fp16.scale == precisions.INITIAL_SCALE / 2
    assert np.isfinite(update())
    assert any((weights_of(model)[name] != array).any() for name, array in before.items())


def test_without_a_scale_a_loss_that_is_not_finite_is_an_error(by_hand, monkeypatch):
    model, _, update = by_hand(Precision("fp32"))
    monkeypatch.setattr(
        type(model), "loss", lambda self, predictions, labels: (predictions["logits"].sum() / 0, 1)
    )
    with pytest.raises(FloatingPointError, match="The loss is (-?inf|nan)"):
        update()


def test_half_made_gradients_are_not_learnt_from(toy, run_config, examples, weights_of, assert_same_bits):
    """An error between two parts leaves the gradient of the first; the next run must not use it."""
    data = Dataset.from_list(examples(64, seed=1)).padded_batch(16).repeat()

    class Failing(toy):
        broken = False

        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            self.calls = getattr(self, "calls", 0) + 1
            return total * (np.nan if self.broken and self.calls == 2 else 1.0), weight

    learners = []
    for name in ("undisturbed", "disturbed"):
        learner = propeller.Learner(Failing, run_config(name, max_steps=3, micro_batches=4))
        if name == "disturbed":
            learner.model.broken = True
            with pytest.raises(NonFiniteLossError, match="at step 1 "):
                learner.train(data)
            learner.model.broken = False
        learner.train(data)
        learners.append(learner)
    assert_same_bits(*(weights_of(learner.model) for learner in learners))
