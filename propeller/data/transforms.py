"""What can be done to items on their way, apart from batching and reading ahead."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.data.node import (
    Context,
    Entries,
    Node,
    Origin,
    Position,
    Transform,
    as_index,
    as_parts,
    fail,
    iterate_by_index,
)
from propeller.data.signature import function_name
from propeller.errors import ConfigError, DataError

# First part of the key under which a node draws, so that no two kinds of node share their random numbers.
SHUFFLE, POOL, BUCKET = 0, 1, 2


class Map(Transform):
    """`func` of each item."""

    def __init__(self, source: Node, func: Callable[[Any], Any]):
        super().__init__(source)
        self._func = func

    @property
    def indexed(self) -> bool:
        return self.source.indexed

    def size(self) -> int | None:
        return self.source.size()

    def at(self, index: int, context: Context) -> Any:
        item = self.source.at(index, context)
        try:
            return self._func(item)
        except Exception as error:
            fail(self._func, error, self.source.origin(index + 1, context))

    def iterate(self, position: Position, context: Context) -> Entries:
        for item, after in self.source.iterate(position, context):
            try:
                result = self._func(item)
            except Exception as error:
                fail(self._func, error, self.source.origin(after, context))
            yield result, after

    def settings(self) -> dict[str, Any]:
        return {"kind": "map", "function": function_name(self._func)}


class Filter(Transform):
    """The items for which `func` is true."""

    def __init__(self, source: Node, func: Callable[[Any], Any]):
        super().__init__(source)
        self._func = func

    def iterate(self, position: Position, context: Context) -> Entries:
        for item, after in self.source.iterate(position, context):
            try:
                keep = bool(self._func(item))
            except Exception as error:
                fail(self._func, error, self.source.origin(after, context))
            if keep:
                yield item, after

    def settings(self) -> dict[str, Any]:
        return {"kind": "filter", "function": function_name(self._func)}


class Shuffle(Transform):
    """A permutation of an indexed source, another one each epoch. Position: the index of the next item."""

    def __init__(self, source: Node, salt: int):
        if not source.indexed:
            raise ConfigError(
                "shuffle() without buffer_size needs a source with random access: a list or a record file, "
                "mapped, sharded or cut by take() at most. Put shuffle() before filter(), repeat() and "
                "batching, or give buffer_size to shuffle a stream within a buffer."
            )
        super().__init__(source)
        self._salt = salt
        self._last: tuple[Context, npt.NDArray[np.int64]] | None = None

    @property
    def indexed(self) -> bool:
        return True

    def size(self) -> int | None:
        return self.source.size()

    def at(self, index: int, context: Context) -> Any:
        return self.source.at(int(self._order(context)[index]), context)

    def iterate(self, position: Position, context: Context) -> Entries:
        order = self._order(context)
        at = self.source.at
        for start in range(as_index(position, len(order)), len(order), 1024):
            # As Python ints, which index faster; in slices, for a list of them all would be large.
            for after, index in enumerate(order[start : start + 1024].tolist(), start + 1):
                yield at(index, context), after

    def origin(self, position: Position, context: Context) -> Origin | None:
        return self.source.origin(int(self._order(context)[as_index(position) - 1]) + 1, context)

    def settings(self) -> dict[str, Any]:
        return {"kind": "shuffle", "seed": self._salt}

    def _order(self, context: Context) -> npt.NDArray[np.int64]:
        last = self._last  # read once: iterations in other threads set it
        if last is None or last[0] != context:
            order = context.rng(SHUFFLE, self._salt).permutation(self.source.size() or 0)
            self._last = last = (context, order)
        return last[1]


class Pooled(Transform):
    """Base of what reads a pool of items, plans in which groups they leave it, and hands these out.

    Position: (source position at the start of the pool, number of the pool, groups handed out of it, epoch of
    its first item), so a resume reads one pool again.
    """

    def __init__(self, source: Node, pool_size: int):
        super().__init__(source)
        self.pool_size = pool_size

    @abc.abstractmethod
    def plan(self, pool: list[tuple[Any, Position]], number: int, context: Context) -> list[list[int]]:
        """Returns the groups, as lists of indices into the pool, in the order in which they leave."""

    @abc.abstractmethod
    def make(self, pool: list[tuple[Any, Position]], group: list[int], context: Context) -> Any:
        """Returns the item that a group becomes."""

    def iterate(self, position: Position, context: Context) -> Entries:
        start, number, done, _ = (None, 0, 0, 0) if position is None else as_parts(position, 4)
        stream = self.source.iterate(start, context)
        while pool := list(islice(stream, self.pool_size)):
            groups = self.plan(pool, number, context)
            epoch = self.source.epoch(pool[0][1])
            for k in range(done, len(groups)):
                yield self.make(pool, groups[k], context), (start, number, k + 1, epoch)
            start, number, done = pool[-1][1], number + 1, 0

    def epoch(self, position: Position) -> int:
        return 0 if position is None else int(as_parts(position, 4)[3])


class PoolShuffle(Pooled):
    """Each pool of items of a stream, permuted."""

    def __init__(self, source: Node, pool_size: int, salt: int):
        super().__init__(source, pool_size)
        self._salt = salt

    def size(self) -> int | None:
        return self.source.size()

    def plan(self, pool: list[tuple[Any, Position]], number: int, context: Context) -> list[list[int]]:
        order = context.rng(POOL, self._salt, number).permutation(len(pool))
        return [[index] for index in order.tolist()]

    def make(self, pool: list[tuple[Any, Position]], group: list[int], context: Context) -> Any:
        return pool[group[0]][0]

    def origin(self, position: Position, context: Context) -> Origin | None:
        start, number, done, _ = as_parts(position, 4)
        pool = list(islice(self.source.iterate(start, context), self.pool_size))
        (index,) = self.plan(pool, number, context)[done - 1]
        return self.source.origin(pool[index][1], context)

    def settings(self) -> dict[str, Any]:
        return {"kind": "shuffle", "buffer_size": self.pool_size, "seed": self._salt}


class Repeat(Transform):
    """The source over and over, the context counting epochs. Position: (epoch, position in it)."""

    def __init__(self, source: Node, times: int | None):
        super().__init__(source)
        self._times = times

    def size(self) -> int | None:
        size = self.source.size()
        return None if size is None or self._times is None else size * self._times

    def iterate(self, position: Position, context: Context) -> Entries:
        epoch, inner = (0, None) if position is None else as_parts(position, 2)
        while self._times is None or epoch < self._times:
            empty = inner is None
            for item, after in self.source.iterate(inner, self._passed_on(epoch, context)):
                empty = False
                yield item, (epoch, after)
            if empty:
                raise DataError(
                    "repeat() got no example from a whole pass over its source, and would never end. Check "
                    "the source, and any filter() or shard() before the repeat()."
                )
            epoch, inner = epoch + 1, None

    def origin(self, position: Position, context: Context) -> Origin | None:
        epoch, inner = as_parts(position, 2)
        return self.source.origin(inner, self._passed_on(epoch, context))

    def epoch(self, position: Position) -> int:
        return 0 if position is None else int(as_parts(position, 2)[0])

    def settings(self) -> dict[str, Any]:
        return {"kind": "repeat", "n": self._times}

    def _passed_on(self, epoch: int, context: Context) -> Context:
        return replace(context, epoch=context.epoch * (self._times or 1) + epoch)


class Shard(Transform):
    """Every `num_shards`-th item. Position: an index over an indexed source, else that of the source."""

    def __init__(self, source: Node, num_shards: int, index: int):
        super().__init__(source)
        self._num_shards = num_shards
        self._index = index

    @property
    def indexed(self) -> bool:
        return self.source.indexed

    def size(self) -> int | None:
        size = self.source.size()
        return None if size is None else len(range(self._index, size, self._num_shards))

    def at(self, index: int, context: Context) -> Any:
        return self.source.at(self._index + index * self._num_shards, context)

    def iterate(self, position: Position, context: Context) -> Entries:
        if self.indexed:
            yield from iterate_by_index(self, position, context)
            return
        skip = self._index if position is None else self._num_shards - 1
        yield from islice(self.source.iterate(position, context), skip, None, self._num_shards)

    def origin(self, position: Position, context: Context) -> Origin | None:
        if self.indexed:
            position = self._index + (as_index(position) - 1) * self._num_shards + 1
        return self.source.origin(position, context)

    def settings(self) -> dict[str, Any]:
        return {"kind": "shard", "num_shards": self._num_shards, "index": self._index}


class Take(Transform):
    """The first `count` items. Position: an index over an indexed source, else (items taken, position)."""

    def __init__(self, source: Node, count: int):
        super().__init__(source)
        self._count = count

    @property
    def indexed(self) -> bool:
        return self.source.indexed

    def size(self) -> int | None:
        size = self.source.size()
        return None if size is None else min(size, self._count)

    def at(self, index: int, context: Context) -> Any:
        return self.source.at(index, context)

    def iterate(self, position: Position, context: Context) -> Entries:
        if self.indexed:
            yield from iterate_by_index(self, position, context)
            return
        taken, inner = (0, None) if position is None else as_parts(position, 2)
        stream = self.source.iterate(inner, context)
        left = max(0, self._count - taken)
        for count, (item, after) in enumerate(islice(stream, left), taken + 1):
            yield item, (count, after)

    def origin(self, position: Position, context: Context) -> Origin | None:
        return self.source.origin(position if self.indexed else as_parts(position, 2)[1], context)

    def epoch(self, position: Position) -> int:
        if self.indexed or position is None:
            return 0
        return self.source.epoch(as_parts(position, 2)[1])

    def settings(self) -> dict[str, Any]:
        return {"kind": "take", "n": self._count}


@dataclass
class _Slot:
    """One open dataset of an `Interleave`.

    Attributes:
        number: which dataset it is, from 0.
        before: position of the source before the item that it was made from.
        node: the dataset.
        inner: position in it, after what has been read.
        stream: its iteration.
    """

    number: int
    before: Position
    node: Node
    inner: Position
    stream: Entries


class Interleave(Transform):
    """Blocks of items from several datasets in turn, each made from an item of the source.

    Position: (datasets opened, source position after them, open slots, current slot, items taken from it);
    a slot is (number, source position before, position in it).
    """

    def __init__(self, source: Node, func: Callable[[Any], Node], cycle_length: int, block_length: int):
        super().__init__(source)
        self._func = func
        self._cycle_length = cycle_length
        self._block_length = block_length

    def iterate(self, position: Position, context: Context) -> Entries:
        opened, source, kept, at, taken = (0, None, (), 0, 0) if position is None else as_parts(position, 5)
        slots = [self._reopen(slot, context) for slot in kept]
        feed = self.source.iterate(source, context)
        while True:
            while len(slots) < self._cycle_length and (entry := next(feed, None)) is not None:
                slots.append(self._open(opened, source, None, entry, context))
                opened, source = opened + 1, entry[1]
            if not slots:
                return
            if taken == self._block_length:
                at, taken = at + 1, 0
            at %= len(slots)
            slot = slots[at]
            entry = next(slot.stream, None)
            if entry is None:
                del slots[at]
                taken = 0
                continue
            slot.inner, taken = entry[1], taken + 1
            state = tuple((slot.number, slot.before, slot.inner) for slot in slots)
            yield entry[0], (opened, source, state, at, taken)

    def origin(self, position: Position, context: Context) -> Origin | None:
        _, _, kept, at, _ = as_parts(position, 5)
        slot = self._reopen(kept[at], context)
        return slot.node.origin(slot.inner, replace(context, branch=(*context.branch, slot.number)))

    def epoch(self, position: Position) -> int:
        return 0 if position is None else self.source.epoch(as_parts(position, 5)[1])

    def settings(self) -> dict[str, Any]:
        # What makes datasets of the items is an entry of its own: a map.
        return {
            "kind": "interleave",
            "cycle_length": self._cycle_length,
            "block_length": self._block_length,
        }

    def _reopen(self, kept: Position, context: Context) -> _Slot:
        number, before, inner = as_parts(kept, 3)
        entry = next(self.source.iterate(before, context))
        return self._open(number, before, inner, entry, context)

    def _open(
        self, number: int, before: Position, inner: Position, entry: tuple[Any, Position], context: Context
    ) -> _Slot:
        try:
            node = self._func(entry[0])
        except Exception as error:
            fail(self._func, error, self.source.origin(entry[1], context))
        stream = node.iterate(inner, replace(context, branch=(*context.branch, number)))
        return _Slot(number, before, node, inner, stream)
