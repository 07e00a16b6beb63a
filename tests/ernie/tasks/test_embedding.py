"""The processor of embeddings: texts in, lists of numbers out, and back from a bundle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tokenizing import load_tokenizer
from propeller.errors import DataError
from propeller.processor import find_processor, windows_each

SETTINGS = EmbeddingSettings(
    encode_layer="layer2",
    pooling="mean",
    normalize=True,
    dimensions=3,
    max_seqlen=6,
    query_prefix="query : ",
    passage_prefix="passage : ",
)


@pytest.fixture(scope="module")
def processor(bert_folder):
    return EmbeddingProcessor(load_tokenizer(bert_folder), SETTINGS)


def tokens(processor, **raw):
    example = processor.prepare([raw])[0]
    return " ".join(processor.tokenizer.convert_ids_to_tokens(example["input_ids"]))


def test_texts(processor):
    examples = processor.prepare([{"text_a": "the cat"}, {"text_a": "the cat sat on the mat"}])
    assert [example["num_tokens"] for example in examples] == [4, 8]
    assert [len(example["input_ids"]) for example in examples] == [4, 6]
    for example in examples:
        assert example.keys() == {"input_ids", "token_type_ids", "num_tokens"}
        assert example["input_ids"].dtype == example["token_type_ids"].dtype == np.int64
        assert not example["token_type_ids"].any()
    assert processor.pad_values == {"input_ids": 0}


def test_pairs_among_texts(processor):
    raws = [{"text_a": "a dog", "text_b": "ran"}, {"text_a": "猫"}, {"text_a": "mat", "text_b": None}]
    examples = processor.prepare(raws)
    assert [example["token_type_ids"].tolist() for example in examples] == [
        [0] * 4 + [1] * 2,
        [0] * 3,
        [0] * 3,
    ]
    assert tokens(processor, **raws[0]) == "[CLS] a dog [SEP] ran [SEP]"
    assert tokens(processor, **raws[1]) == "[CLS] 猫 [SEP]"


def test_nothing(processor):
    assert processor.prepare([]) == []


def test_prompts(processor):
    assert tokens(processor, text_a="cat", prompt="query") == "[CLS] query : cat [SEP]"
    assert tokens(processor, text_a="cat", prompt="passage") == "[CLS] passage : cat [SEP]"
    assert tokens(processor, text_a="cat", prompt=None) == "[CLS] cat [SEP]"
    settings = dataclasses.replace(SETTINGS, default_prefix="the ")
    assert tokens(EmbeddingProcessor(processor.tokenizer, settings), text_a="cat") == "[CLS] the cat [SEP]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[CLS] [SEP]"),
        (" \t ", "[CLS] [SEP]"),
        ("the\x00 cat", "[CLS] the cat [SEP]"),
        ("😀", "[CLS] [UNK] [SEP]"),
        ("a \ud83d cat", "[CLS] a cat [SEP]"),
        ("[PAD] cat", "[CLS] [PAD] cat [SEP]"),
        ("dog " * 5000, "[CLS] dog dog dog dog [SEP]"),
    ],
)
def test_odd_texts(processor, text, expected):
    assert tokens(processor, text_a=text) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "text_a is missing; expected a string"),
        ({"text_b": "cat"}, "text_a is missing"),
        ({"text_a": None}, "text_a is None"),
        ({"text_a": ["cat"]}, r"text_a is \['cat'\]"),
        ({"text_a": "cat", "text_b": 3}, "text_b is 3"),
        ({"text_a": "cat", "prompt": "question"}, "prompt is 'question'; expected 'query' or"),
        ({"text_a": "cat", "prompt": ["query"]}, "prompt is"),
        ({"text_a": "cat", "test_b": "dog"}, "An example has a 'test_b'. Did you mean 'text_b'"),
    ],
)
def test_bad_examples(processor, raw, message):
    with pytest.raises(DataError, match=message):
        processor.prepare([raw])
    (good,), bad = windows_each(processor, [{"text_a": "cat"}, raw])
    assert good["num_tokens"] == 3
    assert isinstance(bad, DataError)


def test_answers(processor):
    rows = np.array([[0.5, -1.0, 1 / 3], [0.0, 2.0, 1e-12]], np.float32)
    answers = processor.finish({"embeddings": rows})
    assert [list(answer) for answer in answers] == [["embedding"]] * 2
    assert np.array([answer["embedding"] for answer in answers], np.float32).tolist() == rows.tolist()
    line = processor.format({}, answers[0])
    assert line.startswith("0.5 -1 0.33333")
    assert np.array(line.split(), np.float32).tolist() == rows[0].tolist()


def test_answers_of_each_token(processor):
    rows = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    answers = processor.finish({"embeddings": rows, "lengths": np.array([2, 3])})
    assert answers[0]["embedding"] == [[0, 1], [2, 3]]
    assert answers[1]["embedding"] == [[6, 7], [8, 9], [10, 11]]
    assert processor.format({}, answers[0]) == "0 1\t2 3"


def test_lines(processor):
    assert processor.parse("the cat") == {"text_a": "the cat"}
    assert processor.parse("a\tb") == {"text_a": "a", "text_b": "b"}
    assert processor.parse("") == {"text_a": ""}
    with pytest.raises(DataError, match="found 3 cells"):
        processor.parse("a\tb\tc")
    assert processor.metrics() == {}


def test_saved_and_loaded(processor, tmp_path):
    settings = processor.save(tmp_path)
    assert settings == {**dataclasses.asdict(SETTINGS), "tokenizer": processor.tokenizer.fingerprint}
    again = find_processor("embedding").load(tmp_path, settings)
    assert again.settings == SETTINGS
    assert again.fingerprint == processor.fingerprint
    assert again.tokenizer.fingerprint == settings["tokenizer"]


@pytest.mark.parametrize("change", [{"max_seqlen": 5}, {"query_prefix": ""}, {"default_prefix": "a"}])
def test_the_fingerprint_changes_with_the_arrays(processor, change):
    other = EmbeddingProcessor(processor.tokenizer, dataclasses.replace(SETTINGS, **change))
    assert other.fingerprint != processor.fingerprint
    same = EmbeddingProcessor(processor.tokenizer, dataclasses.replace(SETTINGS, dimensions=2))
    assert same.fingerprint == processor.fingerprint
