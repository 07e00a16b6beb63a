"""`Dataset`: lazy, re-iterable pipelines whose position a checkpoint can keep."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from propeller.data.batching import BatchMaker, Bucket, Collate, PaddedBatch, TokenBatch
from propeller.data.chunks import Batches, MapChunks
from propeller.data.node import Context, Entries, Node, Position
from propeller.data.prefetch import Buffered
from propeller.data.record import RecordFile
from propeller.data.signature import Signature, as_json
from propeller.data.sources import (
    FileSource,
    GeneratorSource,
    ListSource,
    PathLike,
    RecordSource,
    source_of,
)
from propeller.data.transforms import Filter, Interleave, Map, PoolShuffle, Repeat, Shard, Shuffle, Take
from propeller.errors import ConfigError, DataError

_UNSEEDED = Context(seed=0)
_POOL_BATCHES = 64
_POOL_EXAMPLES = 8192


class Dataset:
    """A pipeline: a source, and what is done to its items on their way. Make one with a `from_` method.

    An example is a dict of name to value (arrays, numbers, strings). A dataset holds no state: each iteration
    starts anew, several may run at once, and every transform returns a new dataset. `for item in dataset`
    gives the items alone; `iterate` gives each with its position, which `iterate` takes to go on after it.

    `len` works where the number of items is known without iterating, `dataset[i]` where an item can be had by
    its index alone: over a list or a record file, possibly mapped, shuffled, sharded or cut by `take`. It is
    the item that iterating gives there.

    A user's function that raises ends the iteration with a `DataError` that has the file and line (or record)
    of the item in front, and the function's own error as its cause. Functions must not change what they get.
    """

    def __init__(self, node: Node):
        self._node = node

    @staticmethod
    def of(data: Any) -> Dataset:
        """Takes data as they are.

        Args:
            data: a `Dataset`; anything with a length and an index (a list, an array, a `paddle.io.Dataset`, a
                `datasets.Dataset` of Hugging Face); a data frame of pandas, whose rows become dicts; anything
                that can be iterated; or a function that returns such a thing, called for each pass. An
                iterator or a generator can be gone through once.

        Raises:
            ConfigError: it is none of these, or a dict or text.
        """
        return Dataset(data._node if isinstance(data, Dataset) else source_of(data))

    @classmethod
    def from_list(cls, items: Sequence[Any]) -> Dataset:
        """Reads a list, or anything with a length and an index."""
        return cls(ListSource(items))

    @classmethod
    def from_file(
        cls, paths: PathLike | Sequence[PathLike], *, skip_header: int = 0, gz: bool | None = None
    ) -> Dataset:
        r"""Reads the lines of UTF-8 text files, one file after the other, as str without the line's end.

        Only `\n` ends a line; one `\r` just before it belongs to the end, as Windows writes it. A byte order
        mark at the start of a file is dropped. A resume jumps to its line; of a gzipped file, it reads
        all that is before.

        Args:
            paths: a file or several.
            skip_header: how many lines to leave out at the start of each file.
            gz: whether they are gzipped; None: told by the name (`.gz`) or the first bytes of each.

        Raises:
            ConfigError: no file is given.
            DataError: when iterated: a file cannot be read, is not UTF-8, or there is no line in all of them.
        """
        files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
        if not files:
            raise ConfigError("from_file() got an empty list of files; expected at least one")
        return cls(FileSource(files, skip_header, gz))

    @classmethod
    def from_record_file(cls, path: PathLike) -> Dataset:
        """Reads a file of records, as `RecordWriter` writes it, with random access.

        Raises:
            DataError: the file is missing, no record file, or damaged (found when a record is first read).
        """
        return cls(RecordSource(RecordFile(path)))

    @classmethod
    def from_generator_func(cls, func: Callable[[], Iterable[Any]]) -> Dataset:
        """Reads the iterator that `func()` returns, a fresh one each pass; a resume replays and skips."""
        return cls(GeneratorSource(func))

    def iterate(self, position: Position = None, *, seed: int = 0) -> Entries:
        """Yields (item, position after the item). To stop early, drop or `close()` what is returned.

        Args:
            position: where to start: None for the beginning, or a position this pipeline gave, possibly after
                a trip through JSON.
            seed: what randomness starts from. The same seed and position give the same items.

        Raises:
            ConfigError: the seed is negative.
            DataError: the data cannot be read, or the position is not of this pipeline.
        """
        _at_least(0, seed=seed)
        return self._node.iterate(position, Context(seed))

    def __iter__(self) -> Iterator[Any]:
        return (item for item, _ in self.iterate())

    def __len__(self) -> int:
        size = self._node.size()
        if size is None:
            raise TypeError("the length of this dataset is not known without iterating it")
        return size

    def __getitem__(self, index: int) -> Any:
        if not self._node.indexed:
            raise TypeError(
                "this dataset has no random access; over a list or a record file it has, also mapped, "
                "shuffled, sharded or cut by take()"
            )
        size, index = len(self), operator.index(index)
        if not -size <= index < size:
            raise IndexError(f"item {index} of {size}")
        return self._node.at(index % size, _UNSEEDED)

    def epoch(self, position: Position) -> int:
        """Returns the epoch, from 0, to which the item that came with `position` belongs.

        After a pool (`bucket`, `shuffle` with a buffer) that is the epoch in which the pool began.
        """
        return self._node.epoch(position)

    def signature(self) -> Signature:
        """Returns what the items and their order follow from, the seed aside.

        A position means something to a dataset of the same signature. JSON can hold it, and gives it back
        equal; `difference` says in what two differ. It has an entry for each step but `buffered`: settings,
        names of functions (not what they do), and of the source:

        - record file: the number of records and a digest of the sums that it has of them; nothing is read.
        - text files: sizes and sha256. Reads them once, about 1.4 GB/s; gzipped ones as they lie there.
        - list: the number of items and a digest of them, of 10,000 evenly spaced ones if it is longer; the
          number alone where items are other than numbers, text, arrays, lists and dicts of these.
        - generator: the function's name alone.

        Raises:
            DataError: a text file cannot be read.
        """
        return as_json(self._node.signature())

    def map(self, func: Callable[[Any], Any], *, batched: bool = False, batch_size: int = 1000) -> Dataset:
        """Gives `func(item)` for each item, or with `batched` what `func` makes of many.

        Args:
            func: a function of an item; with `batched` of a list of items, which returns a list of any
                number. Tokenizers are faster so, and an example may become several, or none.
            batched: see `func`. There is no random access to the result.
            batch_size: items that `func` gets at a time with `batched`; the last ones may be fewer.

        Raises:
            ConfigError: `batch_size` is less than 1.
        """
        if not batched:
            return Dataset(Map(self._node, func))
        _at_least(1, batch_size=batch_size)
        return Dataset(MapChunks(self._node, func, batch_size))

    def apply(self, step: Callable[[Node], Node]) -> Dataset:
        """Adds a step of your own: `step` makes a node, such as a `Transform`, over the one it gets."""
        return Dataset(step(self._node))

    def filter(self, func: Callable[[Any], Any]) -> Dataset:
        """Keeps the items for which `func(item)` is true."""
        return Dataset(Filter(self._node, func))

    def shuffle(self, buffer_size: int | None = None, seed: int | None = None) -> Dataset:
        """Permutes the items, differently each epoch.

        Args:
            buffer_size: None: a permutation of them all, by index; the source must have random access. Else
                so many items are read, permuted and handed out, before the next so many are read.
            seed: combined with that of the iteration, for shuffles that must differ.

        Raises:
            ConfigError: no `buffer_size` over a stream, or a number out of range.
        """
        _at_least(0, seed=seed)
        if buffer_size is None:
            return Dataset(Shuffle(self._node, seed or 0))
        _at_least(1, buffer_size=buffer_size)
        return Dataset(PoolShuffle(self._node, buffer_size, seed or 0))

    def repeat(self, n: int | None = None) -> Dataset:
        """Gives the items `n` times over, or without end; each pass is an epoch.

        Raises:
            ConfigError: `n` is less than 1.
            DataError: when iterated: a whole pass gave no item.
        """
        _at_least(1, n=n)
        return Dataset(Repeat(self._node, n))

    def shard(self, num_shards: int, index: int) -> Dataset:
        """Keeps every `num_shards`-th item from item `index` on.

        Raises:
            ConfigError: not 0 <= index < num_shards.
        """
        if not 0 <= index < num_shards:
            raise ConfigError(
                f"shard() got index {index} of {num_shards} shards; expected 0 <= index < num_shards"
            )
        return Dataset(Shard(self._node, num_shards, index))

    def interleave(
        self, func: Callable[[Any], Dataset] | None = None, *, cycle_length: int, block_length: int = 1
    ) -> Dataset:
        """Gives items of several datasets in turn, one dataset made of each item.

        Args:
            func: makes a dataset of an item, a file name for example; None: the items are datasets.
            cycle_length: how many datasets are open at a time; one that ends makes place for the next.
            block_length: how many items one gives before it is the next one's turn.

        Raises:
            ConfigError: a number is less than 1.
            DataError: when iterated: `func` failed, or gave no dataset.
        """
        _at_least(1, cycle_length=cycle_length, block_length=block_length)

        datasets = self._node if func is None else Map(self._node, func)
        return Dataset(Interleave(datasets, _node_of, cycle_length, block_length))

    def take(self, n: int) -> Dataset:
        """Keeps the first `n` items.

        Raises:
            ConfigError: `n` is negative.
        """
        _at_least(0, n=n)
        return Dataset(Take(self._node, n))

    def buffered(self, n: int) -> Dataset:
        """Reads up to `n` items ahead in a thread of its own, which ends with the iteration.

        What goes wrong there is raised here, with its own traceback, after the items read before it.

        Raises:
            ConfigError: `n` is less than 1.
        """
        _at_least(1, n=n)
        return Dataset(Buffered(self._node, n))

    def batch(
        self, batch_size: int, collate: Callable[[list[Any]], Any], drop_remainder: bool = False
    ) -> Dataset:
        """Makes batches of `batch_size` items, in order, by a function of your own.

        Args:
            batch_size: items a batch.
            collate: makes a batch of a list of items; see `propeller.data.collate` for parts of one. A
                `Learner` takes dicts of name to array, which `Dict(...).as_dict` gives.
            drop_remainder: leaves out a last batch that is not full.

        Raises:
            ConfigError: `batch_size` is less than 1.
        """
        _at_least(1, batch_size=batch_size)
        return Dataset(Batches(self._node, collate, batch_size, drop_remainder))

    def padded_batch(
        self,
        batch_size: int,
        pad_values: Mapping[str, float] | None = None,
        drop_remainder: bool = False,
        *,
        pad_to_multiple: int = 1,
    ) -> Dataset:
        """Makes batches of `batch_size` examples, in order; see `pad_batch` for what a batch is.

        Args:
            batch_size: examples a batch.
            pad_values: name to what its arrays are padded with; 0 for those not named.
            drop_remainder: leaves out a last batch that is not full.
            pad_to_multiple: pads the first axis of arrays on to a multiple of this.

        Raises:
            ConfigError: a number is less than 1.
            DataError: when iterated: the examples of a batch differ in names, dtypes or numbers of axes.
        """
        _at_least(1, batch_size=batch_size, pad_to_multiple=pad_to_multiple)
        maker = BatchMaker(self._node, Collate(dict(pad_values or {}), pad_to_multiple))
        return Dataset(PaddedBatch(maker, batch_size, drop_remainder))

    def token_batch(
        self,
        max_tokens: int,
        pad_values: Mapping[str, float] | None = None,
        *,
        pad_to_multiple: int = 1,
        key: str | None = None,
    ) -> Dataset:
        """Makes batches, in order, of as many examples as keep examples x longest <= `max_tokens`.

        Args:
            max_tokens: the budget; padding counts.
            pad_values: see `padded_batch`.
            pad_to_multiple: see `padded_batch`.
            key: the array whose length is an example's; None: its longest array.

        Raises:
            ConfigError: a number is less than 1.
            DataError: when iterated: as `padded_batch`, or an example alone exceeds the budget.
        """
        _at_least(1, max_tokens=max_tokens, pad_to_multiple=pad_to_multiple)
        collate = Collate(dict(pad_values or {}), pad_to_multiple)
        return Dataset(TokenBatch(BatchMaker(self._node, collate, key, max_tokens)))

    def bucket(
        self,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        pool_size: int | None = None,
        pad_values: Mapping[str, float] | None = None,
        pad_to_multiple: int = 1,
        key: str | None = None,
    ) -> Dataset:
        """Makes batches of examples of like length, so that little is padding; each example once.

        Reads a pool of examples, sorts it by length (those of one length in random order), cuts it into
        batches, and gives these in random order. Shuffle before it, so that each epoch's pools differ, and
        repeat after it: `shuffle().bucket(...).repeat()` keeps each epoch whole. After `repeat()` a pool
        would take in the end of one epoch and the beginning of the next, and over a dataset smaller than
        `pool_size` several, so that an example can stand in a batch twice.

        Args:
            batch_size: examples a batch; this or `max_tokens`.
            max_tokens: a budget of examples x longest, as in `token_batch`.
            pool_size: examples a pool: more is less padding, and fewer different partners for an example.
                None: 64 batches, or 8192 examples with `max_tokens`.
            pad_values: see `padded_batch`.
            pad_to_multiple: see `padded_batch`.
            key: see `token_batch`.

        Raises:
            ConfigError: neither or both of `batch_size` and `max_tokens`, or a number less than 1.
            DataError: when iterated: as `token_batch`.
        """
        if (batch_size is None) == (max_tokens is None):
            raise ConfigError(
                f"bucket() got batch_size={batch_size} and max_tokens={max_tokens}; expected one of the two"
            )
        _at_least(1, batch_size=batch_size, max_tokens=max_tokens)
        _at_least(1, pool_size=pool_size, pad_to_multiple=pad_to_multiple)
        collate = Collate(dict(pad_values or {}), pad_to_multiple)
        if pool_size is None:
            pool_size = _POOL_EXAMPLES if batch_size is None else _POOL_BATCHES * batch_size
        return Dataset(Bucket(BatchMaker(self._node, collate, key, max_tokens), batch_size, pool_size))


def _node_of(item: Any) -> Node:
    if not isinstance(item, Dataset):
        raise DataError(f"interleave() got {type(item).__name__}; expected a Dataset")
    return item._node


def _at_least(least: int, **values: int | None) -> None:
    """Checks numbers that a user gave; None stands for one not given."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")
