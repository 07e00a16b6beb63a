from __future__ import annotations

import json
import os
import pickle
import shutil
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from ernie.config import ErnieConfig
from ernie.pretrained import (
    load_pretrained_config,
    load_pretrained_state,
    match_weights,
    read_safetensors,
    save_pretrained_state,
)
from propeller.errors import CheckpointError, ConfigError


@pytest.fixture
def bert_folder(root, tmp_path):
    """A copy of a small Transformers folder, to be damaged."""
    folder = tmp_path / "bert"
    shutil.copytree(root / "tests/data/bert_tiny", folder)
    return folder


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
        assert array.dtype == other[name].dtype
    return True


def test_safetensors_and_pickle_give_the_same(bert_folder):
    _, safe = load_pretrained_state(bert_folder)
    (bert_folder / "model.safetensors").unlink()
    _, pickled = load_pretrained_state(bert_folder)
    assert same(safe, pickled)


def test_own_layout_there_and_back(bert_folder, tmp_path):
    config, state = load_pretrained_state(bert_folder)
    vocab = tmp_path / "words"
    vocab.write_bytes(b"[PAD]\r\n\xe4\xbd\xa0\n\xe2\x80\xa8")
    own = tmp_path / "deep/own"
    for _ in range(2):  # the second time over the first
        save_pretrained_state(own, config, state, vocab_file=vocab)
    assert sorted(path.name for path in own.iterdir()) == [
        "ernie_config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert (own / "vocab.txt").read_bytes() == vocab.read_bytes()
    assert load_pretrained_config(own) == config
    loaded_config, loaded = load_pretrained_state(own)
    assert loaded_config == config
    assert same(loaded, state)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_can_read_what_was_saved(bert_folder, tmp_path):
    save_pretrained_state(tmp_path / "own", *load_pretrained_state(bert_folder))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "own").iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_other_float_types_load_as_float32(bert_folder, kind):
    tensors = read_safetensors(bert_folder / "model.safetensors")
    changed = {name: tensor.astype(kind) for name, tensor in tensors.items()}
    save_file(changed, bert_folder / "model.safetensors")
    _, state = load_pretrained_state(bert_folder)
    table = state["embeddings.word.weight"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, changed["embeddings.word_embeddings.weight"].astype(np.float32))


def test_bfloat16_loads_as_float32(tmp_path):
    from propeller.paddle.runtime import paddle  # safetensors needs it to write the type

    save = pytest.importorskip("safetensors.paddle").save_file
    exact = np.array([[1.5, -2.0, 3.25]], np.float32)
    tensors = {"brain": paddle.to_tensor(exact).astype("bfloat16"), "ids": paddle.to_tensor([1, 2])}
    save(tensors, tmp_path / "x.safetensors")
    read = read_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read["brain"], exact)
    np.testing.assert_array_equal(read["ids"], [1, 2])
    assert read["brain"].dtype == np.float32


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a folder. Nothing is downloaded"):
        load_pretrained_state("bert-base-uncased")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        load_pretrained_state(tmp_path / "file")


def test_a_folder_without_weights_says_what_was_looked_for(bert_folder):
    (bert_folder / "model.safetensors").unlink()
    (bert_folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors or pytorch_model.bin.*config.json, golden.npz"
    ):
        load_pretrained_state(bert_folder)


def test_a_folder_without_configuration_says_what_was_looked_for(bert_folder):
    (bert_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="ernie_config.json, config.json, bert_config.json"):
        load_pretrained_state(bert_folder)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("load", [load_pretrained_config, load_pretrained_state])
def test_old_fluid_parameters_have_no_converter_yet(tmp_path, load, inside):
    params = tmp_path / "ernie/params"
    params.mkdir(parents=True)
    (params / "word_embedding").write_bytes(b"\0" * 8)
    (params.parent / "ernie_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"old Paddle Fluid.*converter is not there yet"):
        load(params if inside else params.parent)


class Trap:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_paddle_pickles_are_refused_unread(tmp_path):
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps({"w": Trap(tmp_path / "trace")}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model_state.pdparams.*converter is not there yet"):
        load_pretrained_state(tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_damaged_safetensors_are_named(bert_folder, keep):
    path = bert_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load_pretrained_state(bert_folder)


def test_weights_of_another_kind_of_model(bert_folder):
    save_file({"roberta.w": np.zeros(3, np.float32)}, bert_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no ERNIE or BERT encoder.*roberta.w"):
        load_pretrained_state(bert_folder)


def test_a_configuration_of_another_architecture(bert_folder):
    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps(config | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ConfigError, match="relative_key"):
        load_pretrained_state(bert_folder)


SHAPES = {"word": (4, 2), "pooler.weight": (2, 2), "pooler.bias": (2,)}


def weights(**changed):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} | changed
    return {name: array for name, array in arrays.items() if array is not None}


def test_match_of_all():
    report = match_weights(SHAPES, weights())
    assert report.loaded == tuple(SHAPES)
    assert report.missing == report.unexpected == ()


def test_left_over_tensors_are_listed():
    report = match_weights(SHAPES, weights(head=np.zeros(3)))
    assert report.unexpected == ("head",)
    assert "1 tensors left over: head" in str(report)


def test_missing_and_differing_are_errors_unless_new():
    state = weights(word=np.zeros((5, 2), np.float32)) | {"head": np.zeros(3)}
    del state["pooler.bias"]
    with pytest.raises(CheckpointError) as error:
        match_weights(SHAPES, state)
    assert "missing: pooler.bias" in str(error.value)
    assert "word float32 [5, 2] in the file, [4, 2] in the model" in str(error.value)
    assert "left over in the file: head" in str(error.value)
    report = match_weights(SHAPES, state, new=("pooler.*", "word"))
    assert report.loaded == ("pooler.weight",)
    assert report.missing == ("word", "pooler.bias")


def test_weights_must_be_floating_point():
    with pytest.raises(CheckpointError, match=r"word int8 \[4, 2\]"):
        match_weights(SHAPES, weights(word=np.zeros((4, 2), np.int8)))


def test_a_pattern_that_names_nothing_is_a_slip():
    with pytest.raises(ConfigError, match="'poler.bias'.*Did you mean 'pooler.bias'"):
        match_weights(SHAPES, weights(), new=("poler.bias",))


def test_tables_of_another_size_are_an_error(bert_folder):
    config, state = load_pretrained_state(bert_folder)
    assert isinstance(config, ErnieConfig)
    shapes = {name: array.shape for name, array in state.items()} | {"embeddings.position.weight": (512, 32)}
    with pytest.raises(CheckpointError, match=r"embeddings.position.weight float32 \[20, 32\] .*\[512, 32\]"):
        match_weights(shapes, state)
