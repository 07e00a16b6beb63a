"""Metrics over the order of values: they keep 16 bytes a row, since the exact order needs every value.

Shapes: B rows of a batch, N rows in all.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import DataError
from propeller.metrics.base import (
    Array,
    Metric,
    check_rows,
    read_numbers,
    read_output,
    read_values,
    state_array,
)
from propeller.metrics.moments import Moments, Values, read_pairs


class _StoredPairs(Metric):
    """Keeps a prediction and a label for each row, float64 `[2, N]`.

    Args:
        key: which output holds the values.
    """

    def __init__(self, key: str = "logits"):
        self.key = key
        self.reset()

    def reset(self) -> None:
        self._chunks: list[Values] = []

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        self._chunks.append(self._read(predictions, labels))

    def compute(self) -> float:
        values, labels = self._pairs()
        return self.score(values, labels)

    def state(self) -> dict[str, Array]:
        return {"pairs": self._pairs().copy()}

    def merge(self, state: Mapping[str, Array]) -> None:
        self._chunks.append(state_array(state, "pairs").astype(np.float64))

    @abc.abstractmethod
    def score(self, values: Values, labels: Values) -> float:
        """The value from all predictions and labels, float64 `[N]` each."""

    def _read(self, predictions: Mapping[str, Array], labels: Array) -> Values:
        return read_pairs(predictions, labels, self.key)

    def _pairs(self) -> Values:
        self._chunks = [np.concatenate([np.zeros((2, 0)), *self._chunks], axis=1)]
        return self._chunks[0]


class AUC(_StoredPairs):
    """Area under the ROC curve of two classes, exact; equal scores count half.

    Reads `predictions[key]` `[B]` or `[B, 1]`, any score that rises with class 1, or `[B, 2]`, logits,
    log-probabilities or probabilities, ranked by the second less the first: the order that a softmax
    gives. Labels are 0 or 1, `[B]` or `[B, 1]`. No NaN. Gives `nan` unless both classes occur.

    Source: the Mann-Whitney statistic, Hanley and McNeil, "The meaning and use of the area under a
    receiver operating characteristic (ROC) curve", 1982; `sklearn.metrics.roc_auc_score`.
    """

    def score(self, values: Values, labels: Values) -> float:
        positive = labels == 1
        num_positive = int(positive.sum())
        num_negative = len(labels) - num_positive
        if not num_positive or not num_negative:
            return math.nan
        doubled = int(_doubled_ranks(values)[positive].sum()) - num_positive * (num_positive + 1)
        return doubled / (2 * num_positive * num_negative)

    def _read(self, predictions: Mapping[str, Array], labels: Array) -> Values:
        output, labels = read_output(predictions, self.key), read_numbers(labels, "labels")
        scores = output
        if output.ndim == 2 and output.shape[1] == 2:
            with np.errstate(invalid="ignore"):  # inf - inf is the NaN that is refused below
                scores = output[:, 1].astype(np.float64) - output[:, 0]
        values = read_values(scores, f"predictions[{self.key!r}]", expected="[B], [B, 1] or [B, 2]")
        targets = read_values(labels, "labels")
        check_rows(output, labels, self.key)
        wrong = np.flatnonzero((targets != 0) & (targets != 1))
        if wrong.size:
            raise DataError(
                f"labels hold {targets[wrong[0]]:g} in row {wrong[0]}; 0 or 1 was expected: "
                "AUC is of two classes."
            )
        return np.stack([values, targets])


class Spearman(_StoredPairs):
    """Spearman's rank correlation between predictions and labels; equal values share their mean rank.

    Reads `predictions[key]` `[B]` or `[B, 1]` and labels `[B]` or `[B, 1]`, numbers without NaN. Gives
    `nan` below two rows and when either side is constant.

    Source: `scipy.stats.spearmanr`.
    """

    def score(self, values: Values, labels: Values) -> float:
        ranks = np.stack([_doubled_ranks(values), _doubled_ranks(labels)]).astype(np.float64)
        return Moments.of(ranks).correlation()


def _doubled_ranks(values: Values) -> npt.NDArray[np.int64]:
    """Returns twice the rank of each value, from 1 on, int64.

    Equal values share their mean rank, a whole or a half: twice that is exact.
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts, dtype=np.int64)
    doubled: npt.NDArray[np.int64] = 2 * last - counts + 1
    return doubled[which]
