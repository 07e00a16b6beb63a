"""Files of columns: one unit a line with its tag, an empty line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from propeller.data import Context, Entries, Node, Origin, Position, Transform, as_parts, fail
from propeller.errors import ConfigError, DataError, did_you_mean

_BLANKS = " \t"
_DOCUMENT = "-DOCSTART-"
# A unit and its position in its word, as in weibo NER. The unit is as short as can be: `310` is `3` at 10.
_POSITION = re.compile(r"(.+?)([0-9]+)", re.DOTALL)


@dataclass(frozen=True)
class ConllLayout:
    """How the lines of one file are to be read.

    Attributes:
        tabs: whether tabs part the columns, and blanks may stand in them; else runs of blanks or tabs do.
        num_columns: of every line.
        unit: index of the column of the unit.
        tag: index of the column of the tag.
        positions: whether each unit has its position in its word stuck to it, a number from 0.
        separator: what joins the units to a text: nothing between characters, a space between words.
    """

    tabs: bool
    num_columns: int
    unit: int
    tag: int
    positions: bool
    separator: str

    def read_line(self, line: str) -> tuple[str, str] | None:
        """Returns unit and tag, None where a sentence ends: at an empty line, or a document's beginning.

        Raises:
            DataError: the columns are not as many as they should be, or the unit is missing.
        """
        cells = split_columns(line, tabs=self.tabs)
        if not cells:
            return None
        if len(cells) != self.num_columns:
            parted = "tabs" if self.tabs else "blanks"
            raise DataError(
                f"found {len(cells)} column{'s' * (len(cells) != 1)} parted by {parted} ({line!r:.80}); "
                f"expected {self.num_columns}. A sentence ends with an empty line."
            )
        unit = cells[self.unit]
        if not unit:
            raise DataError(f"the unit is missing ({line!r:.80}); expected a unit and its tag")
        if not self.positions:
            return unit, cells[self.tag]
        match = _POSITION.fullmatch(unit)
        if match is None:
            raise DataError(
                f"found the unit {unit!r:.80}; expected one with its position in its word, such as "
                f"{unit[0] + '0'!r}. Name the format conll for units without positions."
            )
        return match[1], cells[self.tag]


def split_columns(line: str, *, tabs: bool) -> list[str]:
    """Returns the columns of a line, none of an empty one or of one that begins a document."""
    line = line.rstrip(_BLANKS)
    if line.lstrip(_BLANKS).startswith(_DOCUMENT):
        return []
    # At blanks and tabs alone: other white space, such as U+3000, may be a unit.
    return line.split("\t") if line and tabs else re.findall(r"[^ \t]+", line)


def find_layout(
    head: Sequence[str], *, columns: Sequence[str] | None = None, positions: bool | None = None
) -> ConllLayout:
    """Recognises how a file is to be read.

    Args:
        head: its first lines.
        columns: names of the columns in order: `text_a`, `label`, and `_` for others. None: the unit is in
            the first, its tag in the last.
        positions: whether the units have their position in their word stuck to them; None: told by the units.

    Raises:
        ConfigError: `columns` has another name, or not both of these once.
        DataError: there is no unit in the head, or the first line has one column.
    """
    tabs = next(("\t" in line.rstrip(_BLANKS) for line in head if split_columns(line, tabs=False)), False)
    rows = [split_columns(line, tabs=tabs) for line in head]
    first = next(filter(None, rows), None)
    if first is None:
        raise DataError(f"there is no unit in the first {len(head)} lines; expected one a line with its tag")
    if columns is not None:
        unit, tag = _named(columns)
        num_columns = len(columns)
    elif len(first) < 2:
        raise DataError(
            f"found one column ({first[0]!r:.80}); expected a unit and its tag a line, parted by tabs or "
            "blanks"
        )
    else:
        unit, tag, num_columns = 0, len(first) - 1, len(first)
    units = [row[unit] if unit < len(row) else "" for row in rows]
    if positions is None:
        positions = _has_positions(units)
    short = sum(len(text) == 1 for text in units)
    characters = positions or 2 * short > sum(text != "" for text in units)
    return ConllLayout(tabs, num_columns, unit, tag, positions, "" if characters else " ")


def _named(columns: Sequence[str]) -> tuple[int, int]:
    """Returns the indices of unit and tag."""
    for name in columns:
        if name not in ("text_a", "label", "_"):
            raise ConfigError(
                f"The columns name {name!r}; expected text_a, label, or _ for one to skip."
                f"{did_you_mean(name, ('text_a', 'label'))}"
            )
    if columns.count("text_a") != 1 or columns.count("label") != 1:
        raise ConfigError(f"The columns are {', '.join(columns)}; expected text_a and label once each.")
    return columns.index("text_a"), columns.index("label")


def _has_positions(units: Sequence[str]) -> bool:
    """Whether all units end with a number, which is 0 at the beginning of each sentence.

    Args:
        units: of the first lines of a file, an empty one between sentences.
    """
    before = ""
    for unit in units:
        match = _POSITION.fullmatch(unit)
        if unit and (match is None or (not before and match[2] != "0")):
            return False
        before = unit
    return True


class Sentences(Transform):
    """Sentences of a file of columns: `{"units", "labels", "separator"}`.

    Position: (that of the lines after the sentence, number of its first line).

    Args:
        source: the file's lines; a `FileSource` of one file.
        layout: how to read them.
        check: raises a `DataError` if it is given a tag that may not be.
    """

    def __init__(self, source: Node, layout: ConllLayout, check: Callable[[str], None]):
        super().__init__(source)
        self._layout = layout
        self._check = check

    def settings(self) -> dict[str, Any]:
        return {"kind": "conll", **asdict(self._layout)}

    def origin(self, position: Position, context: Context) -> Origin | None:
        after, first = as_parts(position, 2)
        last = self.source.origin(after, context)
        return None if last is None else Origin(last.path, first)

    def iterate(self, position: Position, context: Context) -> Entries:
        start = None if position is None else as_parts(position, 2)[0]
        after = start
        units: list[str] = []
        tags: list[str] = []
        first = 0
        for line, after in self.source.iterate(start, context):
            try:
                pair = self._layout.read_line(line)
                if pair is not None:
                    self._check(pair[1])
            except DataError as error:
                fail(self._layout.read_line, error, self.source.origin(after, context))
            if pair is not None:
                first = first if units else as_parts(after, 3)[2]
                units.append(pair[0])
                tags.append(pair[1])
            elif units:
                yield self._raw(units, tags), (after, first)
                units, tags = [], []
        if units:
            yield self._raw(units, tags), (after, first)

    def _raw(self, units: list[str], tags: list[str]) -> dict[str, Any]:
        return {"units": units, "labels": tags, "separator": self._layout.separator}
