"""Pad, Stack, Tuple and Dict: what PaddleNLP's documentation shows; errors where numbers would be lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propeller.data import Dict, Pad, Stack, Tuple, pad_batch
from propeller.errors import ConfigError, DataError

IDS = [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
PADDED = [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]]
LEFT = [[1, 2, 3, 4], [0, 5, 6, 7], [0, 0, 8, 9]]


def check(found, expected, dtype="int64"):
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    assert found.tolist() == expected


# Pad


@pytest.mark.parametrize(
    ("pad", "expected", "dtype"),
    [
        (Pad(), PADDED, "int64"),
        (Pad(0, 0, False, "int32"), PADDED, "int32"),
        (Pad(pad_right=False), LEFT, "int64"),
        (Pad(axis=-1, pad_val=-1), [[1, 2, 3, 4], [5, 6, 7, -1], [8, 9, -1, -1]], "int64"),
        (Pad(dtype="float32", pad_val=0.5), [[1, 2, 3, 4], [5, 6, 7, 0.5], [8, 9, 0.5, 0.5]], "float32"),
    ],
)
def test_pad(pad, expected, dtype):
    check(pad(IDS), expected, dtype)
    check(pad([np.array(ids) for ids in IDS]), expected, dtype)
    check(pad(tuple(map(tuple, IDS))), expected, dtype)


@pytest.mark.parametrize(("given", "dtype"), [(True, "int32"), ("int64", "int64"), (np.int16, "int16")])
def test_pad_with_lengths(given, dtype):
    padded, lengths = Pad(ret_length=given)(IDS)
    check(padded, PADDED)
    check(lengths, [4, 3, 2], dtype)


@pytest.mark.parametrize("given", [False, None])
def test_pad_without_lengths(given):
    check(Pad(ret_length=given)(IDS), PADDED)


def test_pad_along_another_axis():
    fields = [np.full((2, size), size) for size in (3, 1)]
    check(Pad(axis=1)(fields), [[[3, 3, 3]] * 2, [[1, 0, 0]] * 2])
    check(Pad(axis=-1, pad_right=False)(fields), [[[3, 3, 3]] * 2, [[0, 0, 1]] * 2])
    padded, lengths = Pad(ret_length=True)([np.ones((2, 2), "float32"), np.ones((1, 2), "float32")])
    check(padded, [[[1, 1], [1, 1]], [[1, 1], [0, 0]]], "float32")
    check(lengths, [2, 1], "int32")


def test_pad_takes_the_dtype_of_the_fields():
    check(Pad(-1)([np.array([1, 2], "int8"), np.array([3], "int8")]), [[1, 2], [3, -1]], "int8")
    check(Pad()([[1.5], [2, 3]]), [[1.5, 0], [2, 3]], "float32")
    # Not cut off, whichever comes first.
    check(Pad()([np.array([1], "int32"), np.array([1.5, 2])]), [[1, 0], [1.5, 2]], "float64")
    check(Pad()([[], [1, 2]]), [[0, 0], [1, 2]])
    check(Pad()([[1], np.array([], "int64")]), [[1], [0]])


@given(
    st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(-9, 9),
    st.booleans(),
)
@settings(deadline=None)
def test_what_was_padded_is_found_again(rows, pad_val, pad_right):
    padded, lengths = Pad(pad_val, ret_length=True, pad_right=pad_right)(rows)
    assert padded.shape == (len(rows), max(map(len, rows)))
    for row, length, values in zip(padded, lengths, rows, strict=True):
        inside = row[:length] if pad_right else row[len(row) - length :]
        outside = row[length:] if pad_right else row[: len(row) - length]
        assert inside.tolist() == values
        assert set(outside.tolist()) <= {pad_val}


@pytest.mark.parametrize(
    ("pad", "samples", "kind", "message"),
    [
        (Pad(), [], ConfigError, "Pad() got no sample"),
        (Pad(), [1, 2], ConfigError, "axis 0, but a field has 0 axes; numbers go into Stack"),
        (Pad(axis=1), [[1]], ConfigError, "axis 1, but a field has 1 axes"),
        (Pad(0.5), IDS, ConfigError, "pad value 0.5, which int64 cannot hold"),
        (Pad(300, dtype="uint8"), [[1]], ConfigError, "pad value 300, which uint8 cannot hold"),
        (Pad("x"), IDS, ConfigError, "pad value 'x', which int64 cannot hold"),
        (Pad(), [[1], ["a"]], DataError, "['a'] in sample 1; expected numbers"),
        (Pad(), [[1], None], DataError, "None in sample 1; expected numbers"),
        (Pad(), [[[1], [2, 3]]], DataError, "in sample 0, no array"),
        (Pad(), [[1], [[2]]], DataError, "shape [1, 1] in sample 1, [1] in the first"),
        (Pad(), [np.ones((1, 2)), np.ones((1, 3))], DataError, "shape [1, 3] in sample 1, [1, 2]"),
        (Pad(dtype="int64"), [[1.5]], DataError, "1.5, which int64 cannot hold"),
        (Pad(dtype="int8"), [[1, 200]], DataError, "200, which int8 cannot hold"),
        (Pad(dtype="int64"), [[float("nan")]], DataError, "nan, which int64 cannot hold"),
    ],
)
def test_what_pad_refuses(pad, samples, kind, message):
    with pytest.raises(kind) as caught:
        pad(samples)
    assert message in str(caught.value)


# Stack


def test_stack():
    check(Stack()([[1, 2], [3, 4], [5, 6]]), [[1, 2], [3, 4], [5, 6]])
    check(Stack(axis=1)([[1, 2], [3, 4], [5, 6]]), [[1, 3, 5], [2, 4, 6]])
    check(Stack(-1)([[1, 2], [3, 4]]), [[1, 3], [2, 4]])
    check(Stack(dtype="int64")([1, 2.0]), [1, 2])
    check(Stack()([1, 2.5]), [1, 2.5], "float32")
    check(Stack()([0.5, 0.25]), [0.5, 0.25], pad_batch([{"x": 0.5}, {"x": 0.25}])["x"].dtype)
    check(Stack()([np.float64(0.1), 0.2]), [0.1, 0.2], "float64")
    check(Stack(dtype="float64")([0.1, 0.2]), [0.1, 0.2], "float64")
    check(Stack(dtype="float32")([[1], [2]]), [[1], [2]], "float32")
    check(Stack(dtype="bool")([0, 2]), [False, True], "bool")
    assert Stack()(["a", "bc"]).tolist() == ["a", "bc"]


@pytest.mark.parametrize(
    ("stack", "samples", "kind", "message"),
    [
        (Stack(), [], ConfigError, "Stack() got no sample"),
        (Stack(axis=2), [[1], [2]], ConfigError, "axis 2, but the result has 2 axes"),
        (Stack(), IDS, DataError, "shape [3] in sample 1, [4] in the first; expected one shape. Use Pad"),
        (Stack(), [{"a": 1}], DataError, "expected numbers or text"),
        (Stack(dtype="int64"), [1, 1.7], DataError, "1.7, which int64 cannot hold"),
        (Stack(dtype="int64"), [1, "x"], DataError, "'x' in sample 1; expected numbers"),
    ],
)
def test_what_stack_refuses(stack, samples, kind, message):
    with pytest.raises(kind) as caught:
        stack(samples)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [Pad, Stack])
def test_a_dtype_that_is_none(make):
    with pytest.raises(ConfigError, match="there is no dtype 'int65'"):
        make(dtype="int65")


# Tuple


def test_tuple_gives_each_field_to_its_function():
    samples = [([1, 2], [1]), [[3], [0]]]
    for batchify in (Tuple(Pad(), Stack()), Tuple((Pad(), Stack())), Tuple([Pad(), Stack()])):
        ids, labels = batchify(samples)
        check(ids, [[1, 2], [3, 0]])
        check(labels, [[1], [0]])


def test_tuple_is_flat():
    batchify = Tuple(Pad(ret_length=True), Tuple(Pad(), Stack()), lambda texts: texts[0])
    ids, lengths, more, labels, text = batchify([([1, 2], ([1], 2), "a"), ([3], ([0], 3), "b")])
    assert isinstance(batchify([([1], ([1], 2), "a")]), tuple)
    check(ids, [[1, 2], [3, 0]])
    check(lengths, [2, 1], "int32")
    check(more, [[1], [0]])
    check(labels, [2, 3])
    assert text == "a"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Tuple(Pad(), 3), ConfigError, "Tuple() got 3 as function 1; expected a function"),
        (lambda: Tuple([Pad()], Stack()), ConfigError, "a list of functions and more beside it"),
        (lambda: Tuple(Pad())([]), ConfigError, "Tuple() got no sample"),
        (lambda: Tuple(Pad())([([1],), ([1], 2)]), DataError, "2 fields in sample 1; expected a tuple of 1"),
        (lambda: Tuple(Pad())([{"a": 1}]), DataError, "Use Dict for fields by name"),
        (lambda: Tuple(Pad())([3]), DataError, "got 3 in sample 0"),
    ],
)
def test_what_tuple_refuses(make, kind, message):
    with pytest.raises(kind) as caught:
        make()
    assert message in str(caught.value)


# Dict


SAMPLES = [
    {"labels": [1], "token_ids": [1, 2, 3, 4], "text": "a"},
    {"labels": [0], "token_ids": [5, 6, 7], "text": "b"},
    {"labels": [1], "token_ids": [8, 9], "text": "c"},
]


def test_dict_in_the_order_of_its_functions():
    ids, labels = Dict({"token_ids": Pad(pad_val=0), "labels": Stack(dtype="int64")})(SAMPLES)
    check(ids, PADDED)
    check(labels, [[1], [0], [1]])
    ids, lengths = Dict({"token_ids": Pad(ret_length=True)})(SAMPLES)
    check(lengths, [4, 3, 2], "int32")


def test_dict_by_name():
    batchify = Dict({"token_ids": Pad(ret_length=True), "labels": Stack(), "text": list})
    batch = batchify.as_dict(SAMPLES)
    assert list(batch) == ["token_ids", "token_ids_length", "labels", "text"]
    check(batch["token_ids"], PADDED)
    check(batch["token_ids_length"], [4, 3, 2], "int32")
    assert batch["text"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Dict([Pad()]), ConfigError, "expected a dict of name to function"),
        (lambda: Dict({"a": 3}), ConfigError, "Dict() got 3 for 'a'; expected a function"),
        (lambda: Dict({"a": Pad()})([]), ConfigError, "Dict() got no sample"),
        (lambda: Dict({"token_id": Pad()})(SAMPLES), DataError, "Did you mean 'token_ids'?"),
        (lambda: Dict({"a": Pad()})([([1],)]), DataError, "Use Tuple for tuples"),
    ],
)
def test_what_dict_refuses(make, kind, message):
    with pytest.raises(kind) as caught:
        make()
    assert message in str(caught.value)
