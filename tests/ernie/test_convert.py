"""Foreign weights: PyTorch's pickles and Transformers' names."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from ernie.config import ErnieConfig
from ernie.convert.huggingface import from_huggingface, is_huggingface
from ernie.convert.torch_pickle import read_torch_file
from propeller.errors import CheckpointError
from propeller.tensors import read_safetensors


class Tensor:
    """Pickles as PyTorch's tensors do: a rebuild call over a reference to a storage."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Storage:
    def __init__(self, kind, key, elements, size=None):
        self.kind, self.key, self.elements = kind, key, elements
        self.size = len(elements) if size is None else size


@pytest.fixture
def torch_names(monkeypatch):
    """Stands in for the names that PyTorch's pickles hold, while one is written."""

    def rebuild(*arguments):
        raise NotImplementedError

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    for name in ("Float", "Half", "BFloat16", "Long"):
        setattr(torch, f"{name}Storage", type(f"{name}Storage", (), {"__module__": "torch"}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        yield torch


@pytest.fixture
def write(tmp_path, torch_names):
    """Writes an object and the storages it refers to as torch.save would; returns the path."""

    def write(content, *, compression=zipfile.ZIP_STORED, byteorder=b"little", without=()):
        storages = {}

        class Pickler(pickle.Pickler):
            def persistent_id(self, item):
                if not isinstance(item, Storage):
                    return None
                storages[item.key] = item.elements.tobytes()
                return "storage", getattr(torch_names, f"{item.kind}Storage"), item.key, "cpu", item.size

        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(content)
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            archive.writestr("archive/byteorder", byteorder)
            for key, raw in storages.items():
                if key not in without:
                    archive.writestr(f"archive/data/{key}", raw)
        return path

    return write


def floats(*values):
    return np.array(values, np.float32)


TWELVE = Storage("Float", "0", np.arange(12, dtype=np.float32))


def test_a_real_file_equals_its_safetensors_twin(root):
    folder = root / "tests/data/bert_tiny"
    pickled, safe = (
        read_torch_file(folder / "pytorch_model.bin"),
        read_safetensors(folder / "model.safetensors"),
    )
    assert pickled.keys() == safe.keys()
    for name, tensor in safe.items():
        np.testing.assert_array_equal(pickled[name], tensor)


def test_offsets_strides_and_shared_storage(write):
    path = write(
        {
            "whole": Tensor(TWELVE, 0, (3, 4), (4, 1)),
            "turned": Tensor(TWELVE, 0, (4, 3), (1, 4)),
            "part": Tensor(TWELVE, 5, (2, 2), (4, 2)),
            "spread": Tensor(TWELVE, 3, (2, 3), (0, 1)),
            "scalar": Tensor(TWELVE, 7, (), ()),
            "empty": Tensor(TWELVE, 0, (0, 4), (4, 1)),
        }
    )
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "whole": whole,
        "turned": whole.T,
        "part": floats([5, 7], [9, 11]),
        "spread": floats([3, 4, 5], [3, 4, 5]),
        "scalar": floats(7)[0],
        "empty": np.zeros((0, 4), np.float32),
    }
    tensors = read_torch_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].shape == np.shape(tensor)


def test_element_types(write):
    half = Storage("Half", "0", np.array([1.5, -2], np.float16))
    brain = Storage("BFloat16", "1", np.array([0x3FC0, 0xC000], np.uint16))
    long = Storage("Long", "2", np.array([7, -1]))
    storages = {"half": half, "brain": brain, "long": long}
    path = write({name: Tensor(storage, 0, (2,), (1,)) for name, storage in storages.items()})
    tensors = read_torch_file(path)
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "half": "float16",
        "brain": "float32",
        "long": "int64",
    }
    np.testing.assert_array_equal(tensors["brain"], floats(1.5, -2))
    np.testing.assert_array_equal(tensors["long"], [7, -1])


def test_big_endian_files(write):
    storage = Storage("Float", "0", np.array([1, 2], ">f4"))
    tensors = read_torch_file(write({"x": Tensor(storage, 0, (2,), (1,))}, byteorder=b"big"))
    np.testing.assert_array_equal(tensors["x"], floats(1, 2))
    assert tensors["x"].dtype.isnative


def test_metadata_of_a_state_dict_is_no_tensor(write):
    content = collections.OrderedDict(x=Tensor(TWELVE, 0, (12,), (1,)))
    content._metadata = collections.OrderedDict({"": {"version": 1}})
    assert list(read_torch_file(write(content))) == ["x"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(TWELVE, 0, (13,), (1,)), "does not fit its storage of 12"),
        (Tensor(TWELVE, 11, (2,), (1,)), "does not fit"),
        (Tensor(TWELVE, -1, (2,), (1,)), "A tensor has shape"),
        (Tensor(TWELVE, 5, (2,), (-1,)), "A tensor has shape"),
        (Tensor(TWELVE, 0, (2, 2), (1,)), "A tensor has shape"),
        (Tensor(TWELVE, 0, (1 << 40,), (0,)), "does not fit"),
        (Tensor(Storage("Float", "0", floats(1, 2), size=3), 0, (3,), (1,)), "holds 8 bytes, not 3 elements"),
    ],
)
def test_tensors_that_reach_outside_their_storage(write, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(write({"x": tensor}))


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_runs_a_command_is_refused_unrun(write, tmp_path):
    trace = tmp_path / "trace"
    path = write({"x": Tensor(TWELVE, 0, (12,), (1,)), "y": Command(f"touch {trace}")})
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*system"):
        read_torch_file(path)
    assert not trace.exists()


def test_damaged_and_foreign_files(write, tmp_path):
    good = write({"x": Tensor(TWELVE, 0, (12,), (1,))}).read_bytes()
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    for content in (b"", good[:-30], good[:200], legacy, b"version https://git-lfs.github.com/spec/v1\n"):
        path = tmp_path / "broken.bin"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken.bin.*PyTorch 1.6 or later"):
            read_torch_file(path)
    flipped = good.replace(np.float32(7).tobytes(), np.float32(8).tobytes())
    assert flipped != good
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="Bad CRC"):
        read_torch_file(path)


def test_archives_that_torch_did_not_write(write, tmp_path):
    content = {"x": Tensor(TWELVE, 0, (12,), (1,))}
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(write(content, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="data/0, which it does not hold"):
        read_torch_file(write(content, without="0"))
    with pytest.raises(CheckpointError, match="flat dictionary of tensors"):
        read_torch_file(write({"model": content}))
    path = tmp_path / "other.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="no data.pkl"):
        read_torch_file(path)


@pytest.fixture
def bert(root):
    folder = root / "tests/data/bert_tiny"
    return ErnieConfig.from_file(folder / "config.json"), read_safetensors(folder / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    return True


def test_names_and_layout(bert):
    config, tensors = bert
    state = from_huggingface(tensors, config)
    assert len(state) == 5 + 2 * 12 + 2
    layer = "encoder.layer.1.attention.self."
    for index, part in enumerate(("query", "key", "value")):
        columns = slice(32 * index, 32 * (index + 1))
        weight = state["layers.1.attention.qkv.weight"][:, columns]
        np.testing.assert_array_equal(weight, tensors[f"{layer}{part}.weight"].T)
        bias = state["layers.1.attention.qkv.bias"][columns]
        np.testing.assert_array_equal(bias, tensors[f"{layer}{part}.bias"])
    np.testing.assert_array_equal(
        state["embeddings.word.weight"], tensors["embeddings.word_embeddings.weight"]
    )
    np.testing.assert_array_equal(
        state["layers.0.ffn.up.weight"], tensors["encoder.layer.0.intermediate.dense.weight"].T
    )
    assert all(array.flags.c_contiguous for array in state.values())


@pytest.mark.parametrize("prefix", ["bert.", "ernie."])
def test_prefixes_old_names_and_buffers(bert, prefix):
    config, tensors = bert
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_end, old_end in old.items():
            if name.endswith(new_end):
                name = name.removesuffix(new_end) + old_end
        renamed[prefix + name] = tensor
    renamed[f"{prefix}embeddings.position_ids"] = np.arange(20)[None]
    assert is_huggingface(renamed)
    assert same(from_huggingface(renamed, config), from_huggingface(tensors, config))


def test_what_is_none_of_the_encoders_stays_beside_it(bert):
    config, tensors = bert
    head = {
        "classifier.weight": np.ones((2, 32), np.float32),
        "cls.predictions.bias": np.ones(60, np.float32),
    }
    prefixed = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    state = from_huggingface(prefixed | head, config)
    assert same(state, from_huggingface(tensors, config) | head)


def test_half_a_query_key_value_is_an_error(bert):
    config, tensors = bert
    del tensors["encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(CheckpointError, match=r"self.key.bias.*belong together"):
        from_huggingface(tensors, config)
