"""Groups of rows: found, cut to a size, padded, batched."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from ernie.tasks.groups import PADDING, Groups, group_size, refuse_token_batches
from ernie.tasks.ranking import differ
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.types import HParams

PAD = 99
COLUMNS = ("input_ids", "label")
PAD_VALUES = {"input_ids": PAD, "label": PADDING}


def rows_of(*groups):
    """Rows as a task prepares them, a group of labels each; a row's ids tell its number."""
    numbers = itertools.count()
    return Dataset.from_list(
        [
            {
                "input_ids": np.full(1 + (number := next(numbers)) % 4, number),
                "label": label,
                "candidate": place,
                "query": f"q{query}",
            }
            for query, labels in enumerate(groups)
            for place, label in enumerate(labels)
        ]
    )


def training(*groups, teaches=differ, **options):
    found = Groups("train", rows_of(*groups))
    return found.training(COLUMNS, pad_values=PAD_VALUES, teaches=teaches, **options)


def test_a_query_in_two_files():
    rows = list(rows_of([1, 0], [0, 1])) + list(rows_of([0, 1]))  # as read from parts, each by itself
    assert len(Groups("train", Dataset.from_list(rows))) == 3
    with pytest.raises(DataError, match="The train set has the query 'q0' twice, in different files"):
        Groups("train", Dataset.from_list(rows), distinct="query")
    assert len(Groups("train", rows_of([1, 0], [0, 1]), distinct="query")) == 2


def test_a_group_is_an_example():
    dataset = training([0, 2, 0], [1, 0])
    assert len(dataset) == 2
    first, second = dataset
    np.testing.assert_array_equal(first["input_ids"], [[0, PAD, PAD], [1, 1, PAD], [2, 2, 2]])
    assert first["label"].tolist() == [0, 2, 0] and second["label"].tolist() == [1, 0]
    assert first["group"].tolist() == [0, 0, 0] and second["group"].tolist() == [1, 1]


def test_a_batch_pads_both_axes():
    (batch,) = training([0, 2, 0], [1, 0]).padded_batch(2, PAD_VALUES)
    assert batch["input_ids"].shape == (2, 3, 4)
    assert batch["label"].tolist() == [[0, 2, 0], [1, 0, PADDING]]
    np.testing.assert_array_equal(batch["input_ids"][1, 2], [PAD] * 4)


def test_what_teaches_nothing_is_left_out_and_counted(caplog):
    with caplog.at_level(logging.INFO, "ernie"):
        assert len(training([0, 0], [1, 0], [1, 1], [3])) == 1
    assert "train: 3 of 4 queries teach nothing" in caplog.text
    with pytest.raises(DataError, match="The train set has no query to learn from"):
        training([0, 0], [1])


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "labels", [[1, *[0] * 12], [0, 1, 0, 2, 1, 0, 0, 0], [*[1] * 9, 0], [0, 0, 3], [1, 1, 0, 0]]
)
def test_a_large_group_becomes_several(size, labels):
    pieces = [
        (example["input_ids"][:, 0].tolist(), example["label"]) for example in training(labels, size=size)
    ]
    for rows, grades in pieces:
        assert len(set(rows)) == len(rows) == min(size, len(labels)) and rows == sorted(rows)
        assert (grades > 0).any() and (grades == 0).any()
    assert set().union(*(rows for rows, _ in pieces)) == set(range(len(labels))), "each comes up"


def test_rows_that_lead_stand_in_every_piece():
    examples = training([9, 1, 0, 0, 0, 0], teaches=lambda labels: 1 in labels, size=3, lead=1)
    found = [example["input_ids"][:, 0].tolist() for example in examples]
    assert found == [[0, 1, 2, 3], [0, 1, 4, 5]]
    everything_right = training([9, 1, 1, 1], teaches=lambda labels: 1 in labels, size=2, lead=1)
    assert [example["input_ids"][:, 0].tolist() for example in everything_right] == [[0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize(
    "labels", [[3] * 4 + [2] * 4 + [1] * 4, [1, 1, 2, 2], [4, 1, 1, 1, 1, 1], [2] * 9 + [5]]
)
def test_grades_without_a_row_of_grade_0(size, labels):
    """The rows of a query in the order of their grades, as files have them, none of them irrelevant."""
    pieces = list(training(labels, size=size))
    assert all(differ(piece["label"].tolist()) for piece in pieces)
    assert {row for piece in pieces for row in piece["input_ids"][:, 0].tolist()} == set(range(len(labels)))


def test_every_grade_meets_the_others():
    pairs = set()
    for piece in training([3] * 4 + [2] * 4 + [1] * 4, size=4):
        pairs |= set(itertools.permutations(piece["label"].tolist(), 2))
    assert pairs >= {(3, 2), (3, 1), (2, 1)}


def evaluated(batches):
    """The rows of each batch, and the group of each row."""
    return [(batch["input_ids"][:, 0].tolist(), batch["group"].tolist()) for batch in batches]


def test_evaluation_batches_hold_whole_groups():
    rows = rows_of([0, 1, 0], [1], [0, 0], [1, 0, 0, 0], [2, 1])
    batches = list(Groups("dev", rows).evaluation(2, pad_values=PAD_VALUES))
    found = [number for members, _ in evaluated(batches) for number in members]
    assert sorted(found) == list(range(12)) and len(batches) == 3
    groups = [set(batch["group"].tolist()) for batch in batches]
    assert sum(map(len, groups)) == 5 == len(set().union(*groups)), "none is split"
    for batch in batches:
        assert [f"q{number}" for number in batch["group"]] == batch["query"]
        assert PADDING not in batch["label"]


def test_evaluation_batches_are_bounded(monkeypatch):
    monkeypatch.setattr("ernie.tasks.groups.MAX_ROWS", 6)
    rows = rows_of([1] * 4 + [0] * 9, [1, 0, 0], [1, 0])
    batches = list(Groups("dev", rows).evaluation(9, pad_values=PAD_VALUES))
    found = evaluated(batches)
    assert all(len(members) <= 6 for members, _ in found)
    assert sorted(number for members, _ in found for number in members) == list(range(18)), "each row once"
    assert all(differ(batch["label"].tolist()) for batch in batches), "the loss has something to count"
    found = evaluated(Groups("dev", rows).evaluation(9, pad_values=PAD_VALUES, lead=1))
    assert [0 in members for members, groups in found if 0 in groups] == [True] * 3, "what leads is in all"
    assert {number for members, _ in found for number in members} == set(range(18))


def test_the_signature_follows_the_data():
    before = training([0, 1], [1, 0]).signature()
    assert training([0, 1], [1, 0]).signature() == before
    assert training([0, 1], [2, 0]).signature() != before
    assert training([0, 1], [1, 0], [1, 0]).signature() != before


def test_hyper_parameters():
    assert group_size(HParams()) is None and group_size(HParams({"group_size": 4})) == 4
    for wrong in (1, 2.5, "8", True):
        with pytest.raises(ConfigError, match="group_size must be a whole number of at least 2"):
            group_size(HParams({"group_size": wrong}))
    refuse_token_batches(HParams({"in_tokens": 0}))
    with pytest.raises(ConfigError, match="batch_size counts queries"):
        refuse_token_batches(HParams({"in_tokens": True}))
