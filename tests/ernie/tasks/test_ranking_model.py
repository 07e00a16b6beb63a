"""The ranking model: groups and rows give the same, losses, padding, export."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from ernie.config import ErnieConfig
from ernie.tasks.groups import Groups
from ernie.tasks.ranking import RankingProcessor, differ
from ernie.tasks.ranking_model import RankingModel
from ernie.tokenizing import load_tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.stream import answer_all
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.model import Batch, part_of, run_loss
from propeller.types import HParams, RunConfig, RunMode

COLUMNS = ("input_ids", "token_type_ids", "label")
RAWS = [
    {"qid": qid, "candidate": place, "text_a": query, "text_b": text, "label": label}
    for qid, query, passages in (
        ("1", "the cat", [("on the mat", 1), ("a dog ran", 0), ("a", 0)]),
        ("2", "a dog", [("the dog ran on a mat , un ##happy : a dog", 2), ("cat", 1)]),
        ("3", "passage", [("猫", 0), ("", 1)]),
    )
    for place, (text, label) in enumerate(passages)
]


@pytest.fixture(scope="module")
def make(bert_folder):
    """`make(loss, mode=..., **hparams)` gives a model without dropout, and its processor."""
    tokenizer = load_tokenizer(bert_folder)

    def build(loss, mode=RunMode.TRAIN, **hparams):
        paddle.seed(3)
        config = ErnieConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        processor = RankingProcessor(tokenizer, max_seqlen=24, loss=loss)
        hparams = HParams({"loss": loss, **hparams})
        model = RankingModel(hparams, mode, RunConfig(max_steps=9), config=config, processor=processor)
        model.mode = mode
        return model, processor

    return build


def sets_of(processor):
    """The raws as one training batch of groups, and as one evaluation batch of rows."""
    groups = Groups("train", Dataset.from_list(processor.prepare(RAWS)))
    pad_values = processor.pad_values
    examples = groups.training(COLUMNS, pad_values=pad_values, teaches=differ)
    (train,) = examples.padded_batch(len(examples), pad_values)
    (rows,) = groups.evaluation(9, pad_values=pad_values)
    return train, rows


def loss_of(model, columns):
    batch = Batch.of(model, columns)
    total, weight = run_loss(model, model(batch.features), batch)
    return total.item(), weight


@pytest.mark.parametrize(("loss", "weight"), [("pairwise", 4), ("listwise", 3)], ids=["pairwise", "listwise"])
def test_groups_and_rows_have_one_loss(make, loss, weight):
    model, processor = make(loss)
    train, rows = sets_of(processor)
    assert train["input_ids"].ndim == 3 and rows["input_ids"].ndim == 2
    total, found = loss_of(model, train)
    assert found == pytest.approx(weight)
    model.mode = RunMode.EVAL
    assert loss_of(model, rows) == (pytest.approx(total, rel=1e-5), pytest.approx(weight))


@pytest.mark.parametrize("loss", ["pointwise", "pairwise"])
def test_an_evaluation_encodes_a_few_rows_at_a_time(make, loss, monkeypatch):
    """However many candidates a query has."""
    model, processor = make(loss, mode=RunMode.EVAL)
    _, rows = sets_of(processor)
    features = Batch.of(model, rows).features
    whole = model(features)["logits"].numpy()
    monkeypatch.setattr("ernie.tasks.ranking_model._ROWS_TOGETHER", 2)
    sizes, encode = [], model._logits
    monkeypatch.setattr(model, "_logits", lambda ids, types: sizes.append(len(ids)) or encode(ids, types))
    np.testing.assert_allclose(model(features)["logits"].numpy(), whole, atol=1e-6)
    assert sizes == [2, 2, 2, 1]


def test_rows_of_groups_keep_their_order(make):
    model, processor = make("listwise")
    train, _ = sets_of(processor)
    together = model(Batch.of(model, train).features)["logits"].numpy()
    assert together.shape == (7, 1) and together.dtype == np.float32
    model.mode = RunMode.PREDICT
    alone = [
        model({name: paddle.to_tensor(example[name][None]) for name in COLUMNS[:2]})["logits"].numpy()[0]
        for example in processor.prepare(RAWS)
    ]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("hparams", "term"),
    [
        ({"margin": 0.5}, lambda apart: np.maximum(0, 0.5 - apart)),
        ({"pair_loss": "logistic"}, lambda apart: np.log1p(np.exp(-apart))),
    ],
)
def test_pairs(make, hparams, term):
    model, processor = make("pairwise", **hparams)
    train, _ = sets_of(processor)
    scores = model(Batch.of(model, train).features)["logits"].numpy()[:, 0].astype(np.float64)
    apart = [scores[better] - scores[worse] for better, worse in ((0, 1), (0, 2), (3, 4), (6, 5))]
    assert loss_of(model, train) == (pytest.approx(term(np.array(apart)).sum(), rel=1e-5), 4)


def test_pointwise_takes_grades_as_relevant(make):
    model, processor = make("pointwise")
    (rows,) = Dataset.from_list(processor.prepare(RAWS)).padded_batch(9, processor.pad_values)
    logits = model(Batch.of(model, rows).features)["logits"].numpy().astype(np.float64)
    expected = -log_softmax(logits, axis=-1)[range(7), np.minimum(rows["label"], 1)].sum()
    assert loss_of(model, rows) == (pytest.approx(expected, rel=1e-5), 7)


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_ranks_share_out_groups(make, loss):
    """Each rank's part of a batch has its loss and gradient; together they are those of the whole."""
    model, processor = make(loss)
    train, _ = sets_of(processor)
    total, weight = loss_of(model, train)
    parts = [loss_of(model, part_of(train, part, 2)) for part in range(2)]
    assert sum(part[0] for part in parts) == pytest.approx(total, rel=1e-5)
    assert sum(part[1] for part in parts) == pytest.approx(weight)
    batch = Batch.of(model, train)
    run_loss(model, model(batch.features), batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_padding_rows_do_not_count(make):
    model, processor = make("listwise")
    train, _ = sets_of(processor)
    wider = {
        name: np.concatenate([array, np.full_like(array[:, :2], processor.pad_values.get(name, 0))], axis=1)
        for name, array in train.items()
    }
    assert loss_of(model, wider) == pytest.approx(loss_of(model, train), rel=1e-6)


def test_r_drop_is_refused(make):
    with pytest.raises(ConfigError, match="the task 'ranking' has no R-Drop"):
        make("pairwise", r_drop=1.0)


@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_bundle_scores_pairs_of_texts(make, tmp_path, loss):
    model, processor = make(loss)
    _, rows = sets_of(processor)
    export_bundle(tmp_path, model, rows, processor=processor, metrics={})
    predictor = Predictor(tmp_path)
    raws = [{"text_a": raw["text_a"], "text_b": raw["text_b"]} for raw in RAWS]
    answers = answer_all(predictor, predictor.bundle.processor(), raws)
    model.mode = RunMode.PREDICT
    (columns,) = Dataset.from_list(processor.prepare(raws)).padded_batch(9, processor.pad_values)
    expected = processor.finish(
        {"logits": model({name: paddle.to_tensor(columns[name]) for name in COLUMNS[:2]})["logits"].numpy()}
    )
    scores = [answer["score"] for answer in answers]
    assert scores == pytest.approx([answer["score"] for answer in expected], abs=1e-5)
    assert len(set(scores)) == len(RAWS)
    assert predictor.bundle.metadata["ignores_padding"]
