"""Files of labelled sentences and pairs, as public data sets have them: tables and JSON lines.

A row becomes a raw example `{"text_a": ..., "text_b"?: ..., "label"?: ...}`: texts as they stand there, the
label as text, or as a list of texts where an example may have several.

- A table is tab-separated, with or without a header; quotes are data. Its columns are found as
  `FeatureColumns` says, by the names that a `Layout` gives them.
- JSON, one object a line or one array of objects, is known by its name (`.json`, `.jsonl`, also gzipped) or
  by a first line that is an object. Fields have the names that columns have.

Pairs whose label is `-`, on which the annotators of MNLI, XNLI and OCNLI did not agree, are left out; how
many is logged, once for each file. XNLI's `contradictory` is `contradiction`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.tasks.json_files import is_json, read_objects
from propeller.data import (
    Context,
    Dataset,
    Entries,
    FeatureColumns,
    Node,
    Position,
    RawColumn,
    Transform,
    first_line,
    source_files,
)
from propeller.errors import DataError, did_you_mean
from propeller.processor import Raw

log = logging.getLogger("ernie")

# What public data sets call these columns.
TEXT_A_NAMES = ("sentence", "sentence1", "#1 String", "text", "query", "question1", "premise")
TEXT_B_NAMES = ("sentence2", "#2 String", "title", "question2", "hypothesis", "hypo")
LABEL_NAMES = ("Quality", "score", "is_duplicate", "gold_label", "labels")

NO_GOLD_LABEL = "-"
_SAME_LABELS = {"contradictory": "contradiction"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a task are laid out.

    Attributes:
        text_a, text_b, label: names, besides these, by which a header or a JSON object calls them; of several
            that are there the first counts.
        pair: whether examples have a `text_b`; None leaves it to the file.
        cells: names of a table's cells in order, where it has no header; `_` skips one.
        separator: what separates the labels of an example that may have any number; None: it has one.
        language: keeps only the rows whose column `language`, where there is one, says this.
        skips_malformed: leaves out the rows of a table that have more or fewer cells than the first, and
            logs how many; otherwise they are errors.
    """

    text_a: tuple[str, ...] = TEXT_A_NAMES
    text_b: tuple[str, ...] = TEXT_B_NAMES
    label: tuple[str, ...] = LABEL_NAMES
    pair: bool | None = None
    cells: tuple[str, ...] | None = None
    separator: str | None = None
    language: str | None = None
    skips_malformed: bool = False

    def names(self) -> dict[str, tuple[str, ...]]:
        """The names of each field of an example that is read."""
        found = {"text_a": self.text_a, "text_b": self.text_b, "label": self.label}
        if self.pair is False:
            del found["text_b"]
        return {field: (field, *names) for field, names in found.items()}


def read_classification(path: Path, layout: Layout | None = None, *, labelled: bool = True) -> Dataset:
    """Reads the raw examples of one file.

    Args:
        path: a table or JSON, plain or gzipped.
        layout: how it is laid out; by default under any of the names that public data sets use.
        labelled: whether every row must have a label. If not, labels may be missing, and no row is left out
            for want of one.

    Raises:
        DataError: the file cannot be read, is empty, or lacks a column; when iterated: a row cannot be used.
            It names file and line.
        ConfigError: the names of the cells are none.
    """
    layout = layout or Layout()
    path = Path(path)
    if is_json(path):
        rows = _read_json(path, layout, labelled)
    else:
        rows = _read_table(path, layout, labelled)
    if (language := layout.language) is not None:
        what = f"rows in other languages than {language!r}"
        rows = _left_out(rows, path, what, lambda row: row.get("language", language) == language)
    rows = rows.map(functools.partial(_finished, layout.separator))
    if not labelled:
        return rows
    what = f"pairs without a gold label ({NO_GOLD_LABEL!r})"
    none = (NO_GOLD_LABEL, [NO_GOLD_LABEL])  # the second where there may be any number
    return _left_out(rows, path, what, lambda raw: "text_b" not in raw or raw["label"] not in none)


def read_parts(path: Path, read: Callable[[Path], Dataset]) -> Iterator[Raw]:
    """Raw examples of a file, or one after the other of all files of a folder.

    Raises:
        DataError: see `read_classification`; or some parts of a folder hold other fields than the first.
    """
    fields: list[str] | None = None
    for part in source_files(path.name, data_dir=path):
        for raw in read(part):
            if fields is None:
                fields = list(raw)
            elif fields != list(raw):
                raise DataError(
                    f"has the columns {', '.join(raw)}, the examples before it {', '.join(fields)}; expected "
                    "the same throughout",
                    path=part,
                )
            yield raw


def begins_with_example(path: Path, layout: Layout) -> bool:
    """Whether a file is a table without a header that is known as one."""
    return not is_json(path) and not _table(layout, labelled=True).layout(first_line(path, None)).has_header


def _table(layout: Layout, labelled: bool) -> FeatureColumns:
    names = layout.names()
    columns = [
        RawColumn(field, aliases=[name for name in names[field] if name != field], optional=optional)
        for field, optional in (
            ("text_a", False),
            ("text_b", layout.pair is None),
            ("label", not labelled),
        )
        if field in names
    ]
    if layout.language is not None:
        columns.append(RawColumn("language", optional=True))
    return FeatureColumns(columns, file_columns=layout.cells)


def _read_table(path: Path, layout: Layout, labelled: bool) -> Dataset:
    table = _table(layout, labelled)
    if not (layout.skips_malformed and labelled):  # of what is to be predicted every row counts
        return table.read(path)
    line = first_line(path, None)
    try:
        found = table.layout(line)
    except DataError as error:
        raise DataError(str(error), path=path, line=1) from error
    lines = Dataset.from_file(path, skip_header=int(found.has_header))
    count = len(found.cells)
    what = f"malformed rows, with other than {count} cells"
    return _left_out(lines, path, what, lambda row: row.count("\t") + 1 == count).map(found.convert)


def _read_json(path: Path, layout: Layout, labelled: bool) -> Dataset:
    names = layout.names()
    required = [
        field
        for field in names
        if field == "text_a" or (field == "text_b" and layout.pair) or (field == "label" and labelled)
    ]
    return read_objects(path).map(functools.partial(_json_row, names, required))


def _json_row(
    names: Mapping[str, Sequence[str]], required: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    row = {}
    for field, known in names.items():
        given = [name for name in known if values.get(name) is not None]
        if given:
            row[field] = values[given[0]]
        elif field in required:
            near = next(filter(None, (did_you_mean(name, known) for name in values)), "")
            raise DataError(
                f"the object has no {field!r} (or {', '.join(map(repr, known[1:]))}); it has "
                f"{', '.join(map(repr, values)) or 'nothing'}.{near}"
            )
    if "language" in values:
        row["language"] = values["language"]
    for field in ("text_a", "text_b"):
        if not isinstance(row.get(field, ""), str):
            raise DataError(f"{field!r} is {row[field]!r:.80}; expected a text")
    return row


def _finished(separator: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """A raw example, its label in its final form."""
    raw = {field: row[field] for field in ("text_a", "text_b") if field in row}
    if "label" in row:
        raw["label"] = _label(row["label"], separator)
    return raw


def _label(value: Any, separator: str | None) -> str | list[str]:
    if isinstance(value, list):
        return [label_text(item) for item in value]
    if separator is None:
        return label_text(value)
    # An empty cell is an example without any label.
    return [label_text(item) for item in str(value).split(separator)] if str(value).strip() else []


def label_text(value: Any) -> str:
    """A label as text: without blanks around it, numbers as JSON writes them.

    Raises:
        DataError: it is empty, or no text, number or truth value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise DataError(f"the label is {value!r:.80}; expected a text or a number")
    text = str(value).strip()
    if not text:
        raise DataError("the label is empty")
    return _SAME_LABELS.get(text, text)


def _left_out(dataset: Dataset, path: Path, what: str, keep: Callable[[Any], bool]) -> Dataset:
    """Leaves out the items that `keep` does not want, which `what` describes."""
    return dataset.apply(lambda source: _LeftOut(source, path, what, keep))


class _LeftOut(Transform):
    """At the end of a pass it says how many items it left out."""

    def __init__(self, source: Node, path: Path, what: str, keep: Callable[[Any], bool]):
        super().__init__(source)
        self._path = path
        self._what = what
        self._keep = keep

    def settings(self) -> dict[str, Any]:
        return {"kind": "left out", "what": self._what}

    def iterate(self, position: Position, context: Context) -> Entries:
        count = 0
        for item, after in self.source.iterate(position, context):
            if self._keep(item):
                yield item, after
            else:
                count += 1
        if position is None and count:
            _say(str(self._path), count, self._what)


@functools.lru_cache(maxsize=1024)
def _say(path: str, count: int, what: str) -> None:
    """Logs what was left out, once, since a file is read more than once."""
    log.info("%s: left out %d %s", path, count, what)
