"""Losses of the classification model: any number of labels, and weights of classes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, log_expit, log_softmax

from ernie.config import ErnieConfig
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tokenizing import load_tokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.model import Batch, run_loss
from propeller.types import HParams, RunConfig, RunMode

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "is", "it"]
TEXTS = ("good", "it is bad", "is")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return load_tokenizer(None, vocab_file=path)


@pytest.fixture
def make(tokenizer):
    """`make(labels, labels of TEXTS, **hparams)` gives a model and a batch."""

    def build(labels, truth, mode=RunMode.EVAL, separator=None, dropout=0.0, **hparams):
        paddle.seed(3)
        config = ErnieConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            initializer_range=0.3,
            hidden_dropout_prob=dropout,
        )
        processor = ClassificationProcessor(
            tokenizer, labels, max_seqlen=12, pair=False, label_separator=separator
        )
        model = ClassificationModel(
            HParams(hparams), mode, RunConfig(max_steps=20), config=config, processor=processor
        )
        model.mode = mode
        raws = [{"text_a": text, "label": label} for text, label in zip(TEXTS, truth, strict=True)]
        batch = Batch.of(model, pad_batch(processor.prepare(raws), pad_values=processor.pad_values))
        return model, batch

    return build


def losses_of(model, batch):
    predictions = model(batch.features)
    total, weight = run_loss(model, predictions, batch)
    return total.item(), weight, {name: value.numpy() for name, value in predictions.items()}


class TestClassWeights:
    def test_weighted_cross_entropy(self, make):
        model, batch = make(["0", "1", "2"], "201", class_weights=[0.5, 2.0, 3.0])
        total, weight, predictions = losses_of(model, batch)
        nll = -log_softmax(predictions["logits"].astype(np.float64), -1)[range(3), [2, 0, 1]]
        assert weight == pytest.approx(5.5)
        assert total == pytest.approx((nll * [3.0, 0.5, 2.0]).sum(), rel=1e-5)

    def test_ones_change_nothing(self, make):
        plain, weighted = (
            losses_of(*make(["0", "1"], "101", **given)) for given in ({}, {"class_weights": [1, 1]})
        )
        assert weighted[:2] == pytest.approx(plain[:2])

    def test_are_no_parameters(self, make):
        plain, weighted = (make(["0", "1"], "101", **given)[0] for given in ({}, {"class_weights": [1, 2]}))
        assert plain.state_dict().keys() == weighted.state_dict().keys()

    def test_with_r_drop(self, make):
        given = {"mode": RunMode.TRAIN, "dropout": 0.5, "r_drop": 0.7, "class_weights": [0.5, 2.0]}
        total, weight, predictions = losses_of(*make(["0", "1"], "101", **given))
        first, second = (
            log_softmax(predictions[name].astype(np.float64), -1) for name in ("logits", "second_logits")
        )
        apart = ((np.exp(first) - np.exp(second)) * (first - second)).sum() / 2
        weights = np.array([2.0, 0.5, 2.0])
        nll = -(first + second)[range(3), [1, 0, 1]]
        assert weight == pytest.approx(4.5) and apart > 0.01
        assert total == pytest.approx(((nll * weights).sum() + 0.7 * apart * 4.5 / 3) / 2, rel=1e-5)

    @pytest.mark.parametrize("given", [[1.0], "balanced", [1.0, "2"]])
    def test_what_was_not_resolved(self, make, given):
        with pytest.raises(ConfigError, match="a number for each of the 2 labels"):
            make(["0", "1"], "101", class_weights=given)


class TestManyLabels:
    TRUTH = (["a", "c"], [], ["b"])
    HOT = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])

    def test_binary_cross_entropies(self, make):
        model, batch = make(["a", "b", "c"], self.TRUTH, separator=",")
        total, weight, predictions = losses_of(model, batch)
        logits = predictions["logits"].astype(np.float64)
        terms = -(self.HOT * log_expit(logits) + (1 - self.HOT) * log_expit(-logits))
        assert weight == 3
        assert total == pytest.approx(terms.sum() / 3, rel=1e-5)

    def test_weights_are_those_of_having_a_label(self, make):
        model, batch = make(["a", "b", "c"], self.TRUTH, separator=",", class_weights=[1.0, 4.0, 0.5])
        total, weight, predictions = losses_of(model, batch)
        logits = predictions["logits"].astype(np.float64)
        having = self.HOT * log_expit(logits) * [1.0, 4.0, 0.5]
        assert weight == 3
        assert total == pytest.approx(-(having + (1 - self.HOT) * log_expit(-logits)).sum() / 3, rel=1e-5)

    def test_with_r_drop(self, make):
        given = {"mode": RunMode.TRAIN, "dropout": 0.5, "r_drop": 0.7, "separator": ","}
        total, _, predictions = losses_of(*make(["a", "b", "c"], self.TRUTH, **given))
        first, second = (predictions[name].astype(np.float64) for name in ("logits", "second_logits"))
        apart = ((expit(first) - expit(second)) * (first - second)).sum() / 2 / 3
        plain = sum(
            -(self.HOT * log_expit(one) + (1 - self.HOT) * log_expit(-one)).sum() / 3
            for one in (first, second)
        )
        assert total == pytest.approx((plain + 0.7 * apart) / 2, rel=1e-5)

    def test_learns_and_is_exported(self, make, tmp_path):
        model, batch = make(
            ["a", "b", "c"],
            self.TRUTH,
            separator=",",
            mode=RunMode.TRAIN,
            learning_rate=0.02,
            warmup_proportion=0.0,
            class_weights=[1.0, 2.0, 1.0],
        )
        optimizer = model.optimizer()
        totals = []
        for _ in range(20):
            total, weight = run_loss(model, model(batch.features), batch)
            (total / weight).backward()
            optimizer.step()
            optimizer.clear_grad()
            totals.append(total.item())
        assert totals[-1] < 0.3 * totals[0]
        export_bundle(tmp_path, model, batch.columns, processor=model.processor, metrics={})
        predictor = Predictor(tmp_path)
        outputs = predictor.predict({spec.name: batch.columns[spec.name] for spec in predictor.bundle.inputs})
        answers = predictor.bundle.processor().finish(outputs)
        assert [answer["labels"] for answer in answers] == list(self.TRUTH)
