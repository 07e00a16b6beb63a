from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import stat

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ernie.config import ErnieConfig
from ernie.pretrained import (
    load_pretrained_config,
    load_pretrained_state,
    match_weights,
    save_pretrained_state,
)
from propeller.errors import CheckpointError, ConfigError
from propeller.tensors import read_safetensors


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
    own = tmp_path / "deep/own"
    for _ in range(2):  # the second time over the first
        save_pretrained_state(own, config, state)
    assert sorted(path.name for path in own.iterdir()) == ["ernie_config.json", "model.safetensors"]
    assert load_pretrained_config(own) == config
    loaded_config, loaded = load_pretrained_state(own)
    assert loaded_config == config
    assert same(loaded, state)


def test_a_save_that_fails_leaves_the_older_weights(bert_folder, tmp_path):
    config, state = load_pretrained_state(bert_folder)
    save_pretrained_state(tmp_path / "own", config, state)
    with pytest.raises(SafetensorError, match="Unknown dtype"):
        save_pretrained_state(tmp_path / "own", config, {**state, "x": np.array(["text"])})
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "ernie_config.json",
        "model.safetensors",
    ]
    assert same(load_pretrained_state(tmp_path / "own")[1], state)


def test_what_was_saved_is_synced_before_it_takes_its_name(bert_folder, tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        status = os.fstat(descriptor)
        names = [path.name for path in own.iterdir() if path.stat().st_ino == status.st_ino]
        synced.append((names, stat.S_ISDIR(status.st_mode)))

    own = tmp_path / "own"
    content = load_pretrained_state(bert_folder)
    monkeypatch.setattr(os, "fsync", fsync)
    save_pretrained_state(own, *content)
    files = [names for names, is_folder in synced if not is_folder]
    assert [names[0].rpartition(".")[0] for names in files] == [".model.safetensors", ".ernie_config.json"]
    assert sum(is_folder for _, is_folder in synced) == 2


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
    assert match_weights(SHAPES, weights()) == list(SHAPES)


def test_left_over_tensors_are_listed(caplog):
    with caplog.at_level(logging.INFO, "ernie"):
        match_weights(SHAPES, weights(head=np.zeros(3)))
    assert caplog.messages == ["3 parameters loaded; new: none; left over: head"]


def test_missing_and_differing_are_errors_unless_new():
    state = weights(word=np.zeros((5, 2), np.float32)) | {"head": np.zeros(3)}
    del state["pooler.bias"]
    with pytest.raises(CheckpointError) as error:
        match_weights(SHAPES, state)
    message = str(error.value)
    assert "word is float32 [5, 2] in the file, [4, 2] in the model, pooler.bias is missing." in message
    assert "Left over in the file: head" in message
    assert match_weights(SHAPES, state, new=("pooler.*", "word")) == ["pooler.weight"]


def test_weights_must_be_floating_point():
    with pytest.raises(CheckpointError, match=r"word is int8 \[4, 2\]"):
        match_weights(SHAPES, weights(word=np.zeros((4, 2), np.int8)))


def test_a_pattern_that_names_nothing_is_a_slip():
    with pytest.raises(ConfigError, match="'poler.bias'.*Did you mean 'pooler.bias'"):
        match_weights(SHAPES, weights(), new=("poler.bias",))


def test_tables_of_another_size_are_an_error(bert_folder):
    config, state = load_pretrained_state(bert_folder)
    assert isinstance(config, ErnieConfig)
    shapes = {name: array.shape for name, array in state.items()} | {"embeddings.position.weight": (512, 32)}
    with pytest.raises(CheckpointError, match=r"position.weight is float32 \[20, 32\] .*\[512, 32\]"):
        match_weights(shapes, state)
