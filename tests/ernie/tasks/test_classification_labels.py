"""Which labels there are, their numbers and weights."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from ernie.tasks.classification_files import Layout, begins_with_example, read_classification
from ernie.tasks.classification_labels import LabelCounts, class_weights, find_labels, number_labels
from propeller.errors import ConfigError, DataError


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


class TestFirstLines:
    """A header that is not known as one would be an example, and its label a class."""

    @pytest.mark.parametrize(
        "others",
        [["0", "1"], ["0.5"], ["1"] * 3, ["good", "bad"] * 10],
        ids=["ints", "float", "int", "words"],
    )
    def test_a_header_is_refused(self, tmp_path, others):
        path, found = tmp_path / "train.tsv", counted("sentiment", *others)
        message = "train.tsv:1: the label 'sentiment' stands in no other line.*--columns text_a,label"
        with pytest.raises(DataError, match=message):
            find_labels(path, found, firsts={path: "sentiment"})

    def test_so_it_is_in_every_part(self, tmp_path):
        parts = {tmp_path / name: "sentiment" for name in ("a", "b")}
        with pytest.raises(DataError, match="a:1: the label 'sentiment'"):
            find_labels(tmp_path, counted("sentiment", "0", "sentiment", "1"), firsts=parts)
        labels = find_labels(tmp_path, counted("x", "0", "x", "x"), firsts={path: "x" for path in parts})
        assert labels == ["0", "x"]

    @pytest.mark.parametrize("others", [["b"] * 20 + ["c"], ["b", "c"], ["a", "0"], []])
    def test_an_example_is_none(self, tmp_path, others, caplog):
        """Another label stands once, too, or this one twice."""
        path = tmp_path / "train.tsv"
        assert "a" in find_labels(path, counted("a", *others), firsts={path: "a"})
        assert not caplog.records

    def test_a_number_is_no_name(self, tmp_path):
        path = tmp_path / "train.tsv"
        assert find_labels(path, counted("2", *["0", "1"] * 20), firsts={path: "2"}) == ["0", "1", "2"]

    def test_what_is_not_sure_is_a_warning(self, tmp_path, caplog):
        path = tmp_path / "train.tsv"
        find_labels(path, counted("sentiment", *["good", "bad"] * 3), firsts={path: "sentiment"})
        assert "train.tsv:1: the label 'sentiment' stands in no other line" in caplog.text

    def test_who_says_that_it_is_a_label_is_believed(self, tmp_path):
        path, found = tmp_path / "train.tsv", counted("sentiment", "0", "1")
        assert find_labels(path, found, 3, firsts={path: "sentiment"}) == ["0", "1", "sentiment"]
        (tmp_path / "label_map.json").write_text('{"sentiment": 0, "0": 1, "1": 2}')
        assert find_labels(path, found, firsts={path: "sentiment"}) == ["sentiment", "0", "1"]

    @pytest.mark.parametrize(
        ("name", "cells"),
        [
            ("lcqmc/dev.tsv", None),
            ("lcqmc/test.tsv", None),
            ("glue/CoLA/train.tsv", ("_", "label", "_", "text_a")),
            ("glue/CoLA/dev.tsv", ("_", "label", "_", "text_a")),
        ],
    )
    def test_real_files(self, real_data, name, cells, caplog):
        path, layout = real_data / name, Layout(cells=cells)
        assert begins_with_example(path, layout)
        raws = list(read_classification(path, layout))
        assert find_labels(path, LabelCounts.of(raws), firsts={path: raws[0]["label"]}) == ["0", "1"]
        assert not caplog.records


def test_labels_that_look_like_texts(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ernie"):
        find_labels(tmp_path / "train.tsv", counted(*map(str, range(9))))
        find_labels(tmp_path / "train.tsv", counted(*[f"l{i}" for i in range(40)] * 2))
        assert not caplog.records
        find_labels(tmp_path / "train.tsv", counted(*(f"text {i}" for i in range(40))))
    (record,) = caplog.records
    assert re.search(
        r"train.tsv: 40 labels in 40 rows look like.*--columns label,text_a", record.getMessage()
    )


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
