"""The protocol behind `Dataset`: what every node of a pipeline can do.

A node is lazy, and several iterations may run at once, also in several threads: what a node keeps of one (the
last permutation, that something was logged, that an iterator is used up) changes no item of another.
`iterate(position, context)` starts a new one, and hands out each item together with the position that says
where to go on after it. Every random choice is a pure function of the context, so that the same seed and
position give the same items, in any process.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np

from propeller.data.signature import Signature
from propeller.errors import DataError

# None (from the start), an int, or a tuple of positions; a list after a trip through JSON.
Position: TypeAlias = Any

# Items, each with the position after it. A generator, so that whoever stops early can close it.
Entries: TypeAlias = Generator[tuple[Any, Position], None, None]


class Origin(NamedTuple):
    """Where an item comes from: a file (or `<list>`) and the 1-based line or record in it."""

    path: str
    line: int


@dataclass(frozen=True)
class Context:
    """What randomness may depend on.

    Attributes:
        seed: the user's seed, >= 0.
        epoch: which pass over the data this is, from 0; `repeat` counts it up.
        branch: which dataset of an `interleave` this is, so that equal datasets shuffle differently.
    """

    seed: int
    epoch: int = 0
    branch: tuple[int, ...] = ()

    def rng(self, *salt: int) -> np.random.Generator:
        """Returns a generator that depends on this context and `salt` only."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, *self.branch, *salt))
        return np.random.default_rng(sequence)


class Node(abc.ABC):
    """One step of a pipeline: a source or a transform."""

    @abc.abstractmethod
    def iterate(self, position: Position, context: Context) -> Entries:
        """Yields items, each with the position after it, from `position` on (None: from the start)."""

    @abc.abstractmethod
    def signature(self) -> Signature:
        """Returns what the items and their order follow from; see `propeller.data.signature`.

        Nothing that is random belongs to it but the settings of what draws: the context has the seed.
        """

    @property
    def indexed(self) -> bool:
        """Whether `at` works: the size is known and each item can be had by its index alone.

        The position after item `i` of an indexed node is `i + 1`.
        """
        return False

    def size(self) -> int | None:
        """Returns the number of items of one iteration, or None where only iterating would tell."""
        return None

    def at(self, index: int, context: Context) -> Any:
        """Returns item `index` (0 <= index < size) of an indexed node."""
        raise TypeError(f"{type(self).__name__} has no random access")

    def origin(self, position: Position, context: Context) -> Origin | None:
        """Returns where the item that came with `position` was read from, if that is known.

        Asked only when something failed, so it may be slow.
        """
        return None

    def epoch(self, position: Position) -> int:
        """Returns the epoch to which the item that came with `position` belongs."""
        return 0


class Transform(Node):
    """A node over one other; if not overridden, its positions are those of its source."""

    def __init__(self, source: Node):
        self.source = source

    @abc.abstractmethod
    def settings(self) -> dict[str, Any] | None:
        """Returns its own entry in the signature, None if the items and their order do not depend on it."""

    def signature(self) -> Signature:
        own = self.settings()
        return self.source.signature() if own is None else [*self.source.signature(), own]

    def origin(self, position: Position, context: Context) -> Origin | None:
        return self.source.origin(position, context)

    def epoch(self, position: Position) -> int:
        return 0 if self.indexed else self.source.epoch(position)


def iterate_by_index(node: Node, position: Position, context: Context) -> Entries:
    """Iterates an indexed node; the position is the index of the next item."""
    size = node.size() or 0
    for index in range(as_index(position, size), size):
        yield node.at(index, context), index + 1


def as_index(position: Position, size: int | None = None) -> int:
    """Returns a position that is an index.

    Raises:
        DataError: it is none, or lies beyond `size`.
    """
    if position is None:
        return 0
    if not isinstance(position, int) or position < 0:
        raise _unfit(position, "an index")
    if size is not None and position > size:
        raise DataError(
            f"the position {position} lies beyond the {size} examples there are: the data changed since the "
            "position was made. Start from the beginning, or bring the old data back."
        )
    return position


def as_parts(position: Position, count: int) -> Sequence[Any]:
    """Returns a position that has `count` parts.

    Raises:
        DataError: it has not.
    """
    if not isinstance(position, (list, tuple)) or len(position) != count:
        raise _unfit(position, f"{count} parts")
    return position


def _unfit(position: Position, expected: str) -> DataError:
    return DataError(
        f"the position {position!r} does not fit this dataset (expected {expected} at this step): it was "
        "made by another pipeline. Resume with the pipeline that made it, or start from the beginning."
    )


def fail(
    func: Callable[..., Any], error: Exception, origin: Origin | None, last: Origin | None = None
) -> NoReturn:
    """Raises what a user's function raised as a `DataError` that names its origin.

    Args:
        func: the function.
        error: what it raised.
        origin: of the item, or of the first of several.
        last: where the last of several is from, of which any may be at fault.

    Raises:
        DataError: always; `error` itself if that already names a file.
    """
    if isinstance(error, DataError):
        if error.path is not None:
            raise error
        message = str(error)
    else:
        message = f"{name_of(func)} raised {type(error).__name__}: {error}"
    if origin is None:
        raise DataError(message) from error
    if last is not None and last != origin:
        message += f" (here, or further on up to {last.path}:{last.line})"
    raise DataError(message, path=origin.path, line=origin.line) from error


def name_of(func: Callable[..., Any]) -> str:
    """Returns a name by which a user knows his function."""
    return str(getattr(func, "__qualname__", type(func).__qualname__))
