"""Metrics over rows that have any number of labels: int64 counts that add up, so shards merge exactly.

Shapes: B rows of a batch, C labels.

What these metrics read:

- `predictions[key]`: float `[B, C]`, a logit for each label; a label is predicted where its probability, the
  logit's sigmoid, reaches the label's threshold.
- `labels`: `[B, C]`, 1 where the row has the label, else 0; int, bool or float.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError
from propeller.metrics.base import Array, Metric, check_rows, read_numbers, read_output, state_array

Counts = npt.NDArray[np.int64]


def sigmoid(logits: Array) -> npt.NDArray[np.float64]:
    """`1 / (1 + exp(-x))`, in a form that does not overflow."""
    half: npt.NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64)))
    return half


class MultiLabelCounts(Metric):
    """Base of the metrics that need three counts a label, and the rows that were right as a whole.

    Args:
        key: which output holds the logits.
        thresholds: the probability from which on a label is predicted, one for all or one for each.

    Raises:
        ConfigError: a threshold that is no probability.
    """

    def __init__(self, key: str = "logits", thresholds: float | Sequence[float] = 0.5):
        self.key = key
        self._thresholds = np.asarray(thresholds, np.float64)
        if self._thresholds.ndim > 1 or not ((0 <= self._thresholds) & (self._thresholds <= 1)).all():
            raise ConfigError(f"thresholds={thresholds!r}; probabilities from 0 to 1 were expected.")
        self.reset()

    @abc.abstractmethod
    def score(self, correct: Counts, labels: Counts, predicted: Counts) -> float:
        """The value over one row or more.

        Args:
            correct: int64 `[C]`, rows that have each label and were predicted to.
            labels: int64 `[C]`, rows that have each label.
            predicted: int64 `[C]`, rows that were predicted to.
        """

    def reset(self) -> None:
        self._counts: Counts = np.zeros((3, 0), dtype=np.int64)
        self._rows: Counts = np.zeros(2, dtype=np.int64)  # all, and those that were right as a whole

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        output, truth = self._read(predictions, labels)
        predicted = sigmoid(output) >= self._thresholds
        counts = np.stack([(truth & predicted).sum(0), truth.sum(0), predicted.sum(0)])
        self._add(counts, np.array([len(truth), (truth == predicted).all(axis=1).sum()]))

    def compute(self) -> float:
        return self.score(*self._counts) if self._rows[0] else math.nan

    def state(self) -> dict[str, Array]:
        return {"label_counts": self._counts.copy(), "row_counts": self._rows.copy()}

    def merge(self, state: Mapping[str, Array]) -> None:
        self._add(state_array(state, "label_counts"), state_array(state, "row_counts"))

    def _add(self, counts: Counts, rows: Counts) -> None:
        if not counts.shape[1]:
            return
        if self._counts.shape[1] not in (0, counts.shape[1]):
            raise DataError(
                f"rows of {counts.shape[1]} labels came after rows of {self._counts.shape[1]}; as many were "
                "expected."
            )
        self._counts = self._counts + counts if self._counts.size else counts.astype(np.int64)
        self._rows = self._rows + rows

    def _read(self, predictions: Mapping[str, Array], labels: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Returns logits and labels, `[B, C]` each."""
        output, truth = read_output(predictions, self.key), read_numbers(labels, "labels")
        check_rows(output, truth, self.key)
        if output.ndim != 2 or output.shape != truth.shape:
            raise DataError(
                f"predictions[{self.key!r}] has shape {list(output.shape)}, labels have {list(truth.shape)}; "
                "[B, C] was expected of both."
            )
        if self._thresholds.ndim and len(self._thresholds) != output.shape[1]:
            raise DataError(
                f"predictions[{self.key!r}] has shape {list(output.shape)}, but there are "
                f"{len(self._thresholds)} thresholds; expected one for each label."
            )
        if np.isnan(output).any():
            raise DataError(
                f"predictions[{self.key!r}] holds NaN; numbers were expected. Look for a loss that diverged."
            )
        if not np.isin(truth, (0, 1)).all():
            raise DataError("labels hold other values than 0 and 1, which say whether a row has a label.")
        return output, truth.astype(bool)


class MicroF1(MultiLabelCounts):
    """F1 over all pairs of row and label; 0 when no label is there and none is predicted.

    Reads what the module `propeller.metrics.multi_label` says; `nan` over no rows.

    Source: `sklearn.metrics.f1_score(..., average="micro", zero_division=0)`.
    """

    def score(self, correct: Counts, labels: Counts, predicted: Counts) -> float:
        total = int(labels.sum()) + int(predicted.sum())
        return 2 * int(correct.sum()) / total if total else 0.0


class MultiLabelMacroF1(MultiLabelCounts):
    """Mean of the F1 of each label; 0 for one that is neither there nor predicted.

    Reads what the module `propeller.metrics.multi_label` says; `nan` over no rows.

    Source: `sklearn.metrics.f1_score(..., average="macro", zero_division=0)`.
    """

    def score(self, correct: Counts, labels: Counts, predicted: Counts) -> float:
        return float(np.mean(2 * correct / np.maximum(labels + predicted, 1)))


class ExactMatch(MultiLabelCounts):
    """Share of the rows that got all their labels and no other.

    Reads what the module `propeller.metrics.multi_label` says; `nan` over no rows.

    Source: `sklearn.metrics.accuracy_score` of indicator matrices.
    """

    def score(self, correct: Counts, labels: Counts, predicted: Counts) -> float:
        rows, right = self._rows.tolist()
        return float(right / rows)
