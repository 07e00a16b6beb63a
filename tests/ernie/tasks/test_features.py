"""Features on disk are what the model gives for each text alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ernie.modeling import ErnieModel
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.features import Extractor, layer_numbers, write_features
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tokenizing import load_tokenizer
from propeller.errors import ConfigError, DataError
from propeller.paddle.runtime import paddle

TEXTS = ["the cat sat on the mat", "", "unhappy", "a dog ran , 猫 : the dog ran on a mat", "[PAD] cat"]
RAWS = [{"text_a": text, "label": "0"} for text in TEXTS] + [{"text_a": "the cat", "text_b": "a dog"}]


@pytest.fixture(scope="module")
def model(bert_folder):
    return ErnieModel.from_pretrained(bert_folder)


@pytest.fixture
def extractor(bert_folder, model):
    def make(pooling="pooler", max_seqlen=12, **options):
        settings = EmbeddingSettings(
            encode_layer="layer2",
            pooling=pooling,
            normalize=False,
            dimensions=model.config.hidden_size,
            max_seqlen=max_seqlen,
        )
        processor = EmbeddingProcessor(load_tokenizer(bert_folder), settings)
        return Extractor(model, processor, **{"batch_size": 2, **options})

    return make


@pytest.fixture
def alone(bert_folder, model):
    """What the model gives for each text alone, without padding."""
    tokenizer = load_tokenizer(bert_folder)

    def run(raw, max_seqlen=12):
        encoding = tokenizer.encode(raw["text_a"], raw.get("text_b"), max_seqlen=max_seqlen)
        with paddle.no_grad():
            return model(
                paddle.to_tensor(encoding.input_ids[None]),
                paddle.to_tensor(encoding.token_type_ids[None]),
                attention_mask=paddle.ones([1, len(encoding.input_ids)]),
                output_hidden=True,
            )

    return run


def test_features_are_those_of_the_model(extractor, alone, tmp_path):
    done = write_features(iter(RAWS), extractor(layers=[0, 1]), tmp_path / "out")
    cls, top, lengths, first, embedded = (
        np.load(tmp_path / "out" / f"{name}.npy")
        for name in ("cls_emb", "top_layer_emb", "lengths", "layer_1_emb", "layer_0_emb")
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cls_emb.npy", "layer_0_emb.npy", "layer_1_emb.npy", "lengths.npy", "top_layer_emb.npy",
    ]  # fmt: skip
    assert cls.dtype == top.dtype == np.float32
    assert lengths.dtype == np.int64
    assert done == (len(RAWS), lengths.sum(), 1, 0)
    ends = np.cumsum(lengths)[:-1]
    for number, raw in enumerate(RAWS):
        output = alone(raw)
        np.testing.assert_allclose(cls[number], output.pooled.numpy()[0], atol=1e-5)
        for values, wanted in (
            (top, output.sequence),
            (first, output.hidden[1]),
            (embedded, output.hidden[0]),
        ):
            np.testing.assert_allclose(np.split(values, ends)[number], wanted.numpy()[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_other_vectors_of_a_text(extractor, alone, tmp_path, pooling):
    write_features(RAWS, extractor(pooling), tmp_path)
    for vector, raw in zip(np.load(tmp_path / "cls_emb.npy"), RAWS, strict=True):
        tokens = alone(raw).sequence.numpy()[0]
        wanted = {"cls": tokens[0], "mean": tokens.mean(0), "max": tokens.max(0)}[pooling]
        np.testing.assert_allclose(vector, wanted, atol=1e-5)


def test_the_size_of_a_batch_does_not_matter(extractor, tmp_path):
    write_features(RAWS, extractor(batch_size=1), tmp_path / "one")
    write_features(RAWS, extractor(batch_size=64), tmp_path / "all")
    for path in (tmp_path / "one").iterdir():
        np.testing.assert_allclose(np.load(path), np.load(tmp_path / "all" / path.name), atol=1e-5)


def test_memory_is_bounded(extractor, tmp_path):
    peaks = []
    for count in (200, 2000):
        tracemalloc.start()
        write_features(({"text_a": "the cat sat"} for _ in range(count)), extractor(batch_size=20), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = (tmp_path / "top_layer_emb.npy").stat().st_size
    assert peaks[1] - peaks[0] < size / 5, (peaks, size)


def test_nothing_is_left_of_a_run_that_failed(extractor, tmp_path):
    raws = [*({"text_a": "cat"} for _ in range(20)), {"text_a": None}]
    with pytest.raises(DataError, match="text_a is None"):
        write_features(raws, extractor(), tmp_path)
    with pytest.raises(DataError, match="there is no text"):
        write_features([], extractor(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_layer_numbers():
    assert layer_numbers("", 4) == []
    assert layer_numbers(" 0, -1,2,-3 ,4", 4) == [0, 2, 4]


@pytest.mark.parametrize("text", ["5", "-5", "--1", "x", "1;2", "1.0"])
def test_layers_that_are_not_there(text):
    with pytest.raises(ConfigError, match=r"is not there; the model has 0 \(embeddings\), 1 to 4"):
        layer_numbers(text, 4)
