"""The Paddle side of the tasks: settings of the training, and the classification model."""

from __future__ import annotations

import numpy as np
import pytest

from ernie.config import ErnieConfig
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.models import ClassificationModel, Training
from ernie.tokenizing import load_tokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.loop import plain_step
from propeller.paddle.train.model import Batch
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
    """`make(labels, **hparams)` gives a model and its processor."""

    def build(labels=("0", "1", "2"), mode=RunMode.PREDICT, **hparams):
        paddle.seed(3)
        config = ErnieConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_id,
        )
        processor = ClassificationProcessor(tokenizer, labels, max_seqlen=12, pair=False)
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
    assert model.inputs[0].pad_value == processor.tokenizer.pad_id == 7


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


def test_learns(make):
    model, processor = make(labels=("0", "1"), mode=RunMode.TRAIN, learning_rate=0.01, warmup_proportion=0.0)
    batch = batch_of(model, processor, ["good", "it is bad", "is good", "bad it"], [1, 0, 1, 0])
    optimizer = model.optimizer()
    losses = [plain_step(model, optimizer, batch) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


class TestTraining:
    def test_defaults_and_what_is_given(self):
        assert Training.of(HParams()) == Training()
        given = Training.of(HParams(learning_rate=1, lr_schedule="cosine", max_grad_norm=None, mine=3))
        assert given == Training(learning_rate=1, lr_schedule="cosine", max_grad_norm=None)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"learning_rate": "5e-5"}, "learning_rate must be a number, got '5e-5'"),
            ({"learning_rate": None}, "learning_rate must be a number, got None"),
            ({"weight_decay": True}, "weight_decay must be a number, got True"),
            ({"warmup_proportion": [0.1]}, r"warmup_proportion must be a number, got \[0.1\]"),
            ({"max_grad_norm": "x"}, "max_grad_norm must be a number, got 'x'"),
            ({"lr_schedule": 1}, "lr_schedule must be text, got 1"),
        ],
    )
    def test_wrong_types(self, given, message):
        with pytest.raises(ConfigError, match=message):
            Training.of(HParams(given))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"learning_rate": 0}, "learning_rate must be positive"),
            ({"warmup_proportion": 2}, "warmup_proportion must be between 0 and 1"),
            ({"lr_schedule": "linea"}, "Did you mean 'linear'"),
        ],
    )
    def test_wrong_values_show_when_the_optimizer_is_made(self, make, given, message):
        model, _ = make(**given)
        with pytest.raises(ConfigError, match=message):
            model.optimizer()
