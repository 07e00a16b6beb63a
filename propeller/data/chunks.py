"""Functions of several items at a time: what maps a chunk to any number of items, and what makes batches."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

from propeller.data.node import Context, Entries, Node, Origin, Position, Transform, as_parts, fail, name_of
from propeller.data.signature import function_name
from propeller.errors import DataError

_Entry = tuple[Any, Position]


class MapChunks(Transform):
    """What `func` makes of each `size` items in a row: a list of any number of items.

    Position: (source position before the chunk, items handed out of it, epoch of its first item), so a resume
    maps one chunk again; after a chunk's last item the first two are (source position after it, 0).
    """

    def __init__(self, source: Node, func: Callable[[list[Any]], Sequence[Any]], size: int):
        super().__init__(source)
        self._func = func
        self._size = size

    def iterate(self, position: Position, context: Context) -> Entries:
        start, done, _ = (None, 0, 0) if position is None else as_parts(position, 3)
        stream = self.source.iterate(start, context)
        while chunk := list(islice(stream, self._size)):
            results = self._results(chunk, context)
            end, epoch = chunk[-1][1], self.source.epoch(chunk[0][1])
            for index in range(done, len(results)):
                after = (start, index + 1) if index + 1 < len(results) else (end, 0)
                yield results[index], (*after, epoch)
            start, done = end, 0

    def origin(self, position: Position, context: Context) -> Origin | None:
        return None  # an item may come of any of a chunk's

    def epoch(self, position: Position) -> int:
        return 0 if position is None else int(as_parts(position, 3)[2])

    def settings(self) -> dict[str, Any]:
        return {"kind": "map_chunks", "function": function_name(self._func), "batch_size": self._size}

    def _results(self, chunk: list[_Entry], context: Context) -> Sequence[Any]:
        try:
            return checked_results(self._func, self._func([item for item, _ in chunk]))
        except Exception as error:
            fail_together(self._func, error, chunk, self.source, context, again=self._func)


class CountedBatches(Transform):
    """A batch of each `batch_size` items in a row. Position: the source's after the last of them."""

    def __init__(self, source: Node, batch_size: int, drop_remainder: bool):
        super().__init__(source)
        self._batch_size = batch_size
        self._drop_remainder = drop_remainder

    @abc.abstractmethod
    def make(self, entries: Sequence[_Entry], context: Context) -> Any:
        """Makes one batch."""

    def size(self) -> int | None:
        size = self.source.size()
        if size is None:
            return None
        return size // self._batch_size if self._drop_remainder else -(-size // self._batch_size)

    def iterate(self, position: Position, context: Context) -> Entries:
        stream = self.source.iterate(position, context)
        while entries := list(islice(stream, self._batch_size)):
            if len(entries) < self._batch_size and self._drop_remainder:
                return
            yield self.make(entries, context), entries[-1][1]

    def origin(self, position: Position, context: Context) -> Origin | None:
        return None  # a batch has many


class Batches(CountedBatches):
    """What `func` makes of the items of each batch."""

    def __init__(self, source: Node, func: Callable[[list[Any]], Any], batch_size: int, drop_remainder: bool):
        super().__init__(source, batch_size, drop_remainder)
        self._func = func

    def make(self, entries: Sequence[_Entry], context: Context) -> Any:
        try:
            return self._func([item for item, _ in entries])
        except Exception as error:
            fail_together(self._func, error, entries, self.source, context)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "batch",
            "function": function_name(self._func),
            "batch_size": self._batch_size,
            "drop_remainder": self._drop_remainder,
        }


def fail_together(
    func: Callable[..., Any],
    error: Exception,
    entries: Sequence[_Entry],
    source: Node,
    context: Context,
    *,
    again: Callable[[list[Any]], Any] | None = None,
) -> NoReturn:
    """Raises what happened to several items at once, as a `DataError` that names the one at fault.

    Args:
        func: the user's function.
        error: what happened.
        entries: the items, each with the position after it.
        source, context: what they come from.
        again: does the same with any items, so that one that fails by itself can be found.

    Raises:
        DataError: always. Where no item fails by itself it names the first and the last.
    """
    if again is not None:
        for item, position in entries:
            try:
                again([item])
            except Exception as alone:
                fail(func, alone, source.origin(position, context))
    first, last = (source.origin(position, context) for _, position in (entries[0], entries[-1]))
    fail(func, error, first, last)


def checked_results(func: Callable[..., Any], results: Any) -> Sequence[Any]:
    """Returns what a function of many items gave, if that is many items.

    Raises:
        DataError: it is not.
    """
    if isinstance(results, (str, bytes, Mapping)) or not hasattr(results, "__len__"):
        raise DataError(
            f"{name_of(func)} returned {type(results).__name__}; expected a list of examples, as it is "
            "mapped with batched=True"
        )
    found: Sequence[Any] = results
    return found
