"""The metrics of rows with any number of labels, against scikit-learn."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from propeller.errors import ConfigError, DataError
from propeller.metrics.multi_label import ExactMatch, MicroF1, MultiLabelMacroF1, sigmoid

REFERENCES = {
    MicroF1: lambda y, p: sk.f1_score(y, p, average="micro", zero_division=0),
    MultiLabelMacroF1: lambda y, p: sk.f1_score(y, p, average="macro", zero_division=0),
    ExactMatch: sk.accuracy_score,
}
KINDS = list(REFERENCES)


def fed(metric, logits, labels):
    metric.update({"logits": np.asarray(logits, np.float32)}, np.asarray(labels), {})
    return metric


def example(rows=200, labels=5, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random((rows, labels)) < np.linspace(0.0, 0.7, labels)).astype(np.float32)
    return (2 * truth - 1 + rng.normal(size=truth.shape)).astype(np.float32), truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thresholds", [0.5, 0.2, [0.1, 0.3, 0.5, 0.7, 0.9]])
def test_equals_sklearn(kind, thresholds):
    """The first label never occurs."""
    logits, truth = example()
    expected = REFERENCES[kind](truth, sigmoid(logits) >= np.asarray(thresholds))
    assert fed(kind(thresholds=thresholds), logits, truth).compute() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_there_and_nothing_predicted(kind):
    value = fed(kind(), [[-1.0, -2.0]], [[0, 0]]).compute()
    assert value == REFERENCES[kind](np.array([[0, 0]]), np.array([[0, 0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_and_merged(kind):
    logits, truth = example(rows=50)
    whole = fed(kind(), logits, truth)
    first = fed(fed(kind(), logits[:7], truth[:7]), logits[7:20], truth[7:20])
    other = fed(kind(), logits[20:], truth[20:])
    idle = kind()
    idle.merge(first.state())
    idle.merge(other.state())
    idle.merge(kind().state())
    assert idle.compute() == whole.compute()
    whole.reset()
    assert math.isnan(whole.compute())
    assert math.isnan(fed(whole, np.zeros((0, 3)), np.zeros((0, 3))).compute())


def test_sigmoid_neither_overflows_nor_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sigmoid([-1e4, 0.0, 1e4]).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[1.0, 2.0]], [[1, 0, 0]], r"shape \[1, 2\], labels have \[1, 3\]"),
        ([[1.0, 2.0]], [1], r"\[B, C\] was expected of both"),
        ([[1.0, 2.0]], [[1, 0], [0, 1]], "one label for each row"),
        ([[1.0, math.nan]], [[1, 0]], "holds NaN"),
        ([[1.0, 2.0]], [[2, 0]], "other values than 0 and 1"),
    ],
)
def test_bad_input_leaves_the_metric_as_it_was(logits, labels, message):
    metric = fed(ExactMatch(), [[1.0, -1.0]], [[1, 0]])
    with pytest.raises(DataError, match=message):
        fed(metric, logits, labels)
    assert metric.compute() == 1.0


def test_other_numbers_of_labels_and_thresholds():
    metric = fed(MicroF1(), [[1.0, -1.0]], [[1, 0]])
    with pytest.raises(DataError, match="rows of 3 labels came after rows of 2"):
        fed(metric, [[1.0, -1.0, 0.0]], [[1, 0, 0]])
    with pytest.raises(DataError, match="there are 3 thresholds"):
        fed(MicroF1(thresholds=[0.5] * 3), [[1.0, -1.0]], [[1, 0]])
    for wrong in (1.5, [-0.1], [[0.5]]):
        with pytest.raises(ConfigError, match="probabilities from 0 to 1"):
            MicroF1(thresholds=wrong)
