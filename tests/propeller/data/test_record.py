"""Record files: what goes in comes out; damage is found."""

from __future__ import annotations

import json
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from propeller.data import Dataset, RecordFile, RecordWriter
from propeller.errors import DataError


def written(path, records, **metadata):
    with RecordWriter(path) as writer:
        writer.metadata.update(metadata)
        for record in records:
            writer.write(record)
    return RecordFile(path)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        if isinstance(value, (np.ndarray, np.generic)):
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


dtypes = st.sampled_from("? i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 c8".split()).map(np.dtype)
arrays = np_st.arrays(dtypes, np_st.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
text = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
values = (
    arrays
    | np_st.arrays(dtypes, ()).map(lambda array: array[()])
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | text
    | st.binary(max_size=8)
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(records=st.lists(st.dictionaries(text, values, max_size=4), max_size=8))
def test_what_is_written_is_read(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "a"
    file = written(path, records)
    assert len(file) == len(records)
    file.verify()
    for index, record in enumerate(records):
        assert_same(file[index], record)


def test_many_blocks_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr("propeller.data.record._BLOCK_RECORDS", 7)
    monkeypatch.setattr("propeller.data.record._BLOCK_BYTES", 400)
    records = [{"ids": np.arange(k % 13) + k, "text": "é" * (k % 5), "label": k} for k in range(100)]
    file = written(tmp_path / "a", records, made="by a test")
    order = list(range(100))
    random.Random(0).shuffle(order)
    for index in order:
        assert_same(file[index], records[index])
    assert file.metadata == {"made": "by a test"}


def test_ids_take_little_room(tmp_path):
    rng = np.random.default_rng(0)
    written(
        tmp_path / "a",
        [{"ids": rng.integers(0, 30_000, 100), "types": np.zeros(100, int)} for _ in range(50)],
    )
    assert (tmp_path / "a").stat().st_size < 50 * (100 * 3 + 10) + 1000


def test_lone_surrogates_and_control_characters_survive(tmp_path):
    record = {"\ud800": "\udfff\x00\u2028\n😀", "bytes": b"\xff\x00"}
    assert_same(written(tmp_path / "a", [record])[0], record)


def test_arrays_are_copies_on_both_sides(tmp_path):
    buffer = np.array([1, 2, 3])
    with RecordWriter(tmp_path / "a") as writer:
        for _ in range(2):
            writer.write({"x": buffer})
            buffer += 10
    file = RecordFile(tmp_path / "a")
    file[0]["x"][:] = 0
    assert [file[index]["x"].tolist() for index in range(2)] == [[1, 2, 3], [11, 12, 13]]


def test_index_out_of_range(tmp_path):
    file = written(tmp_path / "a", [{"x": 1}])
    for index in (1, -1):
        with pytest.raises(IndexError):
            file[index]
    assert len(written(tmp_path / "b", [])) == 0


@pytest.mark.parametrize(
    "value, found",
    [
        (None, "NoneType"),
        ([1], "list"),
        (2**63, "int"),
        (np.array(["a"]), "array of <U1"),
        (np.array([{}]), "object"),
    ],
)
def test_what_cannot_be_held_is_named(tmp_path, value, found):
    with pytest.raises(DataError, match=f"'x' is {found}|'x' is array of {found}"):
        written(tmp_path / "a", [{"x": value}])
    assert os.listdir(tmp_path) == []


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    written(path, [{"x": 1}])
    with pytest.raises(RuntimeError):
        with RecordWriter(path) as writer:
            writer.write({"x": 2})
            raise RuntimeError
    assert os.listdir(tmp_path) == ["a"]
    assert RecordFile(path)[0] == {"x": 1}
    writer = RecordWriter(path)
    writer.write({"x": 3})
    assert RecordFile(path)[0] == {"x": 1}
    writer.close()
    assert os.listdir(tmp_path) == ["a"]
    assert RecordFile(path)[0] == {"x": 3}


def test_an_open_file_outlives_its_replacement(tmp_path):
    file = written(tmp_path / "a", [{"x": k} for k in range(5)])
    written(tmp_path / "a", [{"x": 9}])
    assert [file[k]["x"] for k in range(5)] == list(range(5))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path / "a")
    writer._stream.close()
    writer._stream = open("/dev/full", "wb")
    writer.write({"x": np.arange(100_000)})
    with pytest.raises(DataError, match=r"/a: cannot be written: No space left"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_names_the_file(tmp_path):
    with pytest.raises(DataError, match="b: cannot be written: No such file"):
        RecordWriter(tmp_path / "a" / "b")


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    records = [{"ids": np.arange(k), "text": f"text {k}", "label": k} for k in range(6)]
    path = tmp_path / "a"
    written(path, records)
    whole = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", whole, len(whole) - 28)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(DataError, match=f"^{path}: ") as caught:
            RecordFile(path).verify()
        if 8 <= place < offset:
            assert "records 1 to 6 are damaged" in str(caught.value)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"^{path}: "):
            RecordFile(path)


def test_damage_in_one_block_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("propeller.data.record._BLOCK_RECORDS", 2)
    path = tmp_path / "a"
    written(path, [{"x": "a" * 50}, {"x": "b" * 50}, {"x": "c" * 50}])
    path.write_bytes(path.read_bytes().replace(b"bbb", b"bBb", 1))
    file = RecordFile(path)
    assert file[2]["x"] == "c" * 50
    with pytest.raises(DataError, match="records 1 to 2 are damaged"):
        file[0]
    with pytest.raises(DataError, match="a: records 1 to 2 are damaged"):
        list(Dataset.from_record_file(path))


def test_other_files_and_versions_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text(json.dumps({"no": "record file"}) * 10)
    with pytest.raises(DataError, match="is not a record file"):
        RecordFile(path)
    with pytest.raises(DataError, match="gone: cannot be opened: No such file"):
        Dataset.from_record_file(tmp_path / "gone")
    monkeypatch.setattr("propeller.data.record.FORMAT_VERSION", 99)
    written(path, [{"x": 1}])
    monkeypatch.undo()
    with pytest.raises(DataError, match="format version 99; this release reads version 1"):
        RecordFile(path)
