"""Safetensors files as numpy arrays."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from propeller.errors import CheckpointError
from propeller.tensors import each_tensor, read_safetensors, widen_bfloat16


def write_raw(path, tensors):
    """Writes tensors (name -> dtype, shape, bytes) by hand, since numpy does not have all dtypes."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def mixed(tmp_path):
    brain = np.array([0x3FC0, 0xC000, 0x4050, 0x7F80], "<u2").tobytes()
    numbers = np.array([3, -4], "<i8").tobytes()
    return write_raw(tmp_path / "x.safetensors", {"w": ("BF16", [2, 2], brain), "ids": ("I64", [2], numbers)})


def test_one_after_the_other_by_name(mixed):
    found = list(each_tensor(mixed))
    assert [(name, dtype) for name, dtype, _ in found] == [("ids", "I64"), ("w", "BF16")]
    np.testing.assert_array_equal(found[0][2], [3, -4])
    np.testing.assert_array_equal(found[1][2], [[1.5, -2.0], [3.25, np.inf]])
    assert found[1][2].dtype == np.float32


def test_all(mixed):
    tensors = read_safetensors(str(mixed))
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == {
        "ids": (np.int64, (2,)),
        "w": (np.float32, (2, 2)),
    }


def test_other_types_come_as_they_are(tmp_path):
    arrays = {"half": np.array([0.5], np.float16), "scalar": np.array(2.5), "none": np.zeros((0, 3), np.int8)}
    save_file(arrays, tmp_path / "x.safetensors")
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def test_what_cannot_be_read_is_named(mixed, tmp_path):
    mixed.write_bytes(mixed.read_bytes()[:-1])
    strange = write_raw(tmp_path / "fp8.safetensors", {"w": ("F8_E4M3", [1], b"\0")})
    for path in (mixed, strange, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=f"{path} cannot be read: "):
            read_safetensors(path)


def test_widen_bfloat16():
    wide = widen_bfloat16(np.array([0x3F80, 0x8000], np.uint16))
    np.testing.assert_array_equal(wide, np.array([1.0, -0.0], np.float32), strict=True)
    assert np.signbit(wide[1])
