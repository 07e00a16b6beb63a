"""The metrics against scikit-learn and scipy, in one piece, in pieces and merged from shards."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from propeller.errors import ConfigError, DataError
from propeller.metrics import (
    AUC,
    F1,
    MCC,
    Acc,
    ClassCounts,
    ConfusionMatrix,
    MacroF1,
    Mean,
    Metric,
    Pearson,
    Precision,
    Recall,
    Spearman,
    check_names,
    compute_all,
)
from propeller.metrics.base import label_columns

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)

COUNTED = [Acc, Precision, Recall, F1, MacroF1, MCC, ConfusionMatrix]
REAL = [Pearson, Spearman]
READERS_OF_LABELS = [*COUNTED, AUC, *REAL]

REFERENCES: dict[type[Any], Callable[[Any, Any], float]] = {
    Acc: sk.accuracy_score,
    Precision: lambda y, p: sk.precision_score(y, p, labels=[1], average="macro"),
    Recall: lambda y, p: sk.recall_score(y, p, labels=[1], average="macro"),
    F1: lambda y, p: sk.f1_score(y, p, labels=[1], average="macro"),
    MacroF1: lambda y, p: sk.f1_score(y, p, average="macro"),
    MCC: sk.matthews_corrcoef,
    AUC: sk.roc_auc_score,
    Pearson: lambda y, p: stats.pearsonr(y, p).statistic,
    Spearman: lambda y, p: stats.spearmanr(y, p).statistic,
}


def fed(metric: Metric, logits: Any, labels: Any) -> Metric:
    metric.update({"logits": np.asarray(logits)}, np.asarray(labels), {})
    return metric


def value(metric: Metric, logits: Any, labels: Any) -> Any:
    return fed(metric, logits, labels).compute()


@contextmanager
def reference_warnings() -> Iterator[None]:
    """scikit-learn and scipy warn where a value is undefined; ours do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_equals_reference(kind: type[Any], logits: Any, labels: Any, predicted: Any = None) -> None:
    with reference_warnings():
        expected = REFERENCES[kind](labels, logits if predicted is None else predicted)
    assert value(kind(), logits, labels) == pytest.approx(expected, abs=1e-6, nan_ok=True)


# Equal to scikit-learn and scipy


@pytest.mark.parametrize("kind", [kind for kind in COUNTED if kind is not ConfusionMatrix])
@pytest.mark.parametrize("num_classes", [2, 3, 17])
def test_scores_equal_sklearn(kind: type[Any], num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    for rows in (1, 2, 7, 500):
        scores = rng.normal(size=(rows, num_classes)).astype(np.float32)
        labels = rng.integers(num_classes, size=rows)
        assert_equals_reference(kind, scores, labels, predicted=scores.argmax(axis=1))


@pytest.mark.parametrize("kind", [kind for kind in COUNTED if kind is not ConfusionMatrix])
@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        pytest.param([1, 1, 1], [1, 1, 1], id="one class, right"),
        pytest.param([0, 0, 0], [0, 0, 0], id="one class, no positive"),
        pytest.param([1, 1, 1], [0, 0, 0], id="nothing right"),
        pytest.param([0, 0, 0], [0, 1, 1], id="no positive predicted"),
        pytest.param([0, 1, 1], [0, 0, 0], id="no positive label"),
        pytest.param([0, 2, 2, 2], [0, 1, 2, 1], id="class absent from predictions"),
        pytest.param([0, 1, 2, 1], [0, 2, 2, 2], id="class absent from labels"),
        pytest.param([9, 4, 9], [9, 9, 4], id="gaps between classes"),
        pytest.param([1], [1], id="one row"),
    ],
)
def test_class_edge_cases_equal_sklearn(kind: type[Any], predicted: list[int], labels: list[int]) -> None:
    assert_equals_reference(kind, predicted, labels)


@pytest.mark.parametrize("kind", [Precision, Recall, F1])
def test_other_positive_class(kind: type[Any]) -> None:
    predicted, labels = [0, 1, 2, 2, 0, 1], [0, 2, 2, 1, 1, 1]
    function = {Precision: sk.precision_score, Recall: sk.recall_score, F1: sk.f1_score}[kind]
    expected = function(labels, predicted, average=None)
    for positive in range(3):
        assert value(kind(positive=positive), predicted, labels) == pytest.approx(expected[positive])
    assert value(kind(positive=7), predicted, labels) == 0.0


def test_confusion_matrix_equals_sklearn_and_is_json() -> None:
    rng = np.random.default_rng(3)
    predicted, labels = rng.integers(5, size=(2, 300))
    matrix = value(ConfusionMatrix(), predicted, labels)
    assert matrix == sk.confusion_matrix(labels, predicted, labels=range(5)).tolist()
    assert json.loads(json.dumps(matrix)) == matrix


def test_confusion_matrix_rows_are_labels_and_it_grows() -> None:
    metric = fed(ConfusionMatrix(), [0, 0], [0, 0])
    assert metric.compute() == [[2]]
    assert fed(metric, [2], [1]).compute() == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert fed(metric, [0], [0]).compute() == [[3, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_mcc_of_billions_of_rows() -> None:
    counts = np.array([[4, 3], [7, 5], [6, 6]], dtype=np.int64) * 10**12
    metric = MCC()
    metric.merge({"class_counts": counts})
    tp, fp, fn, tn = 3, 3, 2, 4
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 50, 2000])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auc_equals_sklearn(rows: int, decimals: int) -> None:
    rng = np.random.default_rng(rows + decimals)
    labels = rng.permutation(np.arange(rows) % 2)
    scores = np.round(rng.normal(size=rows) + labels, decimals)
    assert_equals_reference(AUC, scores, labels)
    assert_equals_reference(AUC, scores[:, None].astype(np.float32), labels[:, None], None)


def test_auc_of_two_columns_ranks_as_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 2)).astype(np.float32)
    labels = rng.integers(2, size=400)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = sk.roc_auc_score(labels, probabilities[:, 1])
    assert value(AUC(), logits, labels) == pytest.approx(expected, abs=1e-6)
    assert value(AUC(), probabilities, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),
        ([0.0, -0.0], [0, 1], 0.5),
        ([1, 2, 3], [0, 0, 1], 1.0),
        ([3, 2, 1], [0, 0, 1], 0.0),
        ([-math.inf, 0.0, math.inf], [0, 1, 1], 1.0),
        ([0.1, 0.2], [1, 1], math.nan),
        ([0.1, 0.2], [0, 0], math.nan),
    ],
)
def test_auc_by_hand(scores: list[float], labels: list[int], expected: float) -> None:
    assert value(AUC(), scores, labels) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rows", [3, 40, 3000])
def test_correlation_equals_scipy(kind: type[Any], scale: float, rows: int) -> None:
    rng = np.random.default_rng(rows)
    labels = rng.integers(6, size=rows) + 0.5
    values = (labels + rng.normal(size=rows)) * scale
    assert_equals_reference(kind, values, labels)
    assert_equals_reference(kind, -values.astype(np.float32), labels.astype(np.float32))


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        pytest.param([1, 2], [3, 4], id="two rows"),
        pytest.param([1, 1, 2, 2, 2, 3], [5, 3, 3, 3, 1, 1], id="ties"),
        pytest.param([0.1] * 7, [1, 2, 3, 4, 5, 6, 7], id="constant predictions"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], [0.3] * 7, id="constant labels"),
        pytest.param([0.1] * 7, [0.3] * 7, id="both constant"),
    ],
)
def test_correlation_edge_cases_equal_scipy(kind: type[Any], values: Any, labels: Any) -> None:
    assert_equals_reference(kind, values, labels)


@pytest.mark.parametrize("kind", REAL)
def test_one_row_has_no_correlation(kind: type[Any]) -> None:
    assert math.isnan(value(kind(), [1.0], [2.0]))


def test_constant_stays_constant_over_pieces() -> None:
    metric = Pearson()
    for rows in (1, 2, 3, 10, 7):  # the rounded mean of many 0.1 is not 0.1
        fed(metric, np.full(rows, 0.1), np.arange(rows))
    assert math.isnan(metric.compute())


def test_perfect_correlation_is_never_above_one() -> None:
    for rows in range(3, 60):
        values = np.arange(rows) * 0.1 + 0.7
        assert abs(value(Pearson(), values, values * 3)) <= 1.0
        assert value(Pearson(), values, -values) == pytest.approx(-1.0, abs=1e-12)


def test_pearson_with_a_large_offset_in_pieces() -> None:
    rng = np.random.default_rng(5)
    labels = rng.normal(size=1000)
    values = labels + rng.normal(size=1000)
    metric = Pearson()
    for piece in np.array_split(np.arange(1000), 37):
        fed(metric, values[piece] + 1e7, labels[piece] - 1e7)
    assert metric.compute() == pytest.approx(stats.pearsonr(values, labels).statistic, abs=1e-6)


@pytest.mark.parametrize("values", [[1.0, math.inf, 3.0], [1e200, 2e200, 5e200], [math.inf, -math.inf, 0.0]])
def test_pearson_of_infinite_or_huge_values_is_nan(values: list[float]) -> None:
    metric = Pearson()
    fed(metric, [1.0, 2.0], [1.0, 2.0])
    fed(metric, values, [1.0, 2.0, 3.0])
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
def test_no_rows(kind: type[Any]) -> None:
    metric = kind()
    for _ in range(2):
        result = metric.compute()
        assert result == [] if kind is ConfusionMatrix else math.isnan(result)
        metric = fed(kind(), np.zeros((0, 1), dtype=np.float32), np.zeros(0, dtype=np.int64))
        metric.merge(kind().state())


# What is read


@pytest.mark.parametrize(
    "output",
    [
        np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 5.0]], dtype=np.float16),
        np.array([-0.5, 0.5, 0.0]),
        np.array([[-0.5], [0.5], [-math.inf]], dtype=np.float32),
        np.array([0, 1, 0]),
        np.array([[0], [1], [0]], dtype=np.int32),
        np.array([False, True, False]),
    ],
)
@pytest.mark.parametrize(
    "labels",
    [
        np.array([1, 1, 0]),
        np.array([[1], [1], [0]]),
        np.array([1.0, 1.0, 0.0], dtype=np.float16),
        np.array([True, True, False]),
        np.array([1, 1, 0], dtype=np.uint8),
    ],
)
def test_forms_of_class_predictions_and_labels(output: np.ndarray, labels: np.ndarray) -> None:
    assert value(ConfusionMatrix(), output, labels) == [[1, 0], [1, 1]]
    assert value(Acc(), output, labels) == pytest.approx(2 / 3)


def test_masked_scores_are_no_nan() -> None:
    scores = np.array([[-math.inf, 1.0, -math.inf], [-math.inf, -math.inf, 0.0]])
    assert value(Acc(), scores, [1, 1]) == 0.5


def test_many_classes_stay_small() -> None:
    metric = fed(Acc(), np.array([0, 1_000_000]), [0, 1_000_000])
    assert metric.compute() == 1.0
    assert metric.state()["class_counts"].nbytes < 25e6


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
def test_other_key(kind: type[Any]) -> None:
    metric = kind(key="ids")
    metric.update({"ids": np.array([0, 1, 1]), "logits": np.zeros(9)}, np.array([0, 1, 0]), {})
    expected = value(kind(), np.array([0, 1, 1]), [0, 1, 0])
    assert metric.compute() == expected


# What is refused


def refused(metric: Metric, logits: Any, labels: Any, *words: str) -> None:
    """Checks for the error, and that it leaves the metric as it was."""
    fed(metric, [0.0, 1.0, 1.0, 0.0], [0, 1, 0, 0])
    before = metric.compute()
    with pytest.raises(DataError) as caught:
        fed(metric, logits, labels)
    assert all(word in str(caught.value) for word in words), caught.value
    assert metric.compute() == before


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
def test_rows_that_differ(kind: type[Any]) -> None:
    refused(kind(), np.zeros((3, 1)), np.zeros((2, 1), dtype=int), "[3, 1]", "[2, 1]", "'logits'")


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
def test_missing_output(kind: type[Any]) -> None:
    with pytest.raises(ConfigError, match="'logit'.*'logits'.*Did you mean 'logits'"):
        fed(kind(key="logit"), [1, 0], [1, 0])


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
@pytest.mark.parametrize("labels", [None, ["a", "b"], [[0, 1], [1, 0]], 1])
def test_labels_of_another_form(kind: type[Any], labels: Any) -> None:
    refused(kind(), [0.0, 1.0], labels, "labels")


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
@pytest.mark.parametrize(
    ("output", "word"),
    [
        (np.zeros((2, 3, 4)), "[2, 3, 4]"),
        (np.zeros((2, 0)), "[2, 0]"),
        (np.float32(1.0), "[]"),
        (np.array(["a", "b"]), "<U1"),
        (np.array([16256, 0], dtype=np.uint16), "bfloat16"),
        (np.array([math.nan, 1.0]), "1 of 2 rows (the first is row 0)"),
    ],
)
def test_outputs_of_another_form(kind: type[Any], output: np.ndarray, word: str) -> None:
    refused(kind(), output, [0, 1], "logits", word)


def test_rows_of_unequal_length() -> None:
    with pytest.raises(DataError, match="labels is no array"):
        Acc().update({"logits": np.array([0, 1])}, [[1], [1, 2]], {})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize(
    ("output", "labels", "words"),
    [
        ([0, 1], [0, -1], ("labels", "-1 in row 1", "count from 0")),
        ([0, 1], [0, -1.0], ("labels", "-1.0 in row 1", "count from 0")),
        ([-100, 1], [0, 1], ("predictions['logits']", "-100 in row 0", "count from 0")),
        ([0, 1], [0, 0.5], ("labels", "0.5 in row 1", "whole")),
        ([0, 1], [0, math.nan], ("labels", "nan in row 1", "whole")),
        ([0, 1], [0, math.inf], ("labels", "inf in row 1")),
        ([0, 1], [0, 10**12], ("labels", "1000000000000 in row 1")),
        ([0, 10**12], [0, 1], ("predictions['logits']", "1000000000000 in row 1")),
        (np.zeros((2, 3)), [0, 3], ("labels", "3 in row 1", "[2, 3]", "0 to 2")),
        ([0.5, -0.5], [0, 2], ("labels", "2 in row 1", "0 to 1")),
        (np.zeros((2, 3), dtype=int), [0, 1], ("'logits'", "[2, 3]", "int64")),
        ([[0.0, 1.0], [0.5, math.nan]], [0, 1], ("NaN in 1 of 2 rows", "row 1")),
    ],
)
def test_class_ids_that_cannot_be(kind: type[Any], output: Any, labels: Any, words: tuple[str, ...]) -> None:
    refused(kind(), output, labels, *words)


def test_confusion_matrix_refuses_to_fill_the_memory() -> None:
    refused(ConfusionMatrix(), [0], [5000], "5000", "0 to 4095")


@pytest.mark.parametrize("labels", [[0, 2], [0, -1], [0, 0.5]])
def test_auc_labels_are_two_classes(labels: list[float]) -> None:
    refused(AUC(), [0.1, 0.2], labels, "row 1", "0 or 1")


def test_auc_refuses_three_columns_and_an_undefined_difference() -> None:
    refused(AUC(), np.zeros((2, 3)), [0, 1], "[2, 3]", "[B, 2]")
    refused(AUC(), [[math.inf, math.inf], [0.0, 1.0]], [0, 1], "NaN", "row 0")


@pytest.mark.parametrize("kind", [AUC, *REAL])
def test_nan_labels(kind: type[Any]) -> None:
    refused(kind(), [0.0, 1.0], [0.0, math.nan], "labels", "1 of 2 rows (the first is row 1)")


@pytest.mark.parametrize("kind", REAL)
def test_correlation_refuses_scores_of_classes(kind: type[Any]) -> None:
    refused(kind(), np.zeros((2, 2)), [0.0, 1.0], "[2, 2]")


@pytest.mark.parametrize("positive", [-1, 0.5, "1", None])
def test_positive_is_a_class_id(positive: Any) -> None:
    with pytest.raises(ConfigError, match="positive="):
        F1(positive=positive)


@pytest.mark.parametrize("kind", READERS_OF_LABELS)
def test_state_of_another_kind(kind: type[Any]) -> None:
    metric: Metric = kind()
    with pytest.raises(DataError, match="same kind of metric"):
        metric.merge({"sums": np.zeros(2)})


# Mean


def mean_of(outputs: Mapping[str, Any], features: Mapping[str, Any] | None = None, **options: Any) -> Any:
    metric = Mean("loss", **options)
    metric.update({name: np.asarray(array) for name, array in outputs.items()}, np.zeros(0), features or {})
    return metric.compute()


def test_mean_equals_numpy() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(2, 50, 4))
    weights = np.abs(weights)
    assert mean_of({"loss": values}) == pytest.approx(values.mean())
    assert mean_of({"loss": values, "w": weights}, weight="w") == pytest.approx(
        np.average(values, weights=weights)
    )


def test_mean_reads_features_and_prefers_outputs() -> None:
    assert mean_of({}, {"loss": [1, 2, 6]}) == 3.0
    assert mean_of({"loss": [1.0]}, {"loss": [2.0]}) == 1.0
    assert mean_of({"loss": [[1.0], [2.0]]}, {"w": [3, 1]}, weight="w") == 1.25


def test_mean_without_weight_or_rows_is_nan() -> None:
    assert math.isnan(Mean("loss").compute())
    assert math.isnan(mean_of({"loss": np.zeros((0, 1))}))
    assert math.isnan(mean_of({"loss": [1.0, 2.0], "w": [0, 0]}, weight="w"))


def test_mean_of_what_is_not_finite() -> None:
    assert math.isnan(mean_of({"loss": [1.0, math.nan]}))
    assert math.isnan(mean_of({"loss": [math.inf, -math.inf]}))
    assert mean_of({"loss": [1.0, math.inf]}) == math.inf
    assert mean_of({"loss": [1.0, math.nan], "w": [1, 0]}, weight="w") == 1.0


def test_mean_refuses() -> None:
    with pytest.raises(ConfigError, match="'loss'.*'losses'.*Did you mean 'losses'"):
        mean_of({}, {"losses": [1.0]})
    with pytest.raises(ConfigError, match="Mean reads 'w'"):
        mean_of({"loss": [1.0]}, weight="w")
    with pytest.raises(DataError, match=r"\[2\].*\[3\]"):
        mean_of({"loss": [1.0, 2.0], "w": [1, 2, 3]}, weight="w")
    with pytest.raises(DataError, match="'w' hold -1.0"):
        mean_of({"loss": [1.0, 2.0], "w": [1, -1]}, weight="w")
    with pytest.raises(DataError, match="'w' hold nan"):
        mean_of({"loss": [1.0, 2.0], "w": [1, math.nan]}, weight="w")
    with pytest.raises(DataError, match="single number"):
        mean_of({"loss": 1.0})
    with pytest.raises(DataError, match="features.*<U1"):
        mean_of({}, {"loss": ["a", "b"]})


# In pieces, at once, merged


def same(one: Any, other: Any, *, tolerance: float) -> bool:
    if isinstance(one, list) or tolerance == 0:
        return bool(one == other or (one != one and other != other))
    return bool(one == pytest.approx(other, abs=tolerance, nan_ok=True))


def check_pieces(make: Callable[[], Metric], pairs: np.ndarray, cuts: list[int], tolerance: float) -> None:
    """Compares one update, updates in pieces, and a merge of shards in both orders."""
    whole: Any = value(make(), pairs[:, 0], pairs[:, 1])
    pieces = np.split(pairs, sorted(cuts))
    streamed, ranks = make(), []
    for piece in pieces:
        fed(streamed, piece[:, 0], piece[:, 1])
        streamed.compute()
        ranks.append(fed(make(), piece[:, 0], piece[:, 1]))
    assert same(streamed.compute(), whole, tolerance=tolerance)
    for order in (ranks, ranks[::-1]):
        merged = make()
        for rank in order:
            merged.merge(rank.state())
        assert same(merged.compute(), whole, tolerance=tolerance)
    streamed.reset()
    assert same(fed(streamed, pairs[:, 0], pairs[:, 1]).compute(), whole, tolerance=tolerance)


cut_points = st.lists(st.integers(0, 40), max_size=5)
class_pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40)
scores = st.floats(-5, 5).map(lambda score: round(score, 1))
binary_pairs = st.lists(st.tuples(scores, st.integers(0, 1)), max_size=40)
real_pairs = st.lists(st.tuples(st.integers(-90, 90), st.integers(-9, 9)), max_size=40)


@property_test
@given(class_pairs, cut_points)
def test_counted_pieces_are_exact(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    for kind in COUNTED:
        check_pieces(kind, np.array(pairs, dtype=np.int64).reshape(-1, 2), cuts, tolerance=0)


@property_test
@given(binary_pairs, cut_points)
def test_auc_pieces_are_exact_and_equal_sklearn(pairs: list[tuple[float, int]], cuts: list[int]) -> None:
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    check_pieces(AUC, array, cuts, tolerance=0)
    if len(set(array[:, 1])) == 2:
        assert_equals_reference(AUC, array[:, 0], array[:, 1])


@property_test
@given(real_pairs, cut_points)
def test_spearman_pieces(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    check_pieces(Spearman, array, cuts, tolerance=1e-12)
    if len(array) > 1:
        assert_equals_reference(Spearman, array[:, 0], array[:, 1])


@property_test
@given(real_pairs, cut_points, st.sampled_from([0.1, 1.0, 1e-20]))
def test_pearson_pieces(pairs: list[tuple[int, int]], cuts: list[int], scale: float) -> None:
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2) * scale
    check_pieces(Pearson, array, cuts, tolerance=1e-9)
    if len(array) > 1:
        assert_equals_reference(Pearson, array[:, 0], array[:, 1])


@property_test
@given(real_pairs, cut_points)
def test_mean_pieces_are_exact_fractions(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    check_pieces(lambda: Mean("logits"), array, cuts, tolerance=1e-12)
    if len(array):
        expected = Fraction(sum(pair[0] for pair in pairs), len(pairs))
        assert value(Mean("logits"), array[:, 0], array[:, 1]) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", [*READERS_OF_LABELS, Mean])
def test_state_is_a_copy(kind: type[Any]) -> None:
    metric = fed(kind("logits"), [0, 1, 1], [0, 1, 0])
    before = metric.compute()
    state = metric.state()
    assert all(array.ndim >= 1 for array in state.values())
    twin = kind("logits")
    twin.merge(state)
    for array in state.values():
        array[...] = 0
    assert twin.compute() == before
    fed(twin, [1, 0, 0, 1], [0, 1, 0, 0])
    assert metric.compute() == before


def test_inputs_may_be_reused_after_the_update() -> None:
    for kind in READERS_OF_LABELS:
        output, labels = np.array([0.5, -1.0, 2.0]), np.array([0, 0, 1])
        metric: Metric = kind()
        metric.update({"logits": output}, labels, {})
        before = metric.compute()
        output[:], labels[:] = 0, 0
        assert metric.compute() == before


def test_a_metric_of_ones_own_counts() -> None:
    class MicroRecallOfTail(ClassCounts):
        def score(self, correct: Any, labels: Any, predicted: Any) -> float:
            return float(correct[1:].sum() / max(1, labels[1:].sum()))

    assert value(MicroRecallOfTail(), [0, 1, 2, 0], [0, 1, 2, 2]) == pytest.approx(2 / 3)


class Named(Mean):
    """Values that name themselves."""

    def __init__(self, *names: str):
        super().__init__("loss")
        self.names = names

    def compute(self) -> Any:
        return dict.fromkeys(self.names, np.float32(0.5))


def test_names_of_an_evaluation() -> None:
    values = compute_all({"x": Named("p@1", "mrr"), "acc": Acc()})
    assert list(values) == ["p@1", "mrr", "acc"] and type(values["mrr"]) is float
    for name in ("loss", "n"):
        with pytest.raises(ConfigError, match=f"cannot be called '{name}'"):
            compute_all({"x": Named(name)})
        with pytest.raises(ConfigError, match=f"cannot be called '{name}'"):
            check_names({"acc": Acc(), name: Acc()})
    check_names({"acc": Acc()})
    with pytest.raises(ConfigError, match="Two metrics give a value called 'acc'"):
        compute_all({"x": Named("acc"), "acc": Acc()})


def test_labels_of_a_batch() -> None:
    columns = {"a": 1, "b": 2, "ids": 3}
    assert label_columns(("a",), columns) == label_columns(("a", "c"), columns) == 1
    assert label_columns(("a", "b"), columns) == {"a": 1, "b": 2}
    assert label_columns((), columns) == label_columns(("c",), columns) == {}
