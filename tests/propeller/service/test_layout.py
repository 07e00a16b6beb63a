"""Rows of requests, those of batches, and back. Pure: bundles are made by hand, and nothing is run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propeller.bundle import ArraySpec, Bundle
from propeller.errors import BadRequest, DataError, ExportError
from propeller.processor import Processor, register_processor
from propeller.service.layout import Layout
from propeller.service.wire import Request, WireArray

IDS = ArraySpec("ids", "int64", ("batch", "seq_len"), pad_value=9, max_value=9)
MASK = ArraySpec("mask", "int64", ("batch", "seq_len"))
WEIGHT = ArraySpec("weight", "float32", ("batch",))
POOLED = ArraySpec("pooled", "float32", ("batch", 2))
TOKENS = ArraySpec("tokens", "float32", ("batch", "seq_len", 2))


class NumbersProcessor(Processor):
    """Examples are `{"ids": [...]}`; a negative id is a `DataError`, and `raise` is raised."""

    name = "layout_numbers"

    def prepare(self, raws):
        for raw in raws:
            if "raise" in raw:
                raise raw["raise"]
            if min(raw["ids"]) < 0:
                raise DataError("ids must not be negative")
        return [
            {
                "ids": np.array(raw["ids"]), "mask": np.ones(len(raw["ids"]), np.int64),
                "num_ids": len(raw["ids"]), "name": "a text", "label": None, "offsets": np.zeros(3),
                **{name: raw[name] for name in ("grade", "weight") if name in raw},
            }
            for raw in raws
        ]  # fmt: skip

    def raw_of(self, value):
        return value if isinstance(value, dict) else value.no_such_thing

    def finish(self, outputs):
        raise AssertionError("the worker does that")

    parse = format = finish

    def metrics(self):
        return {}

    def save(self, folder):
        return {}

    @classmethod
    def load(cls, folder, settings):
        return cls()

    fingerprint = "1"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    from propeller import processor

    register_processor(NumbersProcessor)
    yield
    del processor._registered[NumbersProcessor.name]


def bundle(inputs=(IDS, MASK), outputs=(POOLED,), *, ignores_padding=True, limits=None, processor=False):
    named = {"name": NumbersProcessor.name, "settings": {}} if processor else None
    metadata = {"ignores_padding": ignores_padding, "processor": named}
    limits = {"seq_len": 8} if limits is None else limits
    return Bundle(Path("somewhere"), tuple(inputs), tuple(outputs), limits, {}, metadata, "0" * 64)


def layout(*args, **options):
    return Layout("small", bundle(*args, **options))


def request(*unnamed, raws=None, **named):
    arrays = [WireArray(None, np.asarray(values)) for values in unnamed]
    arrays += [WireArray(name, np.asarray(values)) for name, values in named.items()]
    return Request("r1", arrays=tuple(arrays), raws=raws)


ROWS = [[1, 2, 9, 9], [3, 9, 9, 9], [4, 5, 6, 7]]
ONES = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


class TestCheck:
    def test_by_name_and_by_place(self):
        by_name = layout().check(request(mask=ONES, ids=ROWS))
        by_place = layout().check(request(ROWS, ONES))
        for found in (by_name, by_place):
            assert list(found.arrays) == ["ids", "mask"]
            np.testing.assert_array_equal(found.arrays["ids"], ROWS)
            assert found.lengths == [2, 1, 4] and not found.extras
        assert by_name.num_bytes == 2 * 3 * 4 * 8

    def test_padding_at_the_end_does_not_count_unless_it_is_seen(self):
        assert layout().check(request(ROWS, ONES)).lengths == [2, 1, 4]
        # Longer than its ids, since the mask goes on; no less than one token.
        assert layout().check(request([[1, 9, 9], [9, 9, 9]], [[1, 1, 0], [0, 0, 0]])).lengths == [2, 1]
        assert layout(ignores_padding=False).check(request(ROWS, ONES)).lengths == [4, 4, 4]
        assert layout(outputs=[TOKENS]).check(request(ROWS, ONES)).lengths == [4, 4, 4]

    def test_older_clients(self):
        """A trailing axis of 1, and a mask of floats."""
        found = layout().check(request(np.array(ROWS)[..., None], np.array(ONES, np.float32)[..., None]))
        np.testing.assert_array_equal(found.arrays["mask"], ONES)
        assert {array.dtype for array in found.arrays.values()} == {np.dtype("int64")}
        assert found.lengths == [2, 1, 4]

    def test_without_tokens_each_row_counts_one(self):
        plain = layout([WEIGHT, ArraySpec("x", "float32", ("batch", 3))], limits={})
        assert plain.axis is None
        assert plain.check(request(weight=[1.0, 2.0], x=np.ones((2, 3)))).lengths == [1, 1]

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"ids": ROWS}, ["'mask' is missing", "ids int64 [batch, seq_len], mask int64 [batch, seq_len]"]),
            ({"ids": ROWS, "mask": ONES, "masc": ONES}, ["no input 'masc'", "Did you mean 'mask'"]),
            ({"ids": [1, 2], "mask": ONES}, ["'ids' must have the 2 axes [batch, seq_len]", "(2,)"]),
            ({"ids": np.array(ROWS) + 0.5, "mask": ONES}, ["'ids' must be int64, got float64 with 1.5"]),
            ({"ids": ROWS, "mask": np.ones((3, 3))}, ["'mask' has the shape (3, 3)", "in 'ids' has 4"]),
            ({"ids": np.ones((2, 9)), "mask": np.ones((2, 9))}, ["too long", "has 9; expected at most 8"]),
            ({"ids": [[0, 10]], "mask": [[1, 1]]}, ["the id 10 in row 0; expected 0 to 9"]),
            ({"ids": [[1, 1], [0, -1]], "mask": [[1, 1]] * 2}, ["the id -1 in row 1"]),
            ({"ids": np.ones((0, 4)), "mask": np.ones((0, 4))}, ["no rows; expected at least one"]),
            ({"ids": np.ones((2, 0)), "mask": np.ones((2, 0))}, ["'seq_len' of 'ids' has the size 0"]),
        ],
    )  # fmt: skip
    def test_what_the_bundle_does_not_take(self, given, words):
        with pytest.raises(BadRequest) as caught:
            layout().check(request(**given))
        assert caught.value.request_id == "r1"
        for word in words:
            assert word in str(caught.value)

    def test_too_few_by_place(self):
        with pytest.raises(BadRequest, match="Got 1 arrays without names; expected 2: ids int64"):
            layout().check(request(ROWS))


class TestPrepare:
    def test_arrays_lengths_and_what_rides_along(self):
        found = layout(processor=True).prepare(request(raws=[{"ids": [1, 2, 3]}, {"ids": [4]}]))
        np.testing.assert_array_equal(found.arrays["ids"], [[1, 2, 3], [4, 9, 9]])
        np.testing.assert_array_equal(found.arrays["mask"], [[1, 1, 1], [1, 0, 0]])
        assert found.lengths == [3, 1]
        assert list(found.extras) == ["num_ids"], "no texts, no None, one value a row"
        np.testing.assert_array_equal(found.extras["num_ids"], [3, 1])

    def test_pad_values_of_the_row_itself_count(self):
        assert layout(processor=True).prepare(request(raws=[{"ids": [1, 9, 9]}])).lengths == [3]

    @pytest.mark.parametrize(
        ("raws", "words"),
        [
            ([{"ids": [1]}, {"ids": [-1]}], "raws[1]: ids must not be negative"),
            ([{"ids": [-1]}], "ids must not be negative"),
            ([{"text_a": "x"}], "This input could not be answered (KeyError: 'ids')."),
            ([{"ids": [1]}, {"ids": None}], "raws[1]: This input could not be answered (TypeError: "),
            ([{"ids": [1], "raise": ZeroDivisionError()}], "could not be answered (ZeroDivisionError())."),
            ([3], "raws[0]: This input could not be answered (AttributeError: "),
            ([{"ids": [1] * 9}], "too long: axis 'seq_len' has 9; expected at most 8"),
            ([{"ids": [77]}], "the id 77 in row 0"),
        ],
    )
    def test_bad_examples(self, raws, words):
        with pytest.raises(BadRequest) as caught:
            layout(processor=True).prepare(request(raws=raws))
        assert words in str(caught.value) and caught.value.request_id == "r1"

    def test_a_bundle_without_processor(self):
        with pytest.raises(
            BadRequest, match=r"'small' was exported without a processor.*\(ids, mask\), not raws"
        ):
            layout().prepare(request(raws=[{"ids": [1]}]))

    def test_several_requests_at_once_are_as_each_alone(self):
        one = layout(outputs=[TOKENS], processor=True)
        lengths = [[3], [1, 4], [2], [8, 1]]
        raws = [[{"ids": [1] * n, **({"grade": 2} if n == 1 else {})} for n in own] for own in lengths]
        requests = [request(raws=own) for own in raws]
        for found, alone in zip(one.prepare_all(requests), map(one.prepare, requests), strict=True):
            assert found.lengths == alone.lengths and found.num_bytes == alone.num_bytes
            for name, array in {**alone.arrays, **alone.extras}.items():
                other = {**found.arrays, **found.extras}[name]
                assert other.dtype == array.dtype and other.base is None
                np.testing.assert_array_equal(other, array)
            assert found.arrays.keys() == alone.arrays.keys() and found.extras.keys() == alone.extras.keys()

    def test_one_of_several_requests_is_bad(self):
        with pytest.raises(DataError, match="ids must not be negative"):
            layout(processor=True).prepare_all([request(raws=[{"ids": [n]}]) for n in (1, -1)])

    def test_numbers_of_several_types_are_not_mixed(self):
        """A column of them is made of the request alone, so that no neighbour changes its precision."""
        one = layout(inputs=[WEIGHT], outputs=[POOLED], processor=True)
        requests = [request(raws=[{"ids": [1], "weight": weight}]) for weight in (0.5, 1 << 25)]
        assert one.prepare_all(requests[:1])[0].arrays["weight"].tolist() == [0.5]
        with pytest.raises(DataError, match="numbers of several types"):
            one.prepare_all(requests)

    def test_several_threads(self):
        one, together = layout(processor=True), threading.Barrier(2)

        def prepare(number):
            together.wait(30)
            return one.prepare(request(raws=[{"ids": [number] * 4}] * 50)).arrays["ids"]

        with ThreadPoolExecutor(2) as pool:
            for number, found in enumerate(pool.map(prepare, range(2))):
                np.testing.assert_array_equal(found, np.full((50, 4), number))


class TestBatches:
    def test_rows_of_several_requests_are_padded_and_cut(self):
        one = layout()
        first = one.check(request(ROWS, ONES)).arrays
        second = one.check(request([[8]], [[1]])).arrays
        padded = one.pad([(first, [2, 0], [0, 1]), (second, [1], [0])], num_rows=3, length=2)
        np.testing.assert_array_equal(padded["ids"], [[3, 9], [8, 9], [1, 2]])
        np.testing.assert_array_equal(padded["mask"], [[1, 0], [1, 0], [1, 1]])
        assert {array.dtype for array in padded.values()} == {np.dtype("int64")}

    def test_axes_of_other_names_have_room_for_the_widest(self):
        wide = ArraySpec("words", "float32", ("batch", "seq_len", "chars"), pad_value=-1)
        one = layout([IDS, wide])
        parts = [
            ({"ids": np.ones((1, 2), np.int64), "words": np.ones((1, 2, width), np.float32)}, [place], [0])
            for place, width in enumerate((1, 3))
        ]
        padded = one.pad(parts, num_rows=2, length=3)
        assert padded["words"].shape == (2, 3, 3)
        np.testing.assert_array_equal(padded["words"][0], [[1, -1, -1], [1, -1, -1], [-1, -1, -1]])

    def test_columns_of_all_examples_ride_along(self):
        one = layout(processor=True)
        assert set(one.prepare(request(raws=[{"ids": [1], "grade": 1}] * 2)).extras) == {"num_ids", "grade"}
        for raws in ([{"ids": [1], "grade": 1}, {"ids": [2]}], [{"ids": [1]}, {"ids": [2], "grade": 1}]):
            assert set(one.prepare(request(raws=raws)).extras) == {"num_ids"}

    def test_outputs_come_back_in_the_order_of_the_request(self):
        one = layout(outputs=[POOLED, TOKENS], processor=True)
        inputs = one.prepare(request(raws=[{"ids": [1] * n} for n in (3, 1, 4)]))
        # Rows 2 and 0 were in a batch of width 4, row 1 alone in one of width 2.
        parts = [
            ([2, 0], {"pooled": np.array([[2, 2], [0, 0]], np.float32), "tokens": np.full((2, 4, 2), 5.0)}),
            ([1], {"pooled": np.array([[1, 1]], np.float32), "tokens": np.full((1, 2, 2), 7.0)}),
        ]
        pooled, tokens, num_ids = one.join(parts, inputs)
        assert (pooled.name, tokens.name, num_ids.name) == ("pooled", "tokens", "num_ids")
        np.testing.assert_array_equal(pooled.values[:, 0], [0, 1, 2])
        assert tokens.values.shape == (3, 4, 2) and tokens.values.dtype == np.float32
        np.testing.assert_array_equal(tokens.values[1, :, 0], [7, 7, 0, 0])
        assert (tokens.values[[0, 2]] == 5).all()
        np.testing.assert_array_equal(num_ids.values, [3, 1, 4])

    def test_outputs_are_as_wide_as_the_request(self):
        one = layout(outputs=[TOKENS])
        inputs = one.check(request([[1, 2]], [[1, 1]]))
        (tokens,) = one.join([([0], {"tokens": np.ones((1, 16, 2), np.float32)})], inputs)
        assert tokens.values.shape == (1, 2, 2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
            lambda lengths: [list(range(1, 1 + length)) for length in lengths]
        ),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_there_and_back(requests, random, batch_rows, extra_width):
    """However rows are dealt to batches, each request gets its own, through a model that gives its ids."""
    echo = ArraySpec("echo", "int64", ("batch", "seq_len"))
    one = layout(outputs=[echo], limits={}, processor=True)
    prepared = [one.prepare(request(raws=[{"ids": ids} for ids in rows])) for rows in requests]
    todo = [(number, row) for number, rows in enumerate(requests) for row in range(len(rows))]
    random.shuffle(todo)
    parts = [[] for _ in requests]
    for start in range(0, len(todo), batch_rows):
        batch = todo[start : start + batch_rows]
        length = extra_width + max(prepared[number].lengths[row] for number, row in batch)
        given_parts, places_of = [], {}
        for place, (number, row) in enumerate(batch):
            places, rows = places_of.setdefault(number, ([], []))
            places.append(place)
            rows.append(row)
        for number, (places, rows) in places_of.items():
            given_parts.append((prepared[number].arrays, places, rows))
        made = one.pad(given_parts, len(batch), length)
        for number, (places, rows) in places_of.items():
            parts[number].append((rows, {"echo": made["ids"][places]}))
    for number, rows in enumerate(requests):
        found, num_ids = one.join(parts[number], prepared[number])
        assert num_ids.values.tolist() == [len(ids) for ids in rows]
        assert found.values.shape == (len(rows), max(map(len, rows)))
        for ids, values in zip(rows, found.values.tolist(), strict=True):
            assert values[: len(ids)] == ids
            assert set(values[len(ids) :]) <= {0, IDS.pad_value}


@pytest.mark.parametrize(
    ("inputs", "outputs", "ignores_padding", "words"),
    [
        ([ArraySpec("ids", "int64", (4, "seq_len"))], [POOLED], True, "must begin with the same axis"),
        ([IDS, ArraySpec("table", "float32", ("rows", 2))], [POOLED], True, "must begin with the same axis"),
        ([IDS], [ArraySpec("mean", "float32", ())], True, "must begin with the same axis"),
        ([IDS], [ArraySpec("mean", "float32", (1,))], True, "must begin with the same axis"),
        (
            [IDS, ArraySpec("passage", "int64", ("batch", "passage_len"))], [POOLED], False,
            "vary along passage_len, seq_len, and padding changes its outputs",
        ),
    ],
)  # fmt: skip
def test_bundles_that_cannot_be_served(inputs, outputs, ignores_padding, words):
    with pytest.raises(ExportError, match=words):
        layout(inputs, outputs, ignores_padding=ignores_padding, limits={})


def test_a_processor_that_is_not_there():
    broken = bundle()
    broken.metadata["processor"] = {"name": "layout_numbres", "settings": {}}
    with pytest.raises(ExportError, match="Did you mean 'layout_numbers'"):
        Layout("small", broken)
