"""What every metric is, and how predictions and labels are read.

Shapes: B rows of a batch, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError, did_you_mean

Array = npt.NDArray[Any]


class Metric(abc.ABC):
    """A value computed over a whole data set, fed batch by batch.

    Updating in pieces, updating at once, and merging the states of shards give the same value.
    """

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets all rows."""

    @abc.abstractmethod
    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        """Adds one batch; a batch of no rows is fine and adds nothing.

        Args:
            predictions: the model's outputs by name, row-aligned.
            labels: `[B]` or `[B, 1]`.
            features: the batch's columns by name, those that never reach the model among them.

        Raises:
            ConfigError: the output that the metric reads is not there.
            DataError: a shape, dtype or value that the metric cannot use. The metric is then as it
                was before the call.
        """

    @abc.abstractmethod
    def compute(self) -> float | list[list[int]] | Mapping[str, float]:
        """The value over all rows so far; `nan` where it is undefined. May be called at any time.

        Values by name stand in the result of an evaluation under these names, not the metric's own.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Array]:
        """What another rank needs to take in these rows: arrays of its own, one axis at least."""

    @abc.abstractmethod
    def merge(self, state: Mapping[str, Array]) -> None:
        """Adds the rows behind another rank's `state()`.

        Raises:
            DataError: the state comes from another kind of metric.
        """


# What every result of an evaluation has besides metrics.
_RESERVED = ("loss", "n")


def check_names(names: Iterable[str]) -> None:
    """Checks that metrics, or their values, can be called so; for metrics, before they are needed.

    Raises:
        ConfigError: one is called `loss` or `n`, which every result has.
    """
    for name in names:
        if name in _RESERVED:
            raise ConfigError(
                f"A metric cannot be called {name!r}: every evaluation has that already. Name it otherwise."
            )


def compute_all(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The values of metrics by name; one that has several gives each under a name of its own.

    Raises:
        ConfigError: see `check_names`; or two values have one name.
    """
    computed: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        values = value if isinstance(value, Mapping) else {name: value}
        check_names(values)
        for key, one in values.items():
            if key in computed:
                raise ConfigError(f"Two metrics give a value called {key!r}; expected a name for each.")
            computed[key] = one.tolist() if isinstance(one, np.ndarray | np.generic) else one
    return computed


def label_columns(names: Sequence[str], columns: Mapping[str, Any]) -> Any:
    """The labels of a batch as metrics get them: the array, or where there are several a dictionary.

    Args:
        names: the columns that are labels.
        columns: of the batch.
    """
    labels = {name: columns[name] for name in names if name in columns}
    return labels if len(labels) != 1 else next(iter(labels.values()))


def read_output(predictions: Mapping[str, Array], key: str) -> Array:
    """Returns `predictions[key]` as an array of numbers.

    Raises:
        ConfigError: there is no such output.
        DataError: it holds no numbers, or bfloat16 as raw bits.
    """
    if key not in predictions:
        raise ConfigError(
            f"a metric reads the output {key!r}, the model gives {sorted(predictions)}."
            f"{did_you_mean(key, predictions)} Name the output with the metric's `key`."
        )
    output = read_numbers(predictions[key], f"predictions[{key!r}]")
    if output.dtype == np.uint16:
        # Paddle's `Tensor.numpy()` gives bfloat16 as uint16 bits, which would pass for class ids.
        raise DataError(
            f"predictions[{key!r}] is uint16, which is how bfloat16 comes out of Paddle as raw bits; "
            "float scores or int class ids were expected. Cast the output to float32 first."
        )
    return output


def read_numbers(values: Any, name: str) -> Array:
    """Returns `values` as an array of bool, int or float.

    Raises:
        DataError: it is none, such as text, None or rows of unequal length.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name} is no array: {error}. Rows of equal length were expected.") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} has dtype {array.dtype}; bool, int or float was expected.")
    return array


def as_column(array: Array, name: str, *, expected: str = "[B] or [B, 1]") -> Array:
    """Returns `array`, `[B]` or `[B, 1]`, as `[B]`.

    Raises:
        DataError: it has another shape; the message gives `expected`.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{name} ({array.dtype}) has shape {list(array.shape)}; {expected} was expected.")
    return array


def check_rows(output: Array, labels: Array, key: str) -> None:
    """Checks that predictions and labels have the same number of rows.

    Raises:
        DataError: they have not.
    """
    if len(output) != len(labels):
        raise DataError(
            f"predictions[{key!r}] has shape {list(output.shape)}, labels have {list(labels.shape)}: "
            "one label for each row of predictions was expected."
        )


def check_no_nan(values: Array, name: str) -> None:
    """Checks that `values`, `[B]`, holds no NaN.

    Raises:
        DataError: it does.
    """
    bad = np.flatnonzero(np.isnan(values))
    if bad.size:
        raise DataError(
            f"{name} is NaN in {bad.size} of {len(values)} rows (the first is row {bad[0]}); "
            "numbers were expected. Look for a loss that diverged, or for labels that are missing."
        )


def read_values(array: Array, name: str, *, expected: str = "[B] or [B, 1]") -> npt.NDArray[np.float64]:
    """Returns one number a row, `[B]` or `[B, 1]`, as float64 `[B]`.

    Raises:
        DataError: another shape, or a NaN.
    """
    values = as_column(array, name, expected=expected).astype(np.float64)
    check_no_nan(values, name)
    return values


def state_array(state: Mapping[str, Array], name: str) -> Array:
    """Returns `state[name]`.

    Raises:
        DataError: the state holds no such array.
    """
    if name not in state:
        raise DataError(
            f"a metric's state with {name!r} was expected, this one holds {sorted(state)}: "
            "merge states of the same kind of metric only."
        )
    return np.asarray(state[name])
