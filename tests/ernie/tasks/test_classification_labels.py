"""Which labels there are, their numbers and weights."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from ernie.tasks.classification_labels import LabelCounts, class_weights, find_labels, number_labels
from propeller.errors import ConfigError


def counted(*labels):
    return LabelCounts.of({"text_a": "x", "label": label} for label in labels)


def test_counts():
    found = counted("a", "b", "a")
    assert (found.counts, found.rows) == ({"a": 2, "b": 1}, 3)
    found = counted(["a", "b"], [], ["a"])
    assert (found.counts, found.rows) == ({"a": 2, "b": 1}, 3)


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["10", "2", "0", "2"], ["0", "2", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        (["pos", "neg"], ["neg", "pos"]),
        (["2", "10", "x"], ["10", "2", "x"]),
        (["--1", "1"], ["--1", "1"]),
        (["1", "01", "0"], ["0", "01", "1"]),
        (["-", ""], ["", "-"]),
        (["2", "10", "9" * 5000], ["10", "2", "9" * 5000]),
    ],
)
def test_number_labels(found, labels):
    assert number_labels(found) == labels
    assert number_labels(reversed(found)) == labels


def test_numbers_for_labels_are_taken_for_a_regression_that_was_not_asked_for(tmp_path):
    path, found = tmp_path / "train.tsv", counted("0.5", "3.8")
    with pytest.raises(ConfigError, match="For a regression set num_label to 1"):
        find_labels(path, found)
    assert find_labels(path, found, 1) is None
    assert find_labels(path, found, 2) == ["0.5", "3.8"]


def test_another_number_of_labels(tmp_path):
    with pytest.raises(ConfigError, match=r"num_label is 2, but there are 12 labels: 0, .*, 9, \.\.\.\.$"):
        find_labels(tmp_path / "train.tsv", counted(*map(str, range(12))), 2)


@pytest.mark.parametrize(
    ("cells", "spellings"),
    [
        (["0", "1", "1", "01"], r"'1' \(2 rows\) and '01' \(1 rows\)"),
        (["0", "1", "\uff11"], r"'1' \(1 rows\) and '\uff11' \(1 rows\)"),
        (["-1", "1", "-01"], "'-1' .* and '-01'"),
        (["yes", "no", "Yes"], "'yes' .* and 'Yes'"),
        (["no", "\uff59\uff45\uff53", "yes"], "'\uff59\uff45\uff53' .* and 'yes'"),
    ],
    ids=["zero", "full-width-digit", "negative", "case", "full-width-letters"],
)
def test_two_spellings_of_a_label_are_named(tmp_path, cells, spellings):
    path, found = tmp_path / "train.tsv", counted(*cells)
    for wanted in (None, len(set(cells)), 2):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} has the labels {spellings}"):
            find_labels(path, found, wanted)
    (tmp_path / "label_map.json").write_text(json.dumps({cell: i for i, cell in enumerate(set(cells))}))
    assert set(find_labels(path, found)) == set(cells), "where they are meant"


def test_labels_that_are_not_spellings_of_one(tmp_path):
    labels = ["+1", "-1", "1", "1.0", "a b", "ab", "\u00e9", "e"]
    assert find_labels(tmp_path / "train.tsv", counted(*labels)) == sorted(labels)


def test_a_label_map_is_spelt_as_the_files_are_read(tmp_path):
    (tmp_path / "label_map.json").write_text('{"neutral": 1, "contradictory": 0}')
    assert find_labels(tmp_path / "train.tsv", counted()) == ["contradiction", "neutral"]
    (tmp_path / "label_map.json").write_text('{"": 1, "a": 0}')
    with pytest.raises(ConfigError, match="label_map.json: the label is empty"):
        find_labels(tmp_path / "train.tsv", counted())


class TestWeights:
    def weights(self, wanted, labels=("0", "1", "2"), multi_label=False):
        found = counted("0", "0", "0", "1", "2", "2")
        return class_weights(wanted, labels, found, multi_label=multi_label)

    def test_balanced_as_scikit_learn_has_it(self):
        truth = ["0", "0", "0", "1", "2", "2"]
        expected = compute_class_weight("balanced", classes=np.array(["0", "1", "2"]), y=truth)
        assert self.weights("balanced") == pytest.approx(expected)
        assert np.mean([self.weights("balanced")[int(label)] for label in truth]) == pytest.approx(1)

    def test_balanced_for_any_number_of_labels(self):
        assert self.weights("balanced", multi_label=True) == pytest.approx([1, 5, 2])

    def test_numbers(self):
        assert self.weights([1, 2.5, 3]) == [1.0, 2.5, 3.0]
        assert self.weights({"1": 4}) == [1.0, 4.0, 1.0]
        assert self.weights(None) is None

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("balance", "must be 'balanced', a number above 0 for each of the 3 labels"),
            ([1, 2], "3 labels"),
            ([1, 2, "3"], "3 labels"),
            ([1, 2, 0], "above 0"),
            ([1, 2, float("inf")], "above 0"),
            ([1, 2, True], "above 0"),
            ({"on": 2}, "names 'on'; expected some of 0, 1, 2"),
            (3, "got 3"),
        ],
    )
    def test_what_cannot_be_used(self, wanted, message):
        with pytest.raises(ConfigError, match=message):
            self.weights(wanted)

    def test_labels_without_examples_and_regressions(self):
        with pytest.raises(ConfigError, match="has no example of 3"):
            self.weights("balanced", labels=("0", "1", "2", "3"))
        with pytest.raises(ConfigError, match="a regression has none"):
            self.weights("balanced", labels=None)
