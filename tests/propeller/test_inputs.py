"""Inputs: what fits, what is cast, and what is refused before a model sees it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from propeller.bundle import ArraySpec
from propeller.errors import DataError
from propeller.inputs import check_inputs, match_inputs, row_lengths

SPECS = (
    ArraySpec("input_ids", "int64", ("batch", "seq_len"), pad_value=1, max_value=99),
    ArraySpec("mask", "float32", ("batch", "seq_len")),
    ArraySpec("group", "int32", ("batch", 2)),
)
WANTED = r"input_ids int64 \[batch, seq_len\], mask float32 \[batch, seq_len\], group int32 \[batch, 2\]"
LIMITS = {"seq_len": 6}
DTYPES = ["bool", "int8", "int32", "int64", "uint8", "uint64", "float16", "float32", "float64"]


def make_arrays(**changes):
    arrays = {
        "input_ids": np.array([[5, 6, 7, 1], [8, 0, 99, 9], [5, 1, 1, 1]]),
        "mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], np.float32),
        "group": np.array([[0, 1], [2, 3], [4, 5]], np.int32),
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def one(dtype, values, max_value=None):
    """The only input of a bundle, checked."""
    return check_inputs([ArraySpec("x", dtype, ("batch",), max_value=max_value)], {"x": values}, {})["x"]


class TestWhatFits:
    def test_is_not_copied(self):
        arrays = make_arrays()
        checked = check_inputs(SPECS, dict(reversed(arrays.items())), LIMITS)
        assert list(checked) == ["input_ids", "mask", "group"]
        for name, array in arrays.items():
            assert np.shares_memory(checked[name], array)

    def test_read_only_arrays(self):
        arrays = make_arrays()
        for array in arrays.values():
            array.flags.writeable = False
        assert check_inputs(SPECS, arrays, LIMITS).keys() == arrays.keys()

    def test_a_trailing_axis_of_one_is_dropped(self):
        arrays = make_arrays()
        checked = check_inputs(SPECS, {name: array[..., None] for name, array in arrays.items()}, LIMITS)
        for name, array in arrays.items():
            np.testing.assert_array_equal(checked[name], array)
            assert np.shares_memory(checked[name], array)

    def test_order_in_memory_and_of_bytes(self):
        arrays = make_arrays()
        strange = {name: np.asfortranarray(array).astype(array.dtype.newbyteorder(">"))
                   for name, array in arrays.items()}  # fmt: skip
        for name, array in check_inputs(SPECS, strange, LIMITS).items():
            np.testing.assert_array_equal(array, arrays[name])
            assert array.flags.c_contiguous and array.dtype == arrays[name].dtype and array.dtype.isnative

    def test_lists(self):
        arrays = make_arrays()
        checked = check_inputs(SPECS, {name: array.tolist() for name, array in arrays.items()}, LIMITS)
        for name, array in arrays.items():
            np.testing.assert_array_equal(checked[name], array)

    def test_at_the_limits(self):
        arrays = make_arrays(input_ids=np.full((3, 6), 99), mask=np.ones((3, 6), np.float32))
        assert check_inputs(SPECS, arrays, LIMITS)["input_ids"].shape == (3, 6)
        check_inputs(SPECS, arrays, {})


class TestCasts:
    @pytest.mark.parametrize(
        ("given", "dtype"),
        [
            (np.array([1, 0], np.int32), "int64"),
            (np.array([1, 2**31 - 1]), "int32"),
            (np.array([2**63 - 1], np.uint64), "int64"),
            (np.array([0, 255], np.int64), "uint8"),
            (np.array([1.0, -0.0, 3.0], np.float32), "int64"),
            (np.array([-(2.0**63)]), "int64"),
            (np.array([2.0**53]), "int64"),
            (np.array([7.0], np.float16), "int32"),
            (np.array([1, 2**24]), "float32"),
            (np.array([3], np.uint8), "float16"),
            (np.array([True, False]), "int64"),
            (np.array([True, False]), "float32"),
            (np.array([0.5, np.nan, np.inf], np.float16), "float32"),
            (np.array([0.5, np.nan, -np.inf], np.float64), "float32"),
        ],
    )
    def test_the_values_stay(self, given, dtype):
        cast = one(dtype, given)
        assert cast.dtype == dtype
        same = [a == b or a != a and b != b for a, b in zip(cast.tolist(), given.tolist(), strict=True)]
        assert all(same), cast

    def test_floats_are_rounded(self):
        np.testing.assert_array_equal(one("float32", np.array([0.1, 1e-60])), np.array([0.1, 0], np.float32))

    @pytest.mark.parametrize(
        ("given", "dtype", "value"),
        [
            (np.array([1, 2**31]), "int32", "2147483648"),
            (np.array([1, -1]), "uint8", "-1"),
            (np.array([2**63], np.uint64), "int64", "9223372036854775808"),
            (np.array([1, 0.5]), "int64", "0.5"),
            (np.array([2.0**63]), "int64", "9.223372036854776e+18"),
            (np.array([1e30, 0.5]), "int64", "1e+30"),
            (np.array([1, np.nan]), "int64", "nan"),
            (np.array([-np.inf], np.float32), "int32", "-inf"),
            (np.array([2**24 + 1]), "float32", "16777217"),
            (np.array([70_000]), "float16", "70000"),
            (np.array([1.0, 1e300]), "float32", "1e+300"),
        ],
    )
    def test_a_value_that_would_change(self, given, dtype, value):
        message = f"must be {dtype}, got {given.dtype} with {value}, which {dtype} cannot hold"
        with pytest.raises(DataError, match=re.escape(message)):
            one(dtype, given)

    @pytest.mark.parametrize(
        ("given", "dtype"),
        [
            (np.array(["1"]), "int64"),
            (np.array([b"1"]), "int64"),
            (np.array([None]), "int64"),
            (np.array([1], object), "int64"),
            (np.array([1j]), "float32"),
            (np.array(["2020-01-01"], "datetime64[D]"), "int64"),
            (np.array([1], "timedelta64[s]"), "int64"),
            (np.array([1]), "bool"),
            (np.array([1.0]), "bool"),
        ],
    )
    def test_other_types(self, given, dtype):
        with pytest.raises(DataError, match=f"'x' must be {dtype}, got {re.escape(str(given.dtype))}"):
            one(dtype, given)

    @given(st.sampled_from(DTYPES[1:]), hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), st.integers(1, 4)))
    @settings(max_examples=300, deadline=None)
    def test_whatever_comes_stays_or_is_refused(self, dtype, values):
        try:
            cast = one(dtype, values)
        except DataError:
            return
        assert cast.dtype == dtype
        to_float = np.dtype(dtype).kind == "f"
        if values.dtype.kind == "f" and to_float:
            np.testing.assert_array_equal(np.isfinite(cast), np.isfinite(values))
        elif not (to_float and values.dtype.itemsize == 8):  # numpy counts int64 to float64 as safe
            assert [int(value) for value in cast] == [int(value) for value in values]


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mask": None}, rf"Input 'mask' is missing; got \['group', 'input_ids'\]. Expected {WANTED}"),
            ({"mask": None, "group": None}, "Input 'mask', 'group' is missing"),
            ({"mask": None, "maks": np.ones(3)}, f"no input 'maks'. Did you mean 'mask'. Expected {WANTED}"),
            ({"label": np.ones(3)}, f"There is no input 'label'. Expected {WANTED}"),
            ({"input_ids": np.ones(3, int)}, r"have the 2 axes \[batch, seq_len\], got the shape \(3,\)"),
            ({"input_ids": np.ones((3, 4, 2), np.int64)}, r"got the shape \(3, 4, 2\)"),
            ({"input_ids": np.ones((3, 4, 1, 1), np.int64)}, r"got the shape \(3, 4, 1, 1\)"),
            ({"input_ids": np.int64(3)}, r"got the shape \(\)"),
            ({"input_ids": [[1], [1, 2]]}, "'input_ids' is no array: .*inhomogeneous"),
            ({"mask": np.ones((2, 4))}, r"'mask' has the shape \(2, 4\) .* 'batch' in 'input_ids' has 3"),
            ({"mask": np.ones((3, 5))}, r"the axes \[batch, seq_len\], .* 'seq_len' in 'input_ids' has 4"),
            ({"group": np.ones((3, 3), int)}, "axis 2 is fixed at 2"),
            (
                {"input_ids": np.ones((3, 7), int), "mask": np.ones((3, 7))},
                "'input_ids' is too long: axis 'seq_len' has 7; expected at most 6",
            ),
            (
                {"input_ids": np.ones((3, 0), int), "mask": np.ones((3, 0))},
                "Axis 'seq_len' of 'input_ids' has the size 0; expected at least 1",
            ),
            ({"input_ids": np.ones((0, 4), int)}, "The batch has no rows; expected at least one"),
        ],
    )
    def test_what_does_not_fit(self, changes, message):
        with pytest.raises(DataError, match=message):
            check_inputs(SPECS, make_arrays(**changes), LIMITS)

    @pytest.mark.parametrize("value", [-1, 100, 2**62, -(2**63)])
    @pytest.mark.parametrize("dtype", ["int64", "float64"])
    def test_ids_out_of_range(self, value, dtype):
        ids = make_arrays()["input_ids"].astype(dtype)
        ids[1, 2] = value
        message = f"'input_ids' holds the id {value} in row 1; expected 0 to 99"
        with pytest.raises(DataError, match=message):
            check_inputs(SPECS, make_arrays(input_ids=ids), LIMITS)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64"])
    def test_ids_of_all_widths(self, dtype):
        assert one(dtype, np.array([0, 100], dtype), max_value=100).dtype == dtype
        with pytest.raises(DataError, match="holds the id 101 in row 2; expected 0 to 100"):
            one(dtype, np.array([0, 100, 101], dtype), max_value=100)

    def test_a_range_wider_than_the_type(self):
        assert one("int8", np.array([127], np.int8), max_value=1000) == 127
        with pytest.raises(DataError, match="holds the id -1 in row 0"):
            one("int64", np.array([-1]), max_value=2**63 - 1)


class TestMatch:
    def test_by_place(self):
        arrays = make_arrays()
        matched = match_inputs(SPECS, list(arrays.values()))
        assert list(matched) == list(arrays)
        assert all(matched[name] is array for name, array in arrays.items())

    @pytest.mark.parametrize("count", [0, 2, 4])
    def test_wrong_count(self, count):
        with pytest.raises(DataError, match=f"Got {count} arrays without names; expected 3: {WANTED}"):
            match_inputs(SPECS, [np.ones(1)] * count)


class TestRowLengths:
    def test_all_inputs_with_the_axis_count(self):
        arrays = make_arrays()
        lengths = row_lengths(SPECS, arrays, "seq_len")
        assert lengths.dtype == np.int64
        assert lengths.tolist() == [3, 4, 1]
        arrays["mask"][2, 2] = 0.5
        assert row_lengths(SPECS, arrays, "seq_len").tolist() == [3, 4, 3]

    def test_padding_inside_counts_and_a_row_of_it_has_one(self):
        spec = ArraySpec("x", "int64", ("batch", "seq_len"), pad_value=7)
        rows = np.array([[7, 1, 7, 1, 7], [7, 7, 7, 7, 7], [7, 7, 7, 7, 0], [3, 7, 7, 7, 7]])
        assert row_lengths([spec], {"x": rows}, "seq_len").tolist() == [4, 1, 5, 1]

    def test_more_axes_behind_it(self):
        spec = ArraySpec("x", "float32", ("batch", "seq_len", 2, "deep"))
        values = np.zeros((3, 4, 2, 3), np.float32)
        values[0, 1, 1, 2] = values[2, 3, 0, 0] = 1
        assert row_lengths([spec], {"x": values}, "seq_len").tolist() == [2, 1, 4]

    def test_no_input_with_that_axis(self):
        specs = [ArraySpec("x", "float32", ("batch", 2)), ArraySpec("y", "float32", ("batch", 2, "seq_len"))]
        arrays = {"x": np.ones((3, 2)), "y": np.ones((3, 2, 4))}
        assert row_lengths(specs, arrays, "seq_len").tolist() == [1, 1, 1]

    @given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, 2)))
    @settings(deadline=None)
    def test_cutting_by_it_loses_padding_only(self, ids):
        spec = ArraySpec("x", "int64", ("batch", "seq_len"), pad_value=1)
        for row, length in zip(ids, row_lengths([spec], {"x": ids}, "seq_len"), strict=True):
            assert (row[length:] == 1).all()
            assert length == 1 or row[length - 1] != 1
