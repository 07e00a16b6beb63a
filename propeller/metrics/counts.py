"""Metrics over class ids: int64 counts that add up, so shards merge to the last bit.

Shapes: B rows of a batch, C classes seen so far (the largest class id + 1).

What these metrics read:

- `predictions[key]`: float `[B, C]` scores, whose argmax is the class (of equal scores the first
  wins); float `[B]` or `[B, 1]`, one logit a row, class 1 above 0 and else class 0; int or bool `[B]`
  or `[B, 1]` class ids.
- `labels`: class ids, `[B]` or `[B, 1]`; int, bool, or float of whole numbers.

Class ids count from 0. With scores, a label that has no score is an error.
"""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError
from propeller.metrics.base import (
    Array,
    Metric,
    as_column,
    check_no_nan,
    check_rows,
    read_numbers,
    read_output,
    state_array,
)

Ids = npt.NDArray[np.int64]


class _Counts(Metric):
    """Two-dimensional counts that are summed over batches and ranks, and grow with the class ids.

    Args:
        key: which output holds the scores or class ids.
    """

    max_classes: ClassVar[int]
    _name: ClassVar[str]

    def __init__(self, key: str = "logits"):
        self.key = key
        self.reset()

    @abc.abstractmethod
    def _tally(self, labels: Ids, predicted: Ids) -> Ids:
        """Counts of one batch, in the smallest shape that holds its class ids."""

    def reset(self) -> None:
        nothing = np.zeros(0, dtype=np.int64)
        self._counts = self._tally(nothing, nothing)

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        self._add(self._tally(*_read_classes(predictions, labels, self.key, self.max_classes)))

    def state(self) -> dict[str, Array]:
        return {self._name: self._counts.copy()}

    def merge(self, state: Mapping[str, Array]) -> None:
        self._add(state_array(state, self._name))

    def _add(self, counts: Ids) -> None:
        rows, columns = (max(sizes) for sizes in zip(self._counts.shape, counts.shape, strict=True))
        if (rows, columns) != self._counts.shape:
            grown = np.zeros((rows, columns), dtype=np.int64)
            grown[: self._counts.shape[0], : self._counts.shape[1]] = self._counts
            self._counts = grown
        self._counts[: counts.shape[0], : counts.shape[1]] += counts


class ConfusionMatrix(_Counts):
    """How often each class was predicted for each label.

    `compute()` gives a nested list of ints `[C][C]`, rows by label and columns by prediction, with C
    the largest class id seen + 1; `[]` over no rows. Reads what the module `propeller.metrics.counts`
    says, with class ids below 4096: the matrix is dense.

    Source: `sklearn.metrics.confusion_matrix(..., labels=range(C))`.
    """

    max_classes = 1 << 12
    _name = "pair_counts"

    def compute(self) -> list[list[int]]:
        matrix: list[list[int]] = self._counts.tolist()
        return matrix

    def _tally(self, labels: Ids, predicted: Ids) -> Ids:
        size = _num_classes(labels, predicted)
        return _bincount(labels * size + predicted, size * size).reshape(size, size)


class ClassCounts(_Counts):
    """Base of the metrics that need three counts a class: correct, labels, predictions.

    Three counts rather than a confusion matrix, so that 30,000 classes cost 720 kB and not 7 GB. A
    subclass says how they make its value.
    """

    max_classes = 1 << 20
    _name = "class_counts"

    @abc.abstractmethod
    def score(self, correct: Ids, labels: Ids, predicted: Ids) -> float:
        """The value over one row or more.

        Args:
            correct: int64 `[C]`, rows of each class that were predicted as it.
            labels: int64 `[C]`, rows of each class.
            predicted: int64 `[C]`, rows predicted as each class.
        """

    def compute(self) -> float:
        correct, labels, predicted = self._counts
        return self.score(correct, labels, predicted) if labels.any() else math.nan

    def _tally(self, labels: Ids, predicted: Ids) -> Ids:
        size = _num_classes(labels, predicted)
        correct = labels[labels == predicted]
        return np.stack([_bincount(ids, size) for ids in (correct, labels, predicted)])


class Acc(ClassCounts):
    """Share of the rows whose predicted class is the label.

    Reads what the module `propeller.metrics.counts` says; `nan` over no rows.

    Source: `sklearn.metrics.accuracy_score`.
    """

    def score(self, correct: Ids, labels: Ids, predicted: Ids) -> float:
        return int(correct.sum()) / int(labels.sum())


class _OneClass(ClassCounts):
    """A metric of one class against all others.

    Args:
        key: which output holds the scores or class ids.
        positive: the class id that counts as positive.

    Raises:
        ConfigError: `positive` is no class id.
    """

    def __init__(self, key: str = "logits", positive: int = 1):
        super().__init__(key)
        try:
            self.positive = operator.index(positive)
        except TypeError:
            self.positive = -1
        if self.positive < 0:
            raise ConfigError(f"positive={positive!r}; a class id, an int from 0 on, was expected.")

    def score(self, correct: Ids, labels: Ids, predicted: Ids) -> float:
        if self.positive >= len(labels):
            return 0.0
        return self.score_positive(*(int(counts[self.positive]) for counts in (correct, labels, predicted)))

    @abc.abstractmethod
    def score_positive(self, correct: int, labels: int, predicted: int) -> float:
        """The value from the three counts of the positive class."""


class Precision(_OneClass):
    """Share of the rows predicted as `positive` that are.

    Reads what the module `propeller.metrics.counts` says. 0 when nothing was predicted as positive,
    as scikit-learn has it; `nan` over no rows.

    Source: `sklearn.metrics.precision_score`.
    """

    def score_positive(self, correct: int, labels: int, predicted: int) -> float:
        return _ratio(correct, predicted)


class Recall(_OneClass):
    """Share of the rows of class `positive` that were predicted as it.

    Reads what the module `propeller.metrics.counts` says. 0 when no label is positive, as scikit-learn
    has it; `nan` over no rows.

    Source: `sklearn.metrics.recall_score`.
    """

    def score_positive(self, correct: int, labels: int, predicted: int) -> float:
        return _ratio(correct, labels)


class F1(_OneClass):
    """Harmonic mean of precision and recall of class `positive`.

    Reads what the module `propeller.metrics.counts` says. 0 when no label and no prediction is positive, as
    scikit-learn has it; `nan` over no rows.

    Source: `sklearn.metrics.f1_score`.
    """

    def score_positive(self, correct: int, labels: int, predicted: int) -> float:
        return _ratio(2 * correct, labels + predicted)


class MacroF1(ClassCounts):
    """Mean of the F1 of each class that occurs among labels or predictions.

    Reads what the module `propeller.metrics.counts` says; `nan` over no rows.

    Source: `sklearn.metrics.f1_score(..., average="macro")`.
    """

    def score(self, correct: Ids, labels: Ids, predicted: Ids) -> float:
        total = labels + predicted
        seen = total > 0
        return float(np.mean(2 * correct[seen] / total[seen]))


class MCC(ClassCounts):
    """Matthews correlation coefficient, of two classes or more.

    Reads what the module `propeller.metrics.counts` says. 0 when all labels or all predictions are of
    one class, as scikit-learn has it; `nan` over no rows.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient",
    2004, eq. 8; `sklearn.metrics.matthews_corrcoef`.
    """

    def score(self, correct: Ids, labels: Ids, predicted: Ids) -> float:
        # Python's ints: the products pass 2**63 from three billion rows on.
        by_label, by_prediction = labels.astype(object), predicted.astype(object)
        rows = int(labels.sum())
        covariance = rows * int(correct.sum()) - int(by_label @ by_prediction)
        spread = rows**2 - int(by_label @ by_label), rows**2 - int(by_prediction @ by_prediction)
        return _ratio(covariance, math.sqrt(spread[0] * spread[1]))


def _ratio(part: int, whole: float) -> float:
    return part / whole if whole else 0.0


def _num_classes(labels: Ids, predicted: Ids) -> int:
    return 1 + int(max(labels.max(initial=-1), predicted.max(initial=-1)))


def _bincount(ids: Ids, size: int) -> Ids:
    return np.bincount(ids, minlength=size).astype(np.int64, copy=False)


def _read_classes(
    predictions: Mapping[str, Array], labels: Array, key: str, max_classes: int
) -> tuple[Ids, Ids]:
    """Returns class ids of labels and predictions, int64 `[B]` each.

    Raises:
        ConfigError: there is no output `key`.
        DataError: a shape, dtype or value that the module does not name, class ids from
            `max_classes` on among them.
    """
    output, labels = read_output(predictions, key), read_numbers(labels, "labels")
    column = as_column(labels, "labels")
    name = f"predictions[{key!r}]"
    if output.dtype.kind != "f":
        predicted = as_column(output, name, expected="[B] or [B, 1] for class ids, floats for scores,")
        num_scored = max_classes
    elif output.ndim == 2 and output.shape[1] > 1:
        predicted, num_scored = output.argmax(axis=1), output.shape[1]
        # argmax takes a NaN for the greatest, so the winners show whether a row has one.
        check_no_nan(output[np.arange(len(output)), predicted], name)
    else:
        logits = as_column(output, name, expected="[B, C], [B, 1] or [B]")
        check_no_nan(logits, name)
        predicted, num_scored = logits > 0, 2
    check_rows(output, labels, key)
    return (
        _checked_ids(column, "labels", min(num_scored, max_classes), f"{name} of shape {list(output.shape)}"),
        _checked_ids(predicted, name, max_classes, "the metric"),
    )


def _checked_ids(ids: Array, name: str, num_classes: int, holder: str) -> Ids:
    """Returns `ids` as int64.

    Raises:
        DataError: an id that is not whole, negative, or from `num_classes`, which `holder` sets, on.
    """
    if ids.dtype.kind == "f":
        ids = ids.astype(np.float64)  # float16 cannot be compared with a large class count
        _refuse(np.floor(ids) != ids, ids, name, "a whole number was expected")
    _refuse(ids < 0, ids, name, "class ids count from 0; leave rows without a label out")
    _refuse(ids >= num_classes, ids, name, f"{holder} has classes 0 to {num_classes - 1}")
    return ids.astype(np.int64)


def _refuse(wrong: npt.NDArray[np.bool_], ids: Array, name: str, reason: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{name}: class id {ids[row].item()} in row {row}; {reason}.")
