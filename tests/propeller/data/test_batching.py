"""Batches: padding, dtypes, budgets, and groups of like length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propeller.data import Dataset, pad_batch
from propeller.errors import ConfigError, DataError


def of_length(*lengths):
    return Dataset.from_list([{"id": index, "ids": np.full(n, index)} for index, n in enumerate(lengths)])


def test_a_batch_of_every_kind_of_value():
    batch = pad_batch(
        [
            {
                "ids": np.array([1, 2, 3]),
                "weights": np.array([0.5], np.float32),
                "mask": np.array([True]),
                "spans": np.array([[1, 2], [3, 4]], np.int32),
                "label": 1,
                "score": 0.25,
                "small": np.int8(4),
                "zero_d": np.array(2.0, np.float16),
                "flag": True,
                "text": "a",
                "raw": b"x",
                "any": None,
                "words": ["p", "q"],
                "chars": np.array(["u"]),
            },
            {
                "ids": np.array([4]),
                "weights": np.array([1.5, 2.5], np.float32),
                "mask": np.array([False, True]),
                "spans": np.array([[5, 6, 7]], np.int32),
                "label": 0,
                "score": 1,
                "small": np.int8(-4),
                "zero_d": np.array(3.0, np.float16),
                "flag": False,
                "text": "",
                "raw": b"",
                "any": {"k": 1},
                "words": [],
                "chars": np.array(["v", "w"]),
            },
        ],
        pad_values={"ids": -100, "weights": np.nan, "absent": 1},
    )
    expected = {
        "ids": np.array([[1, 2, 3], [4, -100, -100]], np.int64),
        "weights": np.array([[0.5, np.nan], [1.5, 2.5]], np.float32),
        "mask": np.array([[True, False], [False, True]]),
        "spans": np.array([[[1, 2, 0], [3, 4, 0]], [[5, 6, 7], [0, 0, 0]]], np.int32),
        "label": np.array([1, 0], np.int64),
        "score": np.array([0.25, 1], np.float32),
        "small": np.array([4, -4], np.int8),
        "zero_d": np.array([2, 3], np.float16),
        "flag": np.array([True, False]),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
        assert batch[name].dtype == array.dtype, name
    assert [batch[name] for name in ("text", "raw", "any", "words")] == (
        [["a", ""], [b"x", b""], [None, {"k": 1}], [["p", "q"], []]]
    )
    assert [array.tolist() for array in batch["chars"]] == [["u"], ["v", "w"]]
    assert list(batch) == [*list(expected)[:7], "zero_d", "flag", "text", "raw", "any", "words", "chars"]


def test_pad_to_multiple_concerns_the_first_axis():
    batch = pad_batch([{"ids": np.ones(3), "spans": np.ones((9, 2)), "label": 1}], pad_to_multiple=8)
    assert {name: array.shape for name, array in batch.items()} == {
        "ids": (1, 8),
        "spans": (1, 16, 2),
        "label": (1,),
    }


def test_empty_arrays_can_be_padded():
    batch = pad_batch([{"ids": np.array([], np.int64)}, {"ids": np.array([], np.int64)}])
    assert batch["ids"].shape == (2, 0)


def test_padded_batch_keeps_order_and_the_partial_last():
    dataset = of_length(1, 2, 3, 1, 2)
    batches = list(dataset.padded_batch(2, {"ids": 9}))
    assert [batch["ids"].tolist() for batch in batches] == [
        [[0, 9], [1, 1]],
        [[2, 2, 2], [3, 9, 9]],
        [[4, 4]],
    ]
    assert len(list(dataset.padded_batch(2, drop_remainder=True))) == 2


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"a": 1, "b": 2}, {"a": 1}, r"lacks \['b'\], compared with the first"),
        ({"a": 1}, {"a": 1, "c": 2}, r"also has \['c'\]"),
        ({"a": 1, "b": 2}, {"a": 1, "c": 2}, r"lacks \['b'\] and also has \['c'\]"),
        ({"a": 1}, [1], r"an example is list \[1\]; expected a dict"),
        (
            {"a": np.ones(2)},
            {"a": np.ones(2, np.float32)},
            "array of float32 with 1 axes, but an array of float64",
        ),
        ({"a": np.ones(2)}, {"a": np.ones((2, 2))}, "with 2 axes, but an array of float64 with 1 axes"),
        ({"a": np.ones(2)}, {"a": [1, 1]}, r"'a' is list \[1, 1\], but an array"),
        ({"a": 1}, {"a": "x"}, "'a' is str 'x', but int 1"),
        ({"a": np.int64(1)}, {"a": np.int32(1)}, "'a' is int32"),
        ({"a": True}, {"a": 1}, "'a' is int 1, but bool True"),
        ({"a": 1}, {"a": 2**63}, "expected a number within 64 bits"),
    ],
)
def test_examples_that_do_not_go_together(tmp_path, first, second, message):
    examples = [first, second]
    with pytest.raises(DataError, match=r"^example 1 of the batch: .*" + message):
        pad_batch(examples)
    path = tmp_path / "two.txt"
    path.write_text("head\n0\n1\n")
    source = Dataset.from_file(path, skip_header=1).map(lambda line: examples[int(line)]).shuffle(1)
    for dataset in (source.padded_batch(2), source.padded_batch(2).buffered(1)):
        with pytest.raises(DataError, match=r"two\.txt:3: .*" + message):
            list(dataset)


def test_pad_values_must_fit():
    with pytest.raises(ConfigError, match="pad value 'x' of 'a' does not fit int64"):
        pad_batch([{"a": np.array([1])}], pad_values={"a": "x"})
    for value in (float("nan"), 0.5, 2**70):
        with pytest.raises(ConfigError, match="does not fit int64"):
            pad_batch([{"a": np.array([1])}], pad_values={"a": value})
    with pytest.raises(ConfigError, match="pad value 2 of 'a' does not fit bool"):
        pad_batch([{"a": np.array([True])}], pad_values={"a": 2})


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no example"):
        pad_batch([])


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=lengths, multiple=st.sampled_from([1, 4]), pool=st.integers(1, 70))
def test_budgets_hold_and_every_example_comes_once(lengths, multiple, pool):
    dataset = of_length(*lengths)
    for batched in (
        dataset.token_batch(24, pad_to_multiple=multiple),
        dataset.bucket(max_tokens=24, pool_size=pool, pad_to_multiple=multiple),
    ):
        batches = list(batched)
        assert sorted(sum([batch["id"].tolist() for batch in batches], [])) == list(range(len(lengths)))
        assert all(batch["ids"].size <= 24 for batch in batches)
        assert all(batch["ids"].shape[1] % multiple == 0 for batch in batches)


def test_token_batch_fills_up_in_order():
    batches = [batch["id"].tolist() for batch in of_length(2, 3, 1, 4, 4, 1).token_batch(9)]
    assert batches == [[0, 1, 2], [3, 4], [5]]


@pytest.mark.parametrize("batched", [lambda d: d.token_batch(8), lambda d: d.bucket(max_tokens=8)])
def test_an_example_beyond_the_budget_is_an_error(batched):
    assert len(list(batched(of_length(8)))) == 1
    with pytest.raises(DataError, match=r"<list>:2: an example of length 9 .* alone exceeds max_tokens=8"):
        list(batched(of_length(8, 9)))


def test_padding_counts_for_the_budget():
    with pytest.raises(DataError, match=r"length 8 \(padded: 9\) alone exceeds max_tokens=8"):
        list(of_length(8).token_batch(8, pad_to_multiple=3))


def test_key_says_which_length_counts():
    dataset = Dataset.from_list([{"a": np.ones(n), "b": np.ones(9)} for n in (1, 2)])
    assert len(list(dataset.token_batch(4, key="a"))) == 1
    with pytest.raises(DataError, match="expected a dict with an array 'c'"):
        list(dataset.token_batch(4, key="c"))
    with pytest.raises(DataError, match="<list>:1: .*expected a dict of name to value"):
        list(Dataset.from_list([3]).token_batch(4))


def test_bucket_groups_like_lengths_within_a_pool():
    rng = np.random.default_rng(0)
    dataset = of_length(*rng.integers(1, 100, 640))
    batches = list(dataset.bucket(batch_size=8, pool_size=640))
    assert [len(batch["id"]) for batch in batches] == [8] * 80
    sizes = [batch["ids"].shape[1] for batch in batches]
    assert sizes != sorted(sizes)
    real = sum(np.count_nonzero(batch["ids"]) for batch in batches)
    assert real / sum(batch["ids"].size for batch in batches) > 0.97
    assert len(list(dataset.bucket(batch_size=8).take(5))) == 5


def test_bucket_mixes_examples_of_one_length_anew_each_epoch():
    dataset = of_length(*[3] * 32).bucket(batch_size=4).repeat(2)
    groups = [frozenset(batch["id"].tolist()) for batch in dataset]
    assert len(groups) == 16
    assert set(groups[:8]) != set(groups[8:])


def test_bucket_works_for_evaluation_without_shuffle():
    ids = sum([batch["id"].tolist() for batch in of_length(*range(1, 11)).bucket(batch_size=4)], [])
    assert sorted(ids) == list(range(10))


def test_bucket_before_repeat_keeps_each_epoch_whole():
    dataset = of_length(*range(1, 14)).shuffle().bucket(batch_size=4, pool_size=8).repeat(3)
    batches = [batch["id"].tolist() for batch in dataset]
    per_epoch = len(batches) // 3
    for epoch in range(3):
        ids = sum(batches[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert sorted(ids) == list(range(13))
