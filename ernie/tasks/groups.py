"""Rows that belong together: the candidates of a query, or a query and its passages. No Paddle.

Rows lie one after another in a prepared data set; a row with `candidate` 0 begins a group. A model is
trained on whole groups, `[group, rows, seq_len]`, so that several ranks share out groups and no rows of one.
It is evaluated, exported and served on rows, `[rows, seq_len]`. Metrics find the rows of a query in whatever
batches they come; only the loss of an evaluation needs them together.
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
from propeller.errors import ConfigError, DataError
from propeller.types import HParams

log = logging.getLogger("ernie")

PADDING = -1
"""The label of a row that only fills up a group."""

MAX_ROWS = 512
"""Rows of a batch that is evaluated, at most."""


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

        A group of more than `size` rows becomes several: each has some of the rows with the lowest label, and
        some of those above it, in half of its places at most if there are others enough, of as many grades
        as there are. So each has two labels at least if the group has. In an epoch every row comes up at
        least once.

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

    def evaluation(self, batch_size: int, *, pad_values: Mapping[str, float], lead: int = 0) -> Dataset:
        """Batches of all rows, with `group`, int64 `[rows]`; no group is split between two of them.

        A group of more than `MAX_ROWS` rows is: its loss is then that of parts, over which its labels are
        spread evenly. Metrics are not changed by that.

        Args:
            batch_size: groups of a batch, at most; fewer if they come to more than `MAX_ROWS` rows.
            pad_values: see `pad_batch`.
            lead: see `training`.
        """
        batches: list[list[tuple[int, tuple[int, ...]]]] = []
        left = 0  # rows that the last batch has room for
        # Those of like length next to each other, so that little is padding.
        for number in sorted(range(len(self)), key=lambda number: self._found[number].longest):
            for rows in _parts(self._found[number], lead):
                if not batches or len(batches[-1]) == batch_size or len(rows) > left:
                    batches.append([])
                    left = MAX_ROWS
                batches[-1].append((number, rows))
                left -= len(rows)
        load = functools.partial(_rows_of, self._rows, dict(pad_values))
        return Dataset.from_list(batches).map(load).buffered(16)


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
    led, rest = found.rows[:lead], _by_label(found, lead)
    if size is None or len(rest) <= size:
        yield tuple(found.rows)
        return
    lowest = rest[-1][1]
    others = [row for row, label in rest if label == lowest]
    better = [row for row, _ in rest[: -len(others)]]
    num_better = max(min(len(better), size // 2), size - len(others))
    shares = ((_dealt(better, num_better), num_better), (others, size - num_better))
    for piece in range(max(math.ceil(len(rows) / share) for rows, share in shares if share)):
        chosen = [
            rows[(piece * share + place) % len(rows)] for rows, share in shares for place in range(share)
        ]
        yield (*led, *sorted(chosen))


def _parts(found: _Found, lead: int) -> Iterator[tuple[int, ...]]:
    """The rows of a group, those that lead in each part; every other one in one part."""
    rest = [row for row, _ in _by_label(found, lead)]
    number = max(1, math.ceil(len(rest) / (MAX_ROWS - lead)))
    for part in range(number):
        yield (*found.rows[:lead], *sorted(rest[part::number]))


def _by_label(found: _Found, lead: int) -> list[tuple[int, int]]:
    """The rows of a group, without those that lead, and their labels; the highest first."""
    rows = list(zip(found.rows, found.labels, strict=True))[lead:]
    return sorted(rows, key=lambda item: -item[1])


def _dealt(rows: list[int], share: int) -> list[int]:
    """Rows, ordered by label, so that each `share` of them in a row have labels from all over."""
    stride = math.ceil(len(rows) / max(share, 1))
    return [row for start in range(stride) for row in rows[start::stride]]


def _example(
    rows: Dataset, columns: Sequence[str], pad_values: Mapping[str, float], item: tuple[int, Group]
) -> dict[str, Any]:
    number, group = item
    members = [rows[index] for index in group.rows]
    example = pad_batch([{name: row[name] for name in columns} for row in members], pad_values=pad_values)
    return {**example, "group": np.full(len(members), number, dtype=np.int64)}


def _rows_of(
    rows: Dataset, pad_values: Mapping[str, float], groups: Sequence[tuple[int, tuple[int, ...]]]
) -> dict[str, Any]:
    batch = pad_batch([rows[index] for _, members in groups for index in members], pad_values=pad_values)
    numbers = [number for number, members in groups for _ in members]
    return {**batch, "group": np.array(numbers, dtype=np.int64)}
