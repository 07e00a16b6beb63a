"""Metrics over real values that sums are enough for: a few numbers of state, whatever the rows.

Shapes: B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.metrics.base import (
    Array,
    Metric,
    check_rows,
    read_numbers,
    read_output,
    read_values,
    state_array,
)

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and co-moments of rows of pairs (x, y); two of them add up to those of all rows.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, eq. 2.1: no difference of large sums, so an offset of the data costs no digits.

    Attributes:
        count: float64 `[1]`, rows.
        mean: float64 `[2]`.
        comoments: float64 `[2, 2]`, sums of products of the deviations from the mean.
        low: float64 `[2]`, the least x and y; inf without rows.
        high: float64 `[2]`, the greatest; -inf without rows.
    """

    count: Values
    mean: Values
    comoments: Values
    low: Values
    high: Values

    @classmethod
    def of(cls, pairs: Values) -> Moments:
        """The moments of `pairs`, float64 `[2, N]`."""
        count = pairs.shape[1]
        # Infinite or huge values make the sums inf or nan, and so the correlation.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = pairs.mean(axis=1) if count else np.zeros(2)
            deviations = pairs - mean[:, None]
            comoments = (deviations[:, None] * deviations[None]).sum(axis=2)
        low, high = pairs.min(axis=1, initial=math.inf), pairs.max(axis=1, initial=-math.inf)
        return cls(np.array([float(count)]), mean, comoments, low, high)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / count if count[0] else np.zeros(1)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = other.mean - self.mean
            mean = self.mean + delta * share
            between = delta[:, None] * delta[None] * (self.count * share)
            comoments = self.comoments + other.comoments + between
        return Moments(
            count, mean, comoments, np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        )

    def correlation(self) -> float:
        """Pearson's r; `nan` below two rows, with constant x or y, or when the sums overflowed."""
        # The rounded mean of equal values may differ from them, so the range tells a constant.
        if not (self.low < self.high).all():
            return math.nan
        xx, xy, yy = (float(self.comoments[place]) for place in ((0, 0), (0, 1), (1, 1)))
        scale = math.sqrt(xx) * math.sqrt(yy)
        if not math.isfinite(scale) or scale == 0:
            return math.nan
        return max(-1.0, min(1.0, xy / scale))


class Pearson(Metric):
    """Pearson's linear correlation between predictions and labels.

    Reads `predictions[key]` `[B]` or `[B, 1]` and labels `[B]` or `[B, 1]`, numbers without NaN.
    Gives `nan` below two rows, when either side is constant, and with values that are infinite or
    beyond 1e150, whose squares overflow.

    Source: `scipy.stats.pearsonr`.

    Args:
        key: which output holds the values.
    """

    def __init__(self, key: str = "logits"):
        self.key = key
        self.reset()

    def reset(self) -> None:
        self._moments = Moments.of(np.zeros((2, 0)))

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        self._moments += Moments.of(read_pairs(predictions, labels, self.key))

    def compute(self) -> float:
        return self._moments.correlation()

    def state(self) -> dict[str, Array]:
        return {name: array.copy() for name, array in vars(self._moments).items()}

    def merge(self, state: Mapping[str, Array]) -> None:
        self._moments += Moments(**{name: state_array(state, name) for name in vars(self._moments)})


class Mean(Metric):
    """Weighted mean of an output or of a feature, over rows or over any elements.

    Reads numbers of shape `[B, ...]` and weights of the same shape (`[B]` and `[B, 1]` are alike),
    each an output of the model or else a feature: an output wins over a feature of the same name.
    An element of weight 0 is left out, whatever its value. Gives `nan` when all weights together are 0 and
    when an element that counts is NaN. Labels are not read.

    Source: `numpy.average`.

    Args:
        key: the output or feature to take the mean of.
        weight: the output or feature that holds the weights; None weighs all elements alike.
    """

    def __init__(self, key: str, weight: str | None = None):
        self.key = key
        self.weight = weight
        self.reset()

    def reset(self) -> None:
        self._sums = np.zeros(2)

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        values = _read_elements(predictions, features, self.key)
        weights = np.ones_like(values)
        if self.weight is not None:
            weights = _read_elements(predictions, features, self.weight)
            if weights.shape != values.shape:
                raise DataError(
                    f"{self.key!r} has shape {list(values.shape)}, its weights {self.weight!r} have "
                    f"{list(weights.shape)}: one weight for each element was expected."
                )
            if not (weights >= 0).all():
                raise DataError(f"the weights {self.weight!r} hold {weights.min()}; 0 or more was expected.")
        counted = weights > 0
        with np.errstate(over="ignore", invalid="ignore"):
            weighted = values[counted] * weights[counted]
            self._sums += np.array([weighted.sum(), weights[counted].sum()])

    def compute(self) -> float:
        total, weight = self._sums.tolist()
        return total / weight if weight else math.nan

    def state(self) -> dict[str, Array]:
        return {"sums": self._sums.copy()}

    def merge(self, state: Mapping[str, Array]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self._sums += state_array(state, "sums")


def read_pairs(predictions: Mapping[str, Array], labels: Array, key: str) -> Values:
    """Returns one prediction and one label a row, `[B]` or `[B, 1]` each, as float64 `[2, B]`.

    Raises:
        ConfigError: there is no output `key`.
        DataError: another shape, unequal rows, or a NaN.
    """
    output, labels = read_output(predictions, key), read_numbers(labels, "labels")
    values = read_values(output, f"predictions[{key!r}]")
    targets = read_values(labels, "labels")
    check_rows(output, labels, key)
    return np.stack([values, targets])


def _read_elements(predictions: Mapping[str, Array], features: Mapping[str, Any], key: str) -> Values:
    """Returns an output or else a feature as float64 `[B, ...]`, `[B, 1]` as `[B]`."""
    if key in predictions:
        array = read_output(predictions, key)
    elif key in features:
        array = read_numbers(features[key], f"features[{key!r}]")
    else:
        raise ConfigError(
            f"Mean reads {key!r}; the model gives {sorted(predictions)}, the features are "
            f"{sorted(features)}.{did_you_mean(key, [*predictions, *features])}"
        )
    if array.ndim == 0:
        raise DataError(f"{key!r} is a single number; one for each row was expected, [B, ...].")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    return array.astype(np.float64)
