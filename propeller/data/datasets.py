"""`MapDataset` and `IterDataset`: a `Dataset` with the behaviour that PaddleNLP users know.

They are faces of `propeller.data.Dataset`, with one difference: `map`, `filter` and `shard` change the
dataset itself, and return it. All else that a `Dataset` has (`shuffle`, `batch`, `repeat`, ...) leaves it as
it is and returns a plain `Dataset`, which goes into a `Learner` and keeps its position in checkpoints.

Source: the documentation of `paddlenlp.datasets.MapDataset` and `IterDataset`, 2.x. Different here: `filter`
sees what a `map` before it has made (there it sees the raw data, unless the map was not lazy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.cores import rank_from_environment
from propeller.data.chunks import checked_results
from propeller.data.dataset import Dataset
from propeller.data.node import (
    Context,
    Entries,
    Node,
    Origin,
    Position,
    Transform,
    as_index,
    fail,
    iterate_by_index,
)
from propeller.data.signature import function_name
from propeller.data.sources import ListSource
from propeller.data.transforms import Filter
from propeller.errors import ConfigError


class MapDataset(Dataset):
    """Examples with random access, and a length; a `paddle.io.DataLoader` takes it.

    Args:
        data: what `Dataset.of` takes, if it has a length and an index.
        label_list: the names of the classes, in the order of their ids.

    Attributes:
        label_list: see above.

    Raises:
        ConfigError: the data have no length, or no index.
    """

    def __init__(self, data: Any, *, label_list: Sequence[str] | None = None):
        super().__init__(Dataset.of(data)._node)
        if not self._node.indexed:
            raise ConfigError(
                f"MapDataset() got {type(data).__name__}, which has no length or no index. Take IterDataset "
                "for a stream, or list(...) of it if it fits into memory."
            )
        self.label_list = None if label_list is None else list(label_list)

    @property
    def data(self) -> list[Any]:
        """All examples."""
        return list(self)

    def map(
        self,
        fn: Callable[[Any], Any],
        lazy: bool = True,
        batched: bool = False,
        num_workers: int = 0,
        *,
        batch_size: int | None = None,
    ) -> MapDataset:
        """Applies a function to the examples, in place.

        Args:
            fn: a function of an example; with `batched` of a list of examples, which returns a list of any
                number of them.
            lazy: applies it whenever an example is asked for, as a random function needs it; else once, now.
            batched: see `fn`; applied now.
            num_workers: taken so that older calls run. The work is done in this process, as the tokenizers
                use threads of their own where they are given a list.
            batch_size: examples that `fn` gets at a time with `batched`; None: all of them.

        Returns:
            This dataset.

        Raises:
            ConfigError: `batch_size` is less than 1.
            DataError: `fn` failed, now or when an example is asked for, or returned no list.
        """
        if not batched:
            mapped = Dataset(self._node).map(fn)
            self._node = mapped._node if lazy else ListSource(list(mapped))
        elif batch_size is not None:
            self._node = ListSource(list(Dataset(self._node).map(fn, batched=True, batch_size=batch_size)))
        else:
            self._node = ListSource(self._mapped_at_once(fn))
        return self

    def filter(self, fn: Callable[[Any], Any], num_workers: int = 0) -> MapDataset:
        """Keeps the examples for which `fn(example)` is true, in place; asks for all of them now.

        Args:
            fn: a function of an example.
            num_workers: as for `map`.

        Returns:
            This dataset.

        Raises:
            DataError: `fn` failed.
        """
        entries = Filter(self._node, fn).iterate(None, Context(seed=0))
        kept = np.array([position - 1 for _, position in entries], np.int64)
        self._node = _Select(self._node, kept, {"kind": "filter", "function": function_name(fn)})
        return self

    def shard(
        self, num_shards: int | None = None, index: int | None = None, contiguous: bool = False
    ) -> MapDataset:
        """Keeps one of several parts, in place.

        Args:
            num_shards: how many parts there are; None: the number of ranks.
            index: which one this is; None: the rank of this process.
            contiguous: whether a part is a run of examples, of which the first parts have one more if it does
                not come out even. Else it is every `num_shards`-th example from `index` on.

        Returns:
            This dataset.

        Raises:
            ConfigError: not 0 <= index < num_shards.
        """
        index, num_shards = _shard_of(index, num_shards)
        sharded = Dataset(self._node).shard(num_shards, index)._node
        if contiguous:
            share, rest = divmod(len(self), num_shards)
            start = index * share + min(index, rest)
            stop = start + share + (index < rest)
            own = {"kind": "shard", "num_shards": num_shards, "index": index, "contiguous": True}
            self._node = _Select(self._node, range(start, stop), own)
        else:
            self._node = sharded
        return self

    def _mapped_at_once(self, fn: Callable[[Any], Any]) -> Sequence[Any]:
        examples = list(self)
        try:
            return checked_results(fn, fn(examples))
        except Exception as error:
            fail(fn, error, None)


class IterDataset(Dataset):
    """Examples one after the other, from data that need not fit into memory.

    A `paddle.io.DataLoader` takes streams of its own class alone: give it a `paddle.io.IterableDataset` whose
    `__iter__` returns `iter(dataset)`, or take `batch` and the `Learner` in its place.

    Args:
        data: what `Dataset.of` takes. Of an iterator or a generator there is one pass.
        label_list: the names of the classes, in the order of their ids.

    Attributes:
        label_list: see above.

    Raises:
        ConfigError: the data cannot be iterated.
    """

    def __init__(self, data: Any, *, label_list: Sequence[str] | None = None):
        super().__init__(Dataset.of(data)._node)
        self.label_list = None if label_list is None else list(label_list)

    def map(self, fn: Callable[[Any], Any], *, batched: bool = False, batch_size: int = 1000) -> IterDataset:
        """Applies a function to the examples as they come, in place; see `Dataset.map`.

        Returns:
            This dataset.

        Raises:
            ConfigError: `batch_size` is less than 1.
        """
        self._node = Dataset(self._node).map(fn, batched=batched, batch_size=batch_size)._node
        return self

    def filter(self, fn: Callable[[Any], Any]) -> IterDataset:
        """Keeps the examples for which `fn(example)` is true, in place.

        Returns:
            This dataset.
        """
        self._node = Dataset(self._node).filter(fn)._node
        return self

    def shard(self, num_shards: int | None = None, index: int | None = None) -> IterDataset:
        """Keeps every `num_shards`-th example from example `index` on, in place.

        Args:
            num_shards: how many parts there are; None: the number of ranks.
            index: which one this is; None: the rank of this process.

        Returns:
            This dataset.

        Raises:
            ConfigError: not 0 <= index < num_shards.
        """
        index, num_shards = _shard_of(index, num_shards)
        self._node = Dataset(self._node).shard(num_shards, index)._node
        return self


def _shard_of(index: int | None, num_shards: int | None) -> tuple[int, int]:
    if index is not None and num_shards is not None:
        return index, num_shards
    rank, ranks = rank_from_environment()
    return rank if index is None else index, ranks if num_shards is None else num_shards


class _Select(Transform):
    """Some items of an indexed source. Position: the index of the next item."""

    def __init__(self, source: Node, indices: range | npt.NDArray[np.int64], settings: dict[str, Any]):
        super().__init__(source)
        self._indices = indices
        self._settings = {**settings, "items": len(indices)}

    @property
    def indexed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._indices)

    def at(self, index: int, context: Context) -> Any:
        return self.source.at(int(self._indices[index]), context)

    def iterate(self, position: Position, context: Context) -> Entries:
        return iterate_by_index(self, position, context)

    def origin(self, position: Position, context: Context) -> Origin | None:
        return self.source.origin(int(self._indices[as_index(position) - 1]) + 1, context)

    def settings(self) -> dict[str, Any]:
        return self._settings
