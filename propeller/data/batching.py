"""From examples to padded batches: in order, by a budget of tokens, or grouped by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.data.chunks import CountedBatches
from propeller.data.node import Context, Entries, Node, Origin, Position, Transform
from propeller.data.transforms import BUCKET, Pooled
from propeller.errors import ConfigError, DataError

# An example on its way, with the position after it.
_Entry = tuple[Any, Position]


def pad_batch(
    examples: Sequence[Mapping[str, Any]],
    *,
    pad_values: Mapping[str, float] | None = None,
    pad_to_multiple: int = 1,
) -> dict[str, Any]:
    """Makes a batch (name -> array with a leading batch axis) of examples (name -> value).

    Arrays are padded at their end, each axis to the longest in the batch. Numbers and booleans are stacked:
    Python ints as int64, floats as float32, what has a dtype keeps it. Strings, bytes and everything else are
    columns for the host alone and become plain lists.

    Args:
        examples: at least one.
        pad_values: name to what its arrays are padded with; 0 for those not named.
        pad_to_multiple: the first axis of arrays is padded on to a multiple of this, so that the lengths of
            batches fall into few.

    Raises:
        DataError: the examples differ in their names, dtypes or numbers of axes.
        ConfigError: there is no example, or a pad value does not fit its array's dtype.
    """
    if not examples:
        raise ConfigError("pad_batch() got no example; expected at least one")
    try:
        return Collate(pad_values or {}, pad_to_multiple)(examples)
    except _BadExample as error:
        raise DataError(f"example {error.index} of the batch: {error}") from error


class _BadExample(Exception):
    """An example that cannot go into its batch."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Collate:
    """How batches are made of examples; see `pad_batch`."""

    pad_values: Mapping[str, float]
    pad_to_multiple: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the batch; as `pad_batch`, but raises `_BadExample` where an example is at fault."""
        _check_names(examples)
        return {name: self._column(name, [example[name] for example in examples]) for name in examples[0]}

    def padded(self, length: int) -> int:
        """Returns the length of a batch whose longest example has `length`."""
        return -(-length // self.pad_to_multiple) * self.pad_to_multiple

    def settings(self) -> dict[str, Any]:
        """Returns what the batches depend on; to pad with 0 is the same as to name no pad value."""
        values = {name: value for name, value in sorted(self.pad_values.items()) if value != 0}
        return {"pad_values": values, "pad_to_multiple": self.pad_to_multiple}

    def _column(self, name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, (np.ndarray, np.generic)):
            if first.dtype.kind not in "biufc":
                return values
            return self._padded_array(name, values) if first.ndim else _stacked(name, values)
        return _stacked(name, values) if isinstance(first, (bool, int, float)) else values

    def _padded_array(self, name: str, values: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        _check_alike(name, values)
        dtype = values[0].dtype
        shape = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
        shape[0] = self.padded(shape[0])
        batch = np.full((len(values), *shape), self._pad_value(name, dtype), dtype)
        for row, value in zip(batch, values, strict=True):
            if value.ndim == 1:
                row[: value.size] = value
            else:
                row[tuple([slice(size) for size in value.shape])] = value
        return batch

    def _pad_value(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        value = self.pad_values.get(name, 0)
        try:
            padding = np.array(value, dtype)
        except (OverflowError, ValueError, TypeError) as error:
            raise ConfigError(f"the pad value {value!r} of {name!r} does not fit {dtype}: {error}") from error
        if dtype.kind in "biu" and padding != value:
            raise ConfigError(
                f"the pad value {value!r} of {name!r} does not fit {dtype}; expected an integer"
            )
        return padding


def _stacked(name: str, values: list[Any]) -> npt.NDArray[Any]:
    """Returns the array of a column of numbers."""
    kinds = set(map(type, values))
    if not kinds <= {int, float}:
        _check_alike(name, values)
        return np.array(values)
    if float in kinds:  # among which an int is a float written short
        return np.array(values, np.float32)
    for index, value in enumerate(values):
        if not -(2**63) <= value < 2**63:
            raise _BadExample(index, f"{name!r} is {value}; expected a number within 64 bits")
    return np.array(values, np.int64)


def _check_alike(name: str, values: list[Any]) -> None:
    first = values[0]
    dtype, ndim = getattr(first, "dtype", None), getattr(first, "ndim", None)
    for index, value in enumerate(values):
        same = getattr(value, "dtype", None) == dtype and getattr(value, "ndim", None) == ndim
        if not same or type(value) is not type(first):
            raise _BadExample(
                index,
                f"{name!r} is {_describe(value)}, but {_describe(first)} in the first example of its batch; "
                "expected the same type, dtype and number of axes in all",
            )


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with {value.ndim} axes"
    return f"{type(value).__name__} {value!r:.40}"


def _check_names(examples: Sequence[Mapping[str, Any]]) -> None:
    first = examples[0]
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise _BadExample(index, f"an example is {_describe(example)}; expected a dict of name to value")
        if example.keys() != first.keys():
            missing, extra = sorted(first.keys() - example.keys()), sorted(example.keys() - first.keys())
            found = [f"lacks {missing}"] * bool(missing) + [f"also has {extra}"] * bool(extra)
            raise _BadExample(
                index,
                f"the example {' and '.join(found)}, compared with the first of its batch ({sorted(first)}); "
                "expected the same names in all",
            )


@dataclass(frozen=True)
class BatchMaker:
    """How a node makes batches of entries, and measures them; errors name the entry's origin.

    Args:
        source: where the entries come from.
        collate: what makes a batch of examples.
        key: the array whose length is an example's; None: its longest array.
        max_tokens: what examples times longest, padded, may come to.
    """

    source: Node
    collate: Collate
    key: str | None = None
    max_tokens: int | None = None

    def make(self, entries: Sequence[_Entry], context: Context) -> dict[str, Any]:
        """Returns the batch."""
        try:
            return self.collate([example for example, _ in entries])
        except _BadExample as error:
            raise self._error(str(error), entries[error.index], context) from error

    def length(self, entry: _Entry, context: Context) -> int:
        """Returns the length of an example, which fits into a batch."""
        example = entry[0]
        try:
            if self.key is not None:
                length = len(example[self.key])
            else:
                length = 0
                for value in example.values():
                    if isinstance(value, np.ndarray) and value.ndim and len(value) > length:
                        length = len(value)
        except (AttributeError, KeyError, TypeError) as error:
            wanted = "a dict of name to value" if self.key is None else f"a dict with an array {self.key!r}"
            raise self._error(f"an example is {example!r:.200}; expected {wanted}", entry, context) from error
        if self.max_tokens is not None and self.collate.padded(length) > self.max_tokens:
            raise self._error(
                f"an example of length {length} (padded: {self.collate.padded(length)}) alone exceeds "
                f"max_tokens={self.max_tokens}. Truncate examples, or raise max_tokens.",
                entry,
                context,
            )
        return length

    def fits(self, count: int, longest: int) -> bool:
        """Whether `count` examples, the longest of `longest`, keep within the budget."""
        return self.max_tokens is None or count * self.collate.padded(longest) <= self.max_tokens

    def settings(self) -> dict[str, Any]:
        """Returns what the batches depend on."""
        return {"key": self.key, "max_tokens": self.max_tokens, **self.collate.settings()}

    def _error(self, message: str, entry: _Entry, context: Context) -> DataError:
        origin = self.source.origin(entry[1], context)
        if origin is None:
            return DataError(message)
        return DataError(message, path=origin.path, line=origin.line)


class PaddedBatch(CountedBatches):
    """So many examples a batch, padded, in order."""

    def __init__(self, maker: BatchMaker, batch_size: int, drop_remainder: bool):
        super().__init__(maker.source, batch_size, drop_remainder)
        self._maker = maker

    def make(self, entries: Sequence[_Entry], context: Context) -> Any:
        return self._maker.make(entries, context)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "padded_batch",
            "batch_size": self._batch_size,
            "drop_remainder": self._drop_remainder,
            **self._maker.collate.settings(),
        }


class TokenBatch(Transform):
    """As many examples a batch as the budget takes, in order. Position: as `PaddedBatch`."""

    def __init__(self, maker: BatchMaker):
        super().__init__(maker.source)
        self._maker = maker

    def iterate(self, position: Position, context: Context) -> Entries:
        entries: list[_Entry] = []
        longest = 0
        for entry in self.source.iterate(position, context):
            length = self._maker.length(entry, context)
            if entries and not self._maker.fits(len(entries) + 1, max(longest, length)):
                yield self._maker.make(entries, context), entries[-1][1]
                entries, longest = [], 0
            entries.append(entry)
            longest = max(longest, length)
        if entries:
            yield self._maker.make(entries, context), entries[-1][1]

    def origin(self, position: Position, context: Context) -> Origin | None:
        return None  # a batch has many

    def settings(self) -> dict[str, Any]:
        return {"kind": "token_batch", **self._maker.settings()}


class Bucket(Pooled):
    """Batches of examples of like length, out of pools; the batches of a pool leave in random order."""

    def __init__(self, maker: BatchMaker, batch_size: int | None, pool_size: int):
        super().__init__(maker.source, pool_size)
        self._maker = maker
        self._batch_size = batch_size

    def size(self) -> int | None:
        size = self.source.size()
        if size is None or self._batch_size is None:
            return None
        pools, rest = divmod(size, self.pool_size)
        return pools * -(-self.pool_size // self._batch_size) + -(-rest // self._batch_size)

    def plan(self, pool: list[tuple[Any, Position]], number: int, context: Context) -> list[list[int]]:
        rng = context.rng(BUCKET, number)
        lengths = np.array([self._maker.length(entry, context) for entry in pool])
        # Examples of one length in random order, or the same ones would meet every epoch.
        order = np.lexsort((rng.random(len(pool)), lengths)).tolist()
        groups: list[list[int]] = [[]]
        for index, length in zip(order, np.sort(lengths).tolist(), strict=True):
            group = groups[-1]
            if len(group) == self._batch_size or not self._maker.fits(len(group) + 1, length):
                group = []
                groups.append(group)
            group.append(index)
        return [groups[i] for i in rng.permutation(len(groups)).tolist()]

    def make(self, pool: list[tuple[Any, Position]], group: list[int], context: Context) -> Any:
        return self._maker.make([pool[index] for index in group], context)

    def origin(self, position: Position, context: Context) -> Origin | None:
        return None  # a batch has many

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "bucket",
            "batch_size": self._batch_size,
            "pool_size": self.pool_size,
            **self._maker.settings(),
        }
