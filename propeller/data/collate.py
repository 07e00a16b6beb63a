"""Collation as PaddleNLP users know it: `Pad`, `Stack`, `Tuple` and `Dict` make a batch of samples.

    batchify = Dict({"input_ids": Pad(pad_val=0), "label": Stack(dtype="int64")})
    input_ids, label = batchify(samples)

A sample is a dict or a tuple of fields; a field is a number, a list of numbers or an array. `Dict` and
`Tuple` return a tuple, as a `paddle.io.DataLoader` wants it; `Dict.as_dict` gives a batch by name, which is
what `Dataset.batch` takes to feed a `Learner`.

Source: the documentation of `paddlenlp.data`. Where that would cut numbers off or let shapes grow silently
(mixed dtypes, a pad value or a dtype that does not fit, other axes of unequal length), there is an error.
Python's floats become float32, as `pad_batch` makes them, or the loss would become float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError, did_you_mean

Array: TypeAlias = npt.NDArray[Any]
Collator: TypeAlias = Callable[[Sequence[Any]], Any]

_NUMBERS = "biufc"
_ANY = _NUMBERS + "US"


class Stack:
    """Stacks fields of one shape.

    Args:
        axis: where the batch's axis goes.
        dtype: of the result; None: float32 for Python's floats, else what numpy makes of the fields.

    Raises:
        ConfigError: there is no such dtype.
    """

    def __init__(self, axis: int = 0, dtype: npt.DTypeLike | None = None):
        self._axis = axis
        self._dtype = _dtype(dtype)
        self._kinds = _NUMBERS if self._dtype is not None and self._dtype.kind in _NUMBERS else _ANY

    def __call__(self, samples: Sequence[Any]) -> Array:
        """Returns the stacked fields, `[batch, ...]` for axis 0.

        Raises:
            ConfigError: there is no sample, or no such axis.
            DataError: a field is neither numbers nor text, differs from the first in its shape, or holds a
                number that the dtype cannot.
        """
        fields = _arrays("Stack", samples, self._kinds)
        shape = fields[0].shape
        for index, field in enumerate(fields):
            if field.shape != shape:
                raise DataError(
                    f"Stack() got a field of shape {list(field.shape)} in sample {index}, {list(shape)} in "
                    "the first; expected one shape. Use Pad for fields of unequal length."
                )
        if not -len(shape) - 1 <= self._axis <= len(shape):
            raise ConfigError(f"Stack() has axis {self._axis}, but the result has {len(shape) + 1} axes")
        stacked = np.stack(fields, axis=self._axis)
        return _cast("Stack", stacked, self._dtype or _default(samples, stacked.dtype))


class Pad:
    """Pads fields along one axis to the longest, and stacks them.

    Args:
        pad_val: what stands behind (or before) shorter fields.
        axis: the axis of a field that is padded; the others must be equal.
        ret_length: whether the fields' lengths along `axis` are returned, too: True gives them as int32, a
            dtype in that one.
        dtype: of the result; None: float32 for Python's floats, else what numpy makes of the fields.
        pad_right: whether padding stands behind a field, else before it.

    Raises:
        ConfigError: there is no such dtype.
    """

    def __init__(
        self,
        pad_val: float = 0,
        axis: int = 0,
        ret_length: bool | npt.DTypeLike = False,
        dtype: npt.DTypeLike | None = None,
        pad_right: bool = True,
    ):
        self._pad_val = pad_val
        self._axis = axis
        self._length_dtype = np.dtype(np.int32) if ret_length is True else _dtype(ret_length or None)
        self._dtype = _dtype(dtype)
        self._pad_right = pad_right

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns the padded fields, `[batch, ...]`, or a tuple of these and the lengths, `[batch]`.

        Raises:
            ConfigError: there is no sample, no such axis, or the pad value does not fit the dtype.
            DataError: a field is not of numbers, differs from the first in its axes, or holds a number that
                the dtype cannot.
        """
        fields = _arrays("Pad", samples, _NUMBERS)
        axis = self._checked_axis(fields)
        lengths = [field.shape[axis] for field in fields]
        shape = list(fields[0].shape)
        shape[axis] = max(lengths)
        batch = np.full((len(fields), *shape), *self._fill(samples, fields))
        place = [slice(None)] * len(shape)
        for row, field, length in zip(batch, fields, lengths, strict=True):
            place[axis] = slice(length) if self._pad_right else slice(shape[axis] - length, None)
            row[tuple(place)] = _cast("Pad", field, batch.dtype)
        return batch if self._length_dtype is None else (batch, np.array(lengths, self._length_dtype))

    def _checked_axis(self, fields: list[Array]) -> int:
        first = fields[0]
        if not -first.ndim <= self._axis < first.ndim:
            raise ConfigError(
                f"Pad() has axis {self._axis}, but a field has {first.ndim} axes; numbers go into Stack"
            )
        axis = self._axis % first.ndim
        for index, field in enumerate(fields):
            same = field.ndim == first.ndim and all(
                i == axis or field.shape[i] == first.shape[i] for i in range(first.ndim)
            )
            if not same:
                raise DataError(
                    f"Pad() got a field of shape {list(field.shape)} in sample {index}, {list(first.shape)} "
                    f"in the first; expected shapes that differ in axis {self._axis} alone"
                )
        return axis

    def _fill(self, samples: Sequence[Any], fields: list[Array]) -> tuple[Any, np.dtype[Any]]:
        """The pad value, and the dtype of the batch."""
        if self._dtype is None:
            # An empty list says nothing of its numbers, though numpy makes floats of it.
            told = [f for s, f in zip(samples, fields, strict=True) if f.size or isinstance(s, np.ndarray)]
            dtype = _default(samples, np.result_type(*(told or fields)))
        else:
            dtype = self._dtype
        try:
            return _cast("Pad", np.array(self._pad_val), dtype), dtype
        except (DataError, OverflowError, TypeError, ValueError) as error:
            raise ConfigError(
                f"Pad() has the pad value {self._pad_val!r}, which {dtype} cannot hold; give one that fits, "
                "or a dtype"
            ) from error


class Tuple:
    """Collates samples that are tuples or lists: the i-th function gets the i-th fields.

    Args:
        fn: a function of a list of fields, or a list or tuple of such functions.
        fns: more of them, after a single one.

    Raises:
        ConfigError: what is given is neither.
    """

    def __init__(self, fn: Collator | Sequence[Collator], *fns: Collator):
        if isinstance(fn, (list, tuple)):
            if fns:
                raise ConfigError("Tuple() got a list of functions and more beside it; expected one of both")
            self._fns: list[Collator] = list(fn)
        else:
            self._fns = [fn, *fns]  # type: ignore[list-item]  # what is no function is found out next
        for index, function in enumerate(self._fns):
            _check_function(f"Tuple() got {{}} as function {index}", function)

    def __call__(self, samples: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        """Returns one result for each function; of a function that gives several, each.

        Raises:
            ConfigError: there is no sample.
            DataError: a sample has not as many fields as there are functions; or as the functions raise.
        """
        _check_any("Tuple", samples)
        for index, sample in enumerate(samples):
            if not isinstance(sample, (list, tuple)) or len(sample) != len(self._fns):
                found = f"{len(sample)} fields" if isinstance(sample, (list, tuple)) else f"{sample!r:.80}"
                more = " Use Dict for fields by name." if isinstance(sample, Mapping) else ""
                raise DataError(
                    f"Tuple() got {found} in sample {index}; expected a tuple of {len(self._fns)} fields, "
                    f"one for each function.{more}"
                )
        columns = zip(*samples, strict=True)
        return _flat([fn(list(column)) for fn, column in zip(self._fns, columns, strict=True)])


class Dict:
    """Collates samples that are dicts: each function gets the fields of its name.

    Args:
        fn: name to a function of a list of fields. Fields of other names are left out.

    Raises:
        ConfigError: it is no such dict.
    """

    def __init__(self, fn: Mapping[str, Collator]):
        if not isinstance(fn, Mapping):
            raise ConfigError(f"Dict() got {fn!r:.80}; expected a dict of name to function")
        self._fns = dict(fn)
        for name, function in self._fns.items():
            _check_function(f"Dict() got {{}} for {name!r}", function)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        """Returns one result for each function, in their order; of a function that gives several, each.

        Raises:
            ConfigError: there is no sample.
            DataError: a sample lacks a field; or as the functions raise.
        """
        return _flat(list(self._results(samples).values()))

    def as_dict(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the results by name, which is what a `Learner` takes as a batch.

        The lengths that a `Pad` returns stand beside its array, as `<name>_length`.

        Raises:
            ConfigError: there is no sample.
            DataError: a sample lacks a field; or as the functions raise.
        """
        batch: dict[str, Any] = {}
        for name, result in self._results(samples).items():
            if isinstance(self._fns[name], Pad) and isinstance(result, tuple):
                batch[name], batch[f"{name}_length"] = result
            else:
                batch[name] = result
        return batch

    def _results(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        _check_any("Dict", samples)
        for index, sample in enumerate(samples):
            if not isinstance(sample, Mapping):
                raise DataError(
                    f"Dict() got {sample!r:.80} as sample {index}; expected a dict. Use Tuple for tuples."
                )
            if missing := [name for name in self._fns if name not in sample]:
                raise DataError(
                    f"Dict() got sample {index} without {missing[0]!r}; it has "
                    f"{', '.join(map(repr, sample))}.{did_you_mean(missing[0], map(str, sample))}"
                )
        return {name: fn([sample[name] for sample in samples]) for name, fn in self._fns.items()}


def _dtype(given: Any) -> np.dtype[Any] | None:
    if given is None:
        return None
    try:
        dtype: np.dtype[Any] = np.dtype(given)
    except TypeError as error:
        raise ConfigError(f"there is no dtype {given!r:.80}; expected one of numpy, 'int64' say") from error
    return dtype


def _default(samples: Sequence[Any], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a batch for which none was given: numbers without one are no reason for float64."""
    told = any(hasattr(sample, "dtype") for sample in samples)
    return np.dtype(np.float32) if dtype == np.float64 and not told else dtype


def _check_function(message: str, function: Any) -> None:
    if not callable(function):
        raise ConfigError(message.format(f"{function!r:.80}") + "; expected a function, Pad() or Stack() say")


def _check_any(who: str, samples: Sequence[Any]) -> None:
    if not len(samples):
        raise ConfigError(f"{who}() got no sample; expected at least one")


def _arrays(who: str, samples: Sequence[Any], kinds: str) -> list[Array]:
    """The fields as arrays of some kinds of dtype."""
    _check_any(who, samples)
    arrays = []
    for index, sample in enumerate(samples):
        try:
            array = np.asarray(sample)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{who}() got {sample!r:.80} in sample {index}, no array: {error}") from error
        if array.dtype.kind not in kinds:
            wanted = "numbers" if kinds == _NUMBERS else "numbers or text"
            raise DataError(f"{who}() got {sample!r:.80} in sample {index}; expected {wanted}")
        arrays.append(array)
    return arrays


def _cast(who: str, array: Array, dtype: np.dtype[Any] | None) -> Array:
    """The array in another dtype, rounded at most where that is one of floats."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(cast, array):
        bad = array[cast != array][0]
        raise DataError(f"{who}() got {bad}, which {dtype} cannot hold; give another dtype")
    return cast


def _flat(results: list[Any]) -> tuple[Any, ...]:
    flat: list[Any] = []
    for result in results:
        flat.extend(result if isinstance(result, (list, tuple)) else [result])
    return tuple(flat)
