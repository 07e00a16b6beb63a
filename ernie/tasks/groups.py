"""Rows that belong together: the candidates of a query, or a query and its passages. No Paddle.

Rows lie one after another in a prepared data set; a row with `candidate` 0 begins a group. A model is
trained on whole groups, `[group, rows, seq_len]`, so that several ranks share out groups and no rows of one.
It is evaluated, exported and served on rows, `[rows, seq_len]`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from propeller.data import Dataset, pad_batch
from propeller.data.sources import ListSource
from propeller.errors import ConfigError, DataError
from propeller.types import HParams

log = logging.getLogger("ernie")

PADDING = -1
"""The label of a row that only fills up a group."""


class Group(NamedTuple):
    """Where the rows of a group lie.

    Attributes:
        rows: their indices.
        longest: tokens of the longest.
        checksum: of inputs and labels, by which a run that goes on knows its data.
    """

    rows: tuple[int, ...]
    longest: int
    checksum: int


@dataclasses.dataclass
class _Found:
    """A group while it is read, with the labels of its rows."""

    rows: list[int] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    longest: int = 0
    checksum: int = 0

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        ids = np.asarray(row["input_ids"])
        self.rows.append(index)
        self.labels.append(int(row["label"]))
        self.longest = max(self.longest, len(ids))
        self.checksum = zlib.crc32(ids.tobytes() + bytes(str(self.labels[-1]), "ascii"), self.checksum)


class Groups:
    """The groups of a prepared data set; reads it once.

    Args:
        name: of the set, for the log.
        rows: the set, with random access; columns `input_ids`, `label` and `candidate`.
        distinct: a column by which groups are told apart, so that no two of them may have the same in it.

    Raises:
        DataError: two groups have the same there.
    """

    def __init__(self, name: str, rows: Dataset, *, distinct: str | None = None):
        self.name = name
        self._rows = rows
        self._found: list[_Found] = []
        seen: set[Any] = set()
        for index, row in enumerate(rows):
            if row["candidate"] == 0 or not self._found:
                self._found.append(_Found())
                first = None if distinct is None else row[distinct]
                if first in seen:
                    raise DataError(
                        f"The {name} set has the {distinct} {first!r} twice, in different files; expected "
                        "the rows of a query to stand together. Put them into one file."
                    )
                if distinct is not None:
                    seen.add(first)
            self._found[-1].add(index, row)

    def __len__(self) -> int:
        return len(self._found)

    def labels(self) -> list[list[int]]:
        """The labels of each group's rows."""
        return [found.labels for found in self._found]

    def training(
        self,
        columns: Sequence[str],
        *,
        pad_values: Mapping[str, float],
        teaches: Callable[[Sequence[int]], bool],
        size: int | None = None,
        lead: int = 0,
    ) -> Dataset:
        """Examples to train on, each a group: `[rows, seq_len]` and `[rows]`, with `group`, its number.

        A group of more than `size` rows becomes several: each has some of the relevant rows (label above 0),
        in half of its places at most if there are others enough, and some of the others. In an epoch every
        row comes up at least once.

        Args:
            columns: those that the model and its loss need.
            pad_values: see `pad_batch`; rows that fill up a group must get the label `PADDING`.
            teaches: whether there is anything to learn from rows with these labels (without those that lead);
                other groups are left out.
            size: rows of an example at most, without those that lead; None keeps groups whole.
            lead: how many rows at the beginning of a group stand in every example of it.

        Raises:
            DataError: there is nothing to learn from in any group.
        """
        kept = [found for found in self._found if teaches(found.labels[lead:])]
        if len(kept) < len(self._found):
            log.info(
                "%s: %d of %d queries teach nothing, since their labels do not differ; they are left out",
                self.name,
                len(self._found) - len(kept),
                len(self._found),
            )
        if not kept:
            raise DataError(
                f"The {self.name} set has no query to learn from: each has candidates of one label alone, or "
                "no relevant one."
            )
        pieces = [
            Group(rows, found.longest, found.checksum)
            for found in kept
            for rows in _pieces(found, size, lead)
        ]
        # With its number, so that rows of different groups can be told apart.
        load = functools.partial(_example, self._rows, tuple(columns), dict(pad_values))
        return Dataset.from_list(list(enumerate(pieces))).map(load)

    def evaluation(self) -> WholeGroups:
        """The rows, in batches that hold whole groups."""
        groups = [Group(tuple(found.rows), found.longest, found.checksum) for found in self._found]
        return WholeGroups(self._rows, groups)


class WholeGroups(Dataset):
    """Groups to be evaluated, whose batches are their rows: no group is split between two batches.

    Args:
        rows: where the rows lie.
        groups: which belong together.
    """

    def __init__(self, rows: Dataset, groups: Sequence[Group]):
        # Those of like length next to each other, so that little is padding.
        self._groups = sorted(enumerate(groups), key=lambda item: (item[1].longest, item[0]))
        self._rows = rows
        super().__init__(ListSource(self._groups))

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
        """Makes batches of the rows of `batch_size` groups each, with `group`, int64 `[rows]`.

        Raises:
            ConfigError: the batches are to be measured in tokens.
        """
        if batch_size is None:
            raise ConfigError(
                "Batches of whole groups are counted in groups: set batch_size, without in_tokens."
            )
        starts = range(0, len(self._groups), batch_size)
        load = functools.partial(_rows_of, self._rows, dict(pad_values or {}), pad_to_multiple)
        return Dataset.from_list([self._groups[start : start + batch_size] for start in starts]).map(load)


def group_size(hparams: HParams) -> int | None:
    """The hyper-parameter `group_size`: candidates of a query in a training example at most.

    Raises:
        ConfigError: it is no whole number of at least 2.
    """
    size = hparams.get("group_size")
    if size is not None and (type(size) is not int or size < 2):
        raise ConfigError(f"group_size must be a whole number of at least 2, or None for all, got {size!r}.")
    return size


def refuse_token_batches(hparams: HParams) -> None:
    """Refuses `in_tokens`, where a batch is counted in queries.

    Raises:
        ConfigError: it is set.
    """
    if hparams.get("in_tokens"):
        raise ConfigError(
            "in_tokens is set, but here batch_size counts queries, each with its candidates. Leave it out; "
            "group_size bounds how many candidates a query has in a batch."
        )


def _pieces(found: _Found, size: int | None, lead: int) -> Iterator[tuple[int, ...]]:
    """The rows of each example that a group becomes."""
    led, rest = found.rows[:lead], list(zip(found.rows, found.labels, strict=True))[lead:]
    if size is None or len(rest) <= size:
        yield tuple(found.rows)
        return
    relevant = [row for row, label in rest if label > 0]
    others = [row for row, label in rest if label <= 0]
    num_relevant = max(min(len(relevant), size // 2), size - len(others))
    num_others = size - num_relevant
    shares = ((relevant, num_relevant), (others, num_others))
    for piece in range(max(math.ceil(len(rows) / share) for rows, share in shares if share)):
        chosen = [
            rows[(piece * share + place) % len(rows)] for rows, share in shares for place in range(share)
        ]
        yield (*led, *sorted(chosen))


def _example(
    rows: Dataset, columns: Sequence[str], pad_values: Mapping[str, float], item: tuple[int, Group]
) -> dict[str, Any]:
    number, group = item
    members = [rows[index] for index in group.rows]
    example = pad_batch([{name: row[name] for name in columns} for row in members], pad_values=pad_values)
    return {**example, "group": np.full(len(members), number, dtype=np.int64)}


def _rows_of(
    rows: Dataset, pad_values: Mapping[str, float], pad_to_multiple: int, items: Sequence[tuple[int, Group]]
) -> dict[str, Any]:
    members = [rows[index] for _, group in items for index in group.rows]
    numbers = [number for number, group in items for _ in group.rows]
    batch = pad_batch(members, pad_values=pad_values, pad_to_multiple=pad_to_multiple)
    return {**batch, "group": np.array(numbers, dtype=np.int64)}
