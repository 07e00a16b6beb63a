"""The classification model: outputs, loss, R-Drop, frozen and slower layers, export."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import log_softmax

from ernie.config import ErnieConfig
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tokenizing import load_tokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.model import Batch, run_loss
from propeller.types import HParams, RunConfig, RunMode

# [PAD] stands last, so that padding with 0 shows.
VOCABULARY = ["[CLS]", "[SEP]", "[UNK]", "good", "bad", "is", "it", "[PAD]"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return load_tokenizer(None, vocab_file=path)


@pytest.fixture(scope="module")
def make(tokenizer):
    """`make(labels, sizes=..., **hparams)` gives a model and its processor."""

    def build(labels=("0", "1", "2"), mode=RunMode.PREDICT, sizes=(), max_seqlen=12, **hparams):
        paddle.seed(3)
        given = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 12,
            "initializer_range": 0.3,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = ErnieConfig(**{**given, **dict(sizes)})
        processor = ClassificationProcessor(tokenizer, labels, max_seqlen=max_seqlen, pair=False)
        run_config = RunConfig(max_steps=20)
        model = ClassificationModel(HParams(hparams), mode, run_config, config=config, processor=processor)
        model.mode = mode
        return model, processor

    return build


def batch_of(model, processor, texts, labels, dtype=np.int64):
    raws = [{"text_a": text, "label": dtype(label)} for text, label in zip(texts, labels, strict=True)]
    return Batch.of(model, pad_batch(processor.prepare(raws), pad_values=processor.pad_values))


def test_outputs_do_not_depend_on_neighbours_and_padding(make):
    model, processor = make()
    texts = ["good", "it is bad is it good", ""]
    together = model(batch_of(model, processor, texts, [0, 0, 0]).features)["logits"].numpy()
    assert together.shape == (3, 3) and together.dtype == np.float32
    alone = [model(batch_of(model, processor, [text], [0]).features)["logits"].numpy()[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert model.inputs[0].pad_value == processor.tokenizer.pad_token_id == 7


def test_cross_entropy_is_summed(make):
    model, processor = make()
    batch = batch_of(model, processor, ["good", "bad it", "is"], [2, 0, 1])
    predictions = model(batch.features)
    total, weight = model.loss(predictions, batch.labels["label"])
    logits = predictions["logits"].numpy().astype(np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - logits[range(3), [2, 0, 1]]
    assert weight == 3
    assert total.item() == pytest.approx(expected.sum(), rel=1e-5)


def test_regression_is_squared_error(make):
    model, processor = make(labels=None)
    batch = batch_of(model, processor, ["good", "bad it"], [1.5, -2.0], np.float32)
    predictions = model(batch.features)
    assert predictions["logits"].shape == [2, 1]
    total, weight = model.loss(predictions, batch.labels["label"])
    values = predictions["logits"].numpy()[:, 0].astype(np.float64)
    assert weight == 2
    assert total.item() == pytest.approx(((values - [1.5, -2.0]) ** 2).sum(), rel=1e-5)


def test_metrics_are_the_processors(make):
    assert list(make()[0].metrics()) == ["acc", "macro_f1"]
    assert list(make(labels=None)[0].metrics()) == ["pearson", "spearman"]


def train_step(model, optimizer, batch):
    total, weight = run_loss(model, model(batch.features), batch)
    mean = total / weight
    mean.backward()
    optimizer.step()
    optimizer.clear_grad()
    return mean.item()


@pytest.mark.parametrize(
    "hparams",
    [{}, {"r_drop": 1.0}, {"recompute": True}, {"layer_decay": 0.9}, {"freeze": "encoder.embeddings.*"}],
    ids=lambda given: next(iter(given), "plain"),
)
def test_learns(make, hparams):
    rate = {"learning_rate": 0.01, "warmup_proportion": 0.0}
    model, processor = make(labels=("0", "1"), mode=RunMode.TRAIN, **rate, **hparams)
    batch = batch_of(model, processor, ["good", "it is bad", "is good", "bad it"], [1, 0, 1, 0])
    optimizer = model.optimizer()
    losses = [train_step(model, optimizer, batch) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"warmup_proportion": 2}, "warmup_proportion must be between 0 and 1"),
        ({"lr_schedule": "linea"}, "Did you mean 'linear'"),
    ],
)
def test_wrong_values_show_when_the_optimizer_is_made(make, given, message):
    model, _ = make(**given)
    with pytest.raises(ConfigError, match=message):
        model.optimizer()


class TestRDrop:
    TEXTS = ("good", "it is bad", "is")

    def trained(self, make, labels=("0", "1", "2"), alpha=0.7):
        model, processor = make(labels=labels, mode=RunMode.TRAIN, r_drop=alpha)
        dtype = np.float32 if labels is None else np.int64
        return model, batch_of(model, processor, self.TEXTS, [1, 0, 2], dtype)

    def test_two_passes_in_training(self, make):
        model, batch = self.trained(make)
        predictions = model(batch.features)
        first, second = (predictions[name].numpy() for name in ("logits", "second_logits"))
        assert first.shape == second.shape == (3, 3)
        assert (np.abs(first - second).max(-1) > 1e-3).all(), "each example has two masks"

    @pytest.mark.parametrize("mode", [RunMode.EVAL, RunMode.PREDICT])
    def test_one_pass_elsewhere(self, make, mode):
        model, batch = self.trained(make)
        model.mode = mode
        predictions = model(batch.features)
        assert list(predictions) == ["logits"]
        plain, _ = make(mode=mode)
        np.testing.assert_array_equal(predictions["logits"].numpy(), plain(batch.features)["logits"].numpy())
        assert model.loss(predictions, batch.labels["label"])[0].item() == pytest.approx(
            plain.loss(predictions, batch.labels["label"])[0].item()
        )

    def test_the_rows_of_both_passes_are_the_examples(self, make):
        model, batch = self.trained(make)
        model.eval()  # without dropout, but RunMode.TRAIN
        predictions = model(batch.features)
        np.testing.assert_allclose(
            predictions["logits"].numpy(), predictions["second_logits"].numpy(), atol=1e-6
        )
        model.mode = RunMode.EVAL
        np.testing.assert_allclose(
            predictions["logits"].numpy(), model(batch.features)["logits"].numpy(), atol=1e-6
        )

    def test_half_of_the_papers_objective(self, make):
        model, batch = self.trained(make)
        predictions = model(batch.features)
        total, weight = model.loss(predictions, batch.labels["label"])
        p, q = (
            log_softmax(predictions[name].numpy().astype(np.float64), axis=-1)
            for name in ("logits", "second_logits")
        )
        nll = -sum(p[row, label] + q[row, label] for row, label in enumerate([1, 0, 2]))
        kl = ((np.exp(p) - np.exp(q)) * (p - q)).sum() / 2
        assert kl > 1e-3
        assert weight == 3
        assert total.item() == pytest.approx((nll + 0.7 * kl) / 2, rel=1e-5)

    def test_regression(self, make):
        model, batch = self.trained(make, labels=None)
        predictions = model(batch.features)
        total, weight = model.loss(predictions, batch.labels["label"])
        first, second = (
            predictions[name].numpy()[:, 0].astype(np.float64) for name in ("logits", "second_logits")
        )
        labels = np.array([1.0, 0.0, 2.0])
        errors = ((first - labels) ** 2 + (second - labels) ** 2 + 0.7 * (first - second) ** 2).sum()
        assert weight == 3
        assert total.item() == pytest.approx(errors / 2, rel=1e-5)

    def test_parts_of_a_batch_add_up(self, make):
        model, batch = self.trained(make)
        predictions, labels = model(batch.features), batch.labels["label"]
        whole, weight = model.loss(predictions, labels)
        parts = [
            model.loss({name: tensor[rows] for name, tensor in predictions.items()}, labels[rows])
            for rows in (slice(0, 1), slice(1, 3))
        ]
        assert sum(part.item() for part, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
        assert sum(part_weight for _, part_weight in parts) == weight == 3

    def test_needs_dropout(self, make):
        for sizes in ({"hidden_dropout_prob": 0.0}, {"attention_probs_dropout_prob": 0.0}):
            make(r_drop=1.0, sizes=sizes)
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        make(sizes=none)
        with pytest.raises(ConfigError, match="r_drop is 1.0, but there is no dropout.*or r_drop to 0"):
            make(r_drop=1.0, sizes=none)


def test_layers_learn_by_their_depth(make):
    model, _ = make(layer_decay=0.5, sizes={"num_hidden_layers": 2})
    model.optimizer()
    rates = {name: parameter.optimize_attr["learning_rate"] for name, parameter in model.named_parameters()}
    for name, rate in rates.items():
        top = name.split(".")[1]
        expected = {"embeddings": 0.125, "pooler": 1.0, "classifier": 1.0}.get(top)
        assert rate == (expected or {"0": 0.25, "1": 0.5}[name.split(".")[2]]), name
    assert {0.125, 0.25, 0.5, 1.0} == set(rates.values())


def test_frozen_parameters_stay_through_a_warm_start_and_training(make):
    pattern = ["encoder.embeddings.*", "encoder.layers.0.*"]
    model, processor = make(mode=RunMode.TRAIN, freeze=pattern, weight_decay=0.1, warmup_proportion=0.0)
    model.set_state_dict({name: tensor + 0.1 for name, tensor in model.state_dict().items()})
    start = {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}
    train_step(model, model.optimizer(), batch_of(model, processor, ["good", "bad"], [0, 1]))
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("encoder.embeddings.", "encoder.layers.0."))
        assert (parameter.numpy() == start[name]).all() == frozen, name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("encoder.embedings.*", r"'encoder.embedings.\*'.*Did you mean 'encoder.embeddings.\*'"),
        ("encoder.layers.1.*", r"Did you mean 'encoder.layers.0.\*'"),
        ("*", "nothing is left to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all(make, pattern, message):
    with pytest.raises(ConfigError, match=message):
        make(freeze=pattern)[0].optimizer()


def test_identity(make):
    kept = json.loads(json.dumps(make()[0].identity))
    passing = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "initializer_range": 0.1}
    assert kept == make(sizes=passing, learning_rate=1, r_drop=1)[0].identity
    assert kept["hidden_size"] == 16 and kept["labels"] == ["0", "1", "2"]
    others = {
        "hidden_size": make(sizes={"hidden_size": 8, "intermediate_size": 64}),
        "num_hidden_layers": make(sizes={"num_hidden_layers": 2}),
        "hidden_act": make(sizes={"hidden_act": "relu"}),
        "labels": make(labels=("0", "2", "1")),
        "max_seqlen": make(max_seqlen=11),
    }
    for key, (model, _) in others.items():
        assert [name for name in kept if kept[name] != model.identity[name]] == [key]
    assert make(labels=None)[0].identity["labels"] is None


def test_an_export_knows_nothing_of_training_options(make, tmp_path):
    model, processor = make(mode=RunMode.TRAIN, r_drop=1.0, recompute=True, freeze="encoder.embeddings.*")
    columns = batch_of(model, processor, ["good", "it is bad"], [0, 1]).columns
    export_bundle(tmp_path, model, columns, processor=processor, metrics={})
    assert model.mode is RunMode.TRAIN and model.encoder.recompute
    written = json.loads((tmp_path / "bundle.json").read_text("utf-8"))
    assert [output["name"] for output in written["outputs"]] == ["logits"]
