"""The model of sequence labelling: losses against every path there is, export, and training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from ernie.config import ErnieConfig
from ernie.tasks.sequence_labeling import NO_LABEL, SequenceLabelingProcessor
from ernie.tasks.sequence_labeling_model import SequenceLabelingModel
from ernie.tokenizing import WordPieceTokenizer
from propeller.data import Dataset, pad_batch
from propeller.errors import ConfigError
from propeller.metrics import compute_all
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.learner import Learner
from propeller.paddle.train.model import Batch, run_loss
from propeller.types import HParams, RunConfig, RunMode

# [PAD] stands last, so that padding with 0 shows.
TOKENS = ["[CLS]", "[SEP]", "[UNK]", *"abcdefgh", "##a", "##b", "[PAD]"]
TOKENIZER = WordPieceTokenizer({token: index for index, token in enumerate(TOKENS)})
LABELS = ["O", "B-X", "I-X"]
PROCESSOR = SequenceLabelingProcessor(TOKENIZER, LABELS, max_seqlen=8, scheme="BIO")
CONFIG = ErnieConfig(
    vocab_size=len(TOKENS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16, initializer_range=0.3, pad_token_id=TOKENIZER.pad_token_id,
)  # fmt: skip
RAWS = [
    {"units": ["a", "b"], "labels": ["B-X", "I-X"]},
    {"units": ["abab", "\x00", "c", "d"], "labels": ["O", "O", "B-X", "O"]},
    {"units": list("abcdefgh"), "labels": ["O", "B-X", "I-X", "O"] * 2},
    {"units": ["\x00"], "labels": ["O"]},
]


def make(mode=RunMode.PREDICT, config=CONFIG, run_config=None, **hparams):
    paddle.seed(5)
    run_config = run_config or RunConfig(max_steps=20)
    model = SequenceLabelingModel(HParams(hparams), mode, run_config, config=config, processor=PROCESSOR)
    model.mode = mode
    if hparams.get("use_crf"):
        rng = np.random.default_rng(5)
        for table in model.head.tables():
            table.set_value(rng.normal(size=table.shape).astype(np.float32))
    return model


def columns_of(raws=RAWS):
    return pad_batch(PROCESSOR.prepare(raws), pad_values=PROCESSOR.pad_values)


def units_of(columns, array):
    """The entries of each row at the first tokens of its units."""
    return [array[row, columns["units"][row] >= 0] for row in range(len(array))]


def test_cross_entropy_of_the_units():
    model, columns = make(), columns_of()
    batch = Batch.of(model, columns)
    predictions = model(batch.features)
    assert list(predictions) == ["logits"] and predictions["logits"].shape == [5, 8, 3]
    total, weight = run_loss(model, predictions, batch)
    logits = np.concatenate(units_of(columns, predictions["logits"].numpy().astype(np.float64)))
    labels = np.concatenate(units_of(columns, columns["label"]))
    assert weight == len(labels) == 2 + 3 + 6 + 6
    expected = -log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].sum()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_likelihood_of_a_crf_is_that_among_all_paths():
    model, columns = make(use_crf=True), columns_of()
    batch = Batch.of(model, columns)
    predictions = model(batch.features)
    total, weight = run_loss(model, predictions, batch)
    transitions, start, end = (table.numpy().astype(np.float64) for table in model.head.tables())
    expected = 0.0
    logits = units_of(columns, predictions["logits"].numpy().astype(np.float64))
    for emissions, labels in zip(logits, units_of(columns, columns["label"]), strict=True):
        if not len(labels):
            continue
        scores = {
            path: start[path[0]]
            + end[path[-1]]
            + emissions[np.arange(len(path)), list(path)].sum()
            + sum(transitions[a, b] for a, b in itertools.pairwise(path))
            for path in itertools.product(range(3), repeat=len(labels))
        }
        expected += logsumexp(list(scores.values())) - scores[tuple(labels.tolist())]
    assert weight == 17
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_a_new_crf_is_as_none():
    plain, columns = make(), columns_of()
    chained = SequenceLabelingModel(
        HParams(use_crf=True), RunMode.PREDICT, RunConfig(max_steps=20), config=CONFIG, processor=PROCESSOR
    )
    for name, parameter in plain.named_parameters():
        dict(chained.named_parameters())[name].set_value(parameter)
    losses = []
    for model in (plain, chained):
        model.mode = RunMode.PREDICT
        batch = Batch.of(model, columns)
        losses.append(run_loss(model, model(batch.features), batch)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("use_crf", [False, True])
def test_a_batch_without_a_unit(use_crf):
    model = make(RunMode.TRAIN, use_crf=use_crf)
    batch = Batch.of(model, columns_of(RAWS[3:]))
    total, weight = run_loss(model, model(batch.features), batch)
    assert (total.item(), weight) == (0.0, 0.0)
    total.backward()


def test_gradients_of_a_crf_are_those_of_differences():
    model, columns = make(use_crf=True), columns_of()
    labels = paddle.to_tensor(columns["label"])
    logits = paddle.to_tensor(np.random.default_rng(0).normal(size=(*labels.shape, 3)).astype(np.float32))
    logits.stop_gradient = False
    model.head.loss(logits, labels).backward()
    size = 1e-2
    for tensor, place in [
        (logits, (1, 1, 2)),
        (logits, (2, 5, 0)),
        (model.head.transitions, (0, 1)),
        (model.head.start, (1,)),
        (model.head.end, (2,)),
    ]:
        values = tensor.numpy().copy()
        around = []
        for step in (size, -size):
            moved = values.copy()
            moved[place] += step
            tensor.set_value(moved)
            around.append(model.head.loss(logits, labels).item())
        tensor.set_value(values)
        slope = (around[0] - around[1]) / (2 * size)
        assert tensor.grad.numpy()[place] == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_tokens_without_a_label_get_no_gradient():
    model, columns = make(use_crf=True), columns_of()
    labels = columns["label"]
    logits = paddle.to_tensor(np.ones((*labels.shape, 3), np.float32))
    logits.stop_gradient = False
    model.head.loss(logits, paddle.to_tensor(labels)).backward()
    gradient = np.abs(logits.grad.numpy()).sum(axis=-1)
    assert (gradient[labels != NO_LABEL] > 0).all() and (gradient[labels == NO_LABEL] == 0).all()


@pytest.mark.parametrize("use_crf", [False, True])
def test_a_bundle_answers_as_the_model(use_crf, tmp_path):
    """In Paddle Inference, with oneDNN; alone or beside longer texts."""
    model, columns = make(use_crf=use_crf), columns_of()
    expected = {name: tensor.numpy() for name, tensor in model(Batch.of(model, columns).features).items()}
    export_bundle(tmp_path, model, columns, processor=PROCESSOR, metrics={})
    predictor = Predictor(tmp_path)
    names = [spec.name for spec in predictor.bundle.inputs]
    assert predictor.mode == "onednn" and predictor.bundle.ignores_padding
    assert names == ["input_ids", "token_type_ids"] + ["units"] * use_crf
    outputs = predictor.predict({name: columns[name] for name in names})
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, atol=1e-4)
    if use_crf:
        table = np.vstack([each.numpy() for each in model.head.tables()])
        np.testing.assert_allclose(outputs["transitions"], np.stack([table] * 5), atol=1e-6)
        assert (outputs["is_unit"] == (columns["units"] >= 0)).all()
    processor = predictor.bundle.processor()
    together = processor.finish(outputs)
    examples = [example for found in processor.windows(RAWS) for example in found]
    for example, part in zip(examples, together, strict=True):
        (alone,) = processor.finish(predictor.predict({name: example[name][None] for name in names}))
        places = np.flatnonzero(example["units"] >= 0)
        assert [alone["labels"][place] for place in places] == [part["labels"][place] for place in places]
        chances = [[each["probabilities"][place] for place in places] for each in (alone, part)]
        assert chances[0] == pytest.approx(chances[1], abs=1e-5)


@pytest.mark.parametrize(
    "hparams",
    [{}, {"use_crf": 1}, {"use_crf": True, "recompute": True}, {"freeze": "head.start", "use_crf": True}],
    ids=["plain", "crf", "recompute", "frozen table"],
)
def test_learns_and_evaluates_by_whole_texts(hparams, tmp_path):
    """Until every entity of the training texts is found, those that are read in windows too."""
    run_config = RunConfig(model_dir=str(tmp_path), max_steps=40, eval_steps=40, device="cpu")
    rate = {"learning_rate": 0.01, "warmup_proportion": 0.0, "lr_schedule": "constant"}

    def factory(hparams, mode, run_config):
        config = ErnieConfig(**{**CONFIG.to_dict(), "hidden_dropout_prob": 0.0})
        return SequenceLabelingModel(hparams, mode, run_config, config=config, processor=PROCESSOR)

    learner = Learner(factory, run_config, HParams({**rate, **hparams}))
    batches = Dataset.from_list(PROCESSOR.prepare(RAWS)).padded_batch(3, pad_values=PROCESSOR.pad_values)
    learner.train(batches.repeat(), eval_datasets={"dev": batches})
    results = learner.evaluate(batches)
    assert results["f1"] == results["precision"] == results["recall"] == 1.0
    assert results["loss"] < 0.1 and results["n"] == 5


def test_evaluation_is_what_a_bundle_gives(tmp_path):
    """The metric over batches of the live model, and the answers of the bundle's processor scored."""
    model = make(use_crf=True)
    columns = columns_of()
    export_bundle(tmp_path, model, columns, processor=PROCESSOR, metrics={})
    metrics = model.metrics()
    outputs = {name: tensor.numpy() for name, tensor in model(Batch.of(model, columns).features).items()}
    for metric in metrics.values():
        metric.update(outputs, columns["label"], columns)
    predictor = Predictor(tmp_path)
    processor = predictor.bundle.processor()
    answers = []
    for raw, examples in zip(RAWS, processor.windows(RAWS), strict=True):
        rows = [
            predictor.predict({spec.name: example[spec.name][None] for spec in predictor.bundle.inputs})
            for example in examples
        ]
        answers.append(processor.join(raw, examples, [processor.finish(row)[0] for row in rows]))
    (entities,) = metrics.values()
    found = entities.answers()[1]
    assert [each["tags"] for each in found] == [each["tags"] for each in answers]
    assert compute_all(metrics).keys() == {"f1", "precision", "recall"}


class TestSettings:
    def test_the_tables_learn_at_a_rate_of_their_own(self):
        model = make(RunMode.TRAIN, use_crf=True, learning_rate=1e-4, crf_learning_rate=2e-3, layer_decay=0.5)
        model.optimizer()
        rates = {name: p.optimize_attr["learning_rate"] for name, p in model.named_parameters()}
        assert {name for name, rate in rates.items() if rate == pytest.approx(20)} == {
            "head.transitions",
            "head.start",
            "head.end",
        }
        assert rates["head.classifier.weight"] == 1 and rates["encoder.layers.0.ffn.up.weight"] == 0.5

    def test_a_resume_keeps_the_crf(self):
        assert make(use_crf=1).identity["use_crf"] is True and make().identity["use_crf"] is False

    @pytest.mark.parametrize(
        ("hparams", "message"),
        [
            ({"use_crf": "yes"}, "use_crf must be true or false, got 'yes'"),
            ({"crf_learning_rate": 0}, "crf_learning_rate must be a number above 0, got 0"),
            ({"crf_learning_rate": float("nan")}, "crf_learning_rate must be a number above 0"),
            ({"r_drop": 1.0}, "no R-Drop"),
        ],
    )
    def test_bad_settings(self, hparams, message):
        with pytest.raises(ConfigError, match=message):
            make(**hparams)
