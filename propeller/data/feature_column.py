"""`FeatureColumns`: tab-separated files, with or without a header, to examples."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propeller.data.cache import prepare_files, source_files
from propeller.data.columns import Column, LabelColumn, RawColumn, TextColumn, TextIDColumn
from propeller.data.dataset import Dataset
from propeller.data.node import Context, Entries, Node, Origin, Position, Transform, fail
from propeller.data.sources import FileSource, PathLike, first_line
from propeller.errors import ConfigError, DataError, did_you_mean

__all__ = ["Column", "FeatureColumns", "LabelColumn", "Layout", "RawColumn", "TextColumn", "TextIDColumn"]

log = logging.getLogger("propeller")

# Which column each cell of a file's line belongs to; None: to none.
_Cells = list[Column | None]

# As the scripts' users know it, and those who write one.
_REMEDY = "name the file's columns in order (--columns, or file_columns in code)."
_CSV_REMEDY = (
    " Commas part no columns. Is it a comma-separated file? Then make a tab-separated one: "
    """python -c 'import csv, sys; [print(*(" ".join(cell.split()) for cell in row), sep="\\t") """
    "for row in csv.reader(sys.stdin)]' < FILE.csv > FILE.tsv"
)


@dataclass(frozen=True)
class Layout:
    """How the lines of one file are to be read.

    Attributes:
        cells: the column of each cell of a line, None where the cell is skipped.
        order: the indices of the cells that are read, in the order of the columns.
        has_header: whether the first line is a header.
    """

    cells: tuple[Column | None, ...]
    order: tuple[int, ...]
    has_header: bool

    def convert(self, line: str) -> dict[str, Any]:
        """Returns the example that a line holds.

        Raises:
            DataError: its cells are not as many as the layout's, or one is not of its column.
        """
        texts = line.split("\t")
        if len(texts) != len(self.cells):
            raise DataError(
                f"found {_count(len(texts))} ({line!r:.80}); expected {_count(len(self.cells))}: "
                f"{_names(self.cells)}"
            )
        example = {}
        for index in self.order:
            column = self.cells[index]
            if column is not None:
                example[column.name] = column.convert(texts[index])
        return example


class FeatureColumns:
    """The columns of a task, and how to find them in tab-separated files. Quotes are data.

    How the cells of a file are told apart, by its first line:

    1. `file_columns`, if given, names the cells of every file that has as many.
    2. A first line of which a cell is the name or an alias of a column, in whatever case, is a header; it
       names the cells, those of other names are skipped, and it must hold every column that is not optional.
       It is left out also where `file_columns` decides.
    3. Otherwise the cells are the columns in their order. If there are fewer cells than columns, optional
       columns go: the cells are all that are required, and of the optional ones the first so many as there
       is place for. With `text_a, text_b (optional), label`, two cells are text_a and label; with
       `text_a, text_b (optional)`, or where `label` is optional as well, they are text_a and text_b.

    Every line must have as many cells as the first. Where there is more than one column, empty lines are left
    out; how many of them stand before other lines is logged.

    Args:
        columns: the columns, in their order.
        file_columns: names of the cells of headerless files, `_` for one to skip; see above.

    Raises:
        ConfigError: no column, two of one name or alias (in whatever case), or `file_columns` with a name
            that no column has or without one that is required.
    """

    def __init__(self, columns: Sequence[Column], *, file_columns: Sequence[str] | None = None):
        self.columns = tuple(columns)
        if not self.columns:
            raise ConfigError("FeatureColumns got no column; expected at least one")
        self._by_name: dict[str, Column] = {}
        plain: dict[str, Column] = {}
        for column in self.columns:
            for name in (column.name, *column.aliases):
                if plain.setdefault(name.casefold(), column) is not column:
                    raise ConfigError(f"two columns go by {name!r}; names and aliases must differ")
                self._by_name[name] = column
        self._file_columns = None if file_columns is None else self._named(file_columns)

    def layout(self, line: str) -> Layout:
        """Returns how a file is read whose first line is `line`.

        Raises:
            DataError: the first line fits neither way.
        """
        texts = line.split("\t")
        header = self._header(texts)
        is_header = any(header)
        if self._file_columns is not None and len(texts) == len(self._file_columns):
            return self._layout(self._file_columns, is_header)
        if is_header:
            if missing := self._missing(header):
                wanted = " and ".join(" or ".join(map(repr, (c.name, *c.aliases))) for c in missing)
                raise DataError(
                    f"the header has no column {wanted}; it has {', '.join(map(repr, texts))}. Rename one, "
                    f"or {_REMEDY}"
                )
            return self._layout(header, True)
        if self._file_columns is not None:
            raise DataError(
                f"found {_count(len(texts))}; expected {len(self._file_columns)}, as the columns given are "
                f"{_names(self._file_columns)}{_csv_hint(line)}"
            )
        return self._layout(self._by_position(line), False)

    def read(self, path: PathLike, *, gz: bool | None = None) -> Dataset:
        """Streams over the examples of one file.

        Args:
            path: a tab-separated file.
            gz: whether it is gzipped; None: told by the name (`.gz`) or the first bytes.

        Raises:
            DataError: the file cannot be read, is empty, or its first line does not fit; when iterated:
                another line is malformed. It names the file and the line.
        """
        return Dataset(self._rows(Path(path), gz))

    def build_dataset(
        self,
        name: str,
        *,
        data_dir: PathLike | None = None,
        files: PathLike | Sequence[PathLike] | None = None,
        shuffle: bool = False,
        repeat: bool = False,
        use_gz: bool | None = None,
        prepare: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
        prepare_key: str | None = None,
        cache_dir: PathLike | None = None,
        seed: int | None = None,
    ) -> Dataset:
        """Reads a file or a folder of parts through a cache of binary records, with random access.

        The cache is built at the first call, once for all processes that ask for it, and again when the
        contents of the source, a column (its name, type, vocabulary, tokenizer), `file_columns`,
        `prepare_key` or the release of this package change.

        Args:
            name: what is read, `train` for example.
            data_dir: a file; or a folder with `name`, a folder of parts or a file, `name.tsv` or
                `name.tsv.gz`; or a folder of parts itself. Parts are read sorted by name; subfolders and
                files whose names begin with `.` or `_` are left out.
            files: instead of `data_dir`, a file or several.
            shuffle: permutes the examples, differently each epoch.
            repeat: goes on without end.
            use_gz: whether the files are gzipped; None: told for each by its name (`.gz`) or first bytes.
            prepare: a function of a list of examples, such as a tokenizer, which the cache holds the results
                of. It gets up to 512 at a time.
            prepare_key: stands for what `prepare` does and its settings. Without one, what it made is not
                used again: the cache is a temporary file of this dataset.
            cache_dir: where the cache lies; None: `$XDG_CACHE_HOME/propeller` or `~/.cache/propeller`. If it
                cannot be written, a temporary folder takes its place and a warning is logged.
            seed: see `Dataset.shuffle`.

        Raises:
            ConfigError: not one of `data_dir` and `files`, or what they name is ambiguous.
            DataError: there is no such file, no row, a malformed line, or `prepare` failed; the parts of a
                folder differ in their columns.
        """
        paths = source_files(name, data_dir, files)
        if self._file_columns is None:
            self._check_headers(paths, use_gz)
        dataset = prepare_files(
            name,
            paths,
            functools.partial(self.read, gz=use_gz),
            read_key=self._signature(),
            prepare=prepare,
            prepare_key=prepare_key,
            cache_dir=cache_dir,
        )
        if shuffle:
            dataset = dataset.shuffle(seed=seed)
        return dataset.repeat() if repeat else dataset

    def _check_headers(self, paths: Sequence[Path], gz: bool | None) -> None:
        """Refuses parts of which some have a header and some do not: by position they may be swapped."""
        headers = {path: self._rows(path, gz).layout.has_header for path in paths}
        if len(set(headers.values())) > 1:
            having = next(path for path, has in headers.items() if has)
            lacking = next(path for path, has in headers.items() if not has)
            raise DataError(f"has no header, but {having.name} beside it has one", path=lacking, line=1)

    def _rows(self, path: Path, gz: bool | None) -> _Rows:
        try:
            layout = self.layout(first_line(path, gz))
        except DataError as error:
            fail(self.layout, error, Origin(str(path), 1))
        return _Rows(FileSource([path], int(layout.has_header), gz), layout)

    def _signature(self) -> str | None:
        """Returns what examples depend on besides the files, or None if that cannot be told."""
        lines = []
        for column in self.columns:
            signature = column.signature()
            if signature is None:
                return None
            lines.append(f"{column.name} {column.aliases} {column.optional} {signature}")
        lines.append(_names(self._file_columns or ()))
        return "\n".join(lines)

    def _named(self, names: Sequence[str]) -> _Cells:
        given = f"the columns given are {', '.join(names)}"
        for name in names:
            if name != "_" and name not in self._by_name:
                known = [column.name for column in self.columns]
                raise ConfigError(
                    f"{given}; for {name!r} expected one of {', '.join(known)}, or _ to skip a cell."
                    f"{did_you_mean(name, known)}"
                )
        cells = [self._by_name.get(name) for name in names]
        named = [column for column in cells if column is not None]
        for column in named:
            if named.count(column) > 1:
                raise ConfigError(f"{given}, with {column.name!r} twice; expected each once")
        if missing := self._missing(cells):
            lacking = ", ".join(repr(column.name) for column in missing)
            raise ConfigError(f"{given}, without {lacking}; expected every column that is not optional")
        return cells

    def _missing(self, cells: _Cells) -> list[Column]:
        return [column for column in self.columns if not column.optional and column not in cells]

    def _header(self, texts: Sequence[str]) -> _Cells:
        """Returns the column that each cell of a header names; one that is spelt as the name goes first."""
        cells: _Cells = [None] * len(texts)
        for column in self.columns:
            for spelt in (str, str.casefold):
                names = [spelt(text.strip()) for text in texts]
                known = map(spelt, (column.name, *column.aliases))
                if (found := next((name for name in known if name in names), None)) is not None:
                    cells[names.index(found)] = column
                    break
        return cells

    def _by_position(self, line: str) -> _Cells:
        count = line.count("\t") + 1
        required = [column for column in self.columns if not column.optional]
        if not len(required) <= count <= len(self.columns):
            names = ", ".join(c.name + (" (optional)" if c.optional else "") for c in self.columns)
            raise DataError(
                f"found {_count(count)} and no header; expected the columns {names}. Add a header line, or "
                f"{_REMEDY}{_csv_hint(line)}"
            )
        optional = [column for column in self.columns if column.optional][: count - len(required)]
        return [column for column in self.columns if column in required or column in optional]

    def _layout(self, cells: _Cells, has_header: bool) -> Layout:
        order = [cells.index(column) for column in self.columns if column in cells]
        return Layout(tuple(cells), tuple(order), has_header)


class _Rows(Transform):
    """Examples from the lines of a file. Position: that of the lines."""

    def __init__(self, source: Node, layout: Layout):
        super().__init__(source)
        self.layout = layout

    def settings(self) -> dict[str, Any]:
        cells = [None if cell is None else [cell.name, cell.signature()] for cell in self.layout.cells]
        return {"kind": "columns", "cells": cells, "order": self.layout.order}

    def iterate(self, position: Position, context: Context) -> Entries:
        convert = self.layout.convert
        skips_empty = len(self.layout.cells) > 1
        left_out = empty = 0
        for line, after in self.source.iterate(position, context):
            if not line.strip(" ") and skips_empty:
                empty += 1
                continue
            left_out, empty = left_out + empty, 0  # those at the end are not worth a word
            try:
                example = convert(line)
            except Exception as error:
                fail(convert, error, self.source.origin(after, context))
            yield example, after
        if position is None and left_out and (origin := self.source.origin(after, context)):
            _say(origin.path, left_out)


@functools.lru_cache(maxsize=1024)
def _say(path: str, count: int) -> None:
    """Logs what was left out, once, since a file is read more than once."""
    log.info("%s: left out %d empty lines", path, count)


def _names(cells: Sequence[Column | None]) -> str:
    return ", ".join(column.name if column else "_" for column in cells)


def _csv_hint(line: str) -> str:
    is_csv = "," in line and "\t" not in line and not line.startswith(("{", "["))
    return _CSV_REMEDY if is_csv else ""


def _count(count: int) -> str:
    return f"{count} tab-separated cell{'' if count == 1 else 's'}"
