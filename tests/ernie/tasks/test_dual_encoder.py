"""The dual encoder: examples, settings, loss against a plain loop, a bundle of embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from ernie.config import ErnieConfig
from ernie.pretrained import load_pretrained_config
from ernie.tasks.dual_encoder import (
    QUERY,
    RIGHT,
    WRONG,
    DualEncoderProcessor,
    RetrievalLoss,
    embedding_settings,
    is_answered,
    retrieval_report,
)
from ernie.tasks.dual_encoder_model import DualEncoderModel
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.groups import Groups
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tokenizing import load_tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.metrics import compute_all
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.stream import answer_all
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.model import Batch, run_loss
from propeller.types import HParams, RunConfig, RunMode

COLUMNS = ("input_ids", "token_type_ids", "label", "query", "text")
# "a dog ran" is right for two queries, of which one stands there twice; "on the mat" is right and wrong.
RAWS = [
    {"text_a": "the cat", "positives": ["on the mat", "猫"], "negatives": ["a"]},
    {"text_a": "a dog", "positives": ["a dog ran"], "negatives": ["on the mat", "the : cat , sat on a mat"]},
    {"text_a": "the dog", "positives": ["a dog ran"], "negatives": []},
    {"text_a": "a dog", "positives": ["un ##happy"], "negatives": ["a dog ran"]},
]
SETTINGS = EmbeddingSettings(
    "layer1", "mean", True, 16, 24, query_prefix="query : ", passage_prefix="passage : "
)


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return load_tokenizer(bert_folder)


@pytest.fixture(scope="module")
def make(tokenizer):
    def build(mode=RunMode.TRAIN, settings=SETTINGS, **hparams):
        paddle.seed(3)
        config = ErnieConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        processor = DualEncoderProcessor(tokenizer, settings)
        model = DualEncoderModel(
            HParams(hparams), mode, RunConfig(max_steps=9), config=config, processor=processor
        )
        model.mode = mode
        return model, processor

    return build


def sets_of(processor, raws=RAWS):
    groups = Groups("train", Dataset.from_list(processor.prepare(raws)))
    examples = groups.training(COLUMNS, pad_values=processor.pad_values, teaches=is_answered, lead=1)
    (train,) = examples.padded_batch(len(examples), processor.pad_values)
    (rows,) = groups.evaluation(9, pad_values=processor.pad_values, lead=1)
    return train, rows


def test_examples(tokenizer):
    rows = DualEncoderProcessor(tokenizer, SETTINGS).prepare(RAWS[:2])
    assert [row["label"] for row in rows] == [QUERY, RIGHT, RIGHT, WRONG, QUERY, RIGHT, WRONG, WRONG]
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3]
    served = EmbeddingProcessor(tokenizer, SETTINGS)
    for row, (text, prompt) in zip(rows[:2], [("the cat", "query"), ("on the mat", "passage")], strict=True):
        (expected,) = served.prepare([{"text_a": text, "prompt": prompt}])
        np.testing.assert_array_equal(row["input_ids"], expected["input_ids"])
    assert rows[0]["query"] == rows[0]["text"] == rows[3]["query"] != rows[4]["query"]
    assert rows[1]["text"] == rows[6]["text"], "texts are told apart by what they are, not where they stand"
    with pytest.raises(DataError, match="a text is None"):
        DualEncoderProcessor(tokenizer, SETTINGS).prepare([{**RAWS[0], "positives": [None]}])


def plain_loss(vectors, scale, symmetric):
    """The loss of `RAWS`: each right passage against all that is not right for its query."""
    passages = [text for raw in RAWS for text in (*raw["positives"], *raw["negatives"])]
    queries = [raw["text_a"] for raw in RAWS]

    def similarity(query, passage):
        return scale * vectors["query : " + query] @ vectors["passage : " + passage]

    def is_right(query, passage):
        return any(raw["text_a"] == query and passage in raw["positives"] for raw in RAWS)

    terms = []
    for query, passage in ((raw["text_a"], text) for raw in RAWS for text in raw["positives"]):
        own = similarity(query, passage)
        wrong = [similarity(query, other) for other in passages if not is_right(query, other)]
        term = logsumexp([own, *wrong]) - own
        if symmetric:
            others = [similarity(other, passage) for other in queries if not is_right(other, passage)]
            term = (term + logsumexp([own, *others]) - own) / 2
        terms.append(term)
    return sum(terms), len(terms)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss(make, symmetric):
    model, processor = make(scale=5, symmetric=symmetric)
    train, rows = sets_of(processor)
    texts = {
        prefix + text
        for raw in RAWS
        for prefix, members in (
            ("query : ", [raw["text_a"]]), ("passage : ", raw["positives"] + raw["negatives"]),
        )
        for text in members
    }  # fmt: skip
    vectors = {}
    for text in texts:
        encoding = processor.tokenizer.encode(text)
        ids = [paddle.to_tensor(array[None]) for array in (encoding.input_ids, encoding.token_type_ids)]
        output = model({"input_ids": ids[0], "token_type_ids": ids[1]})["embeddings"]
        vectors[text] = output.numpy()[0].astype(np.float64)
    expected, count = plain_loss(vectors, 5, symmetric)
    for mode, columns in ((RunMode.TRAIN, train), (RunMode.EVAL, rows)):
        model.mode = mode
        batch = Batch.of(model, columns)
        total, weight = run_loss(model, model(batch.features), batch)
        assert (total.item(), weight) == (pytest.approx(expected, rel=1e-4), count)


def test_training_brings_queries_to_their_passages(make):
    model, processor = make(learning_rate=0.01, warmup_proportion=0.0, lr_schedule="constant")
    train, rows = sets_of(processor)
    batch = Batch.of(model, train)
    optimizer = model.optimizer()
    for _ in range(30):
        total, weight = run_loss(model, model(batch.features), batch)
        (total / weight).backward()
        optimizer.step()
        optimizer.clear_grad()
    model.mode = RunMode.EVAL
    metrics = model.metrics()
    outputs = {"embeddings": model(Batch.of(model, rows).features)["embeddings"].numpy()}
    for metric in metrics.values():
        metric.update(outputs, None, rows)
    values = compute_all(metrics)
    assert values[processor.best_metric] == 1.0 and values["queries"] == 3


def test_bundle_is_one_of_embeddings(make, tmp_path):
    model, processor = make()
    _, rows = sets_of(processor)
    export_bundle(tmp_path, model, rows, processor=processor, metrics={})
    predictor = Predictor(tmp_path)
    served = predictor.bundle.processor()
    assert isinstance(served, EmbeddingProcessor) and served.settings == SETTINGS
    assert predictor.bundle.axis_limits == {"seq_len": 24} and predictor.bundle.metadata["ignores_padding"]
    raws = [{"text_a": "the cat", "prompt": "query"}, {"text_a": "on the mat", "prompt": "passage"}]
    found = [answer["embedding"] for answer in answer_all(predictor, served, raws)]
    live = model(Batch.of(model, rows).features)["embeddings"].numpy()
    order = [processor.prepare(RAWS[:1])[place]["text"] for place in (0, 1)]
    expected = [live[rows["text"].tolist().index(text)] for text in order]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


# How embeddings are made


def test_settings_of_a_folder_without_a_word(bert_folder):
    config = load_pretrained_config(bert_folder)
    for folder in (bert_folder, None):
        found = embedding_settings(folder, config, HParams(), max_seqlen=12)
        assert (found.pooling, found.encode_layer, found.normalize) == ("mean", "layer2", True)
        assert (found.max_seqlen, found.similarity) == (12, "cosine")


def test_settings_of_a_sentence_folder(sentence_folder):
    folder = sentence_folder(
        pooling={"pooling_mode_cls_token": True},
        config_sentence_transformers={"prompts": {"query": "query: "}, "similarity_fn_name": "dot"},
        modules=("Transformer", "Pooling"),
    )
    config = load_pretrained_config(folder)
    found = embedding_settings(folder, config, HParams(), max_seqlen=12)
    assert (found.pooling, found.normalize, found.similarity) == ("cls", False, "dot")
    assert found.query_prefix == "query: "
    asked = HParams({"pooling": "max", "normalize": 1, "passage_prefix": "p", "encode_layer": "layer1"})
    found = embedding_settings(folder, config, asked, max_seqlen=12)
    assert (found.pooling, found.normalize, found.passage_prefix) == ("max", True, "p")
    assert (found.encode_layer, found.similarity) == ("layer1", "cosine")


def test_pooler(bert_folder):
    config = load_pretrained_config(bert_folder)
    found = embedding_settings(bert_folder, config, HParams({"encode_layer": "pooler"}), max_seqlen=12)
    assert found.encode_layer == found.pooling == "pooler"


def test_bad_settings(bert_folder, tokenizer):
    config = load_pretrained_config(bert_folder)
    for hparams, message in (
        ({"pooling": "men"}, "Did you mean 'mean'"),
        ({"pooling": 3}, "pooling must be text, got 3"),
        ({"normalize": "yes"}, "normalize must be true or false"),
        ({"dimensions": 1000}, "dimensions must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            embedding_settings(bert_folder, config, HParams(hparams), max_seqlen=12)
    for hparams, message in (({"scale": 0}, "scale must be"), ({"symmetric": "no"}, "symmetric must be")):
        with pytest.raises(ConfigError, match=message):
            RetrievalLoss.of(HParams(hparams))
    with pytest.raises(ConfigError, match="gives no single embedding"):
        DualEncoderProcessor(tokenizer, EmbeddingSettings("layer1", "none", True, 16, 24))
    with pytest.raises(ConfigError, match="there are: all, given"):
        DualEncoderProcessor(tokenizer, SETTINGS, candidates="some")


def test_report(tokenizer):
    processor = DualEncoderProcessor(tokenizer, SETTINGS)
    unanswered = {"text_a": "a", "positives": [], "negatives": ["the"]}
    groups = Groups("dev", Dataset.from_list(processor.prepare([*RAWS, unanswered])))
    assert retrieval_report({"dev": groups}) == (
        "dev: 5 queries, 5 right passages, 5 hard negatives, a query at most 3, mean 2.0; queries without a "
        "right passage: 1"
    )
    alone = Groups("dev", Dataset.from_list(processor.prepare([unanswered])))
    with pytest.raises(DataError, match="The dev set has no right passage"):
        retrieval_report({"dev": alone})
