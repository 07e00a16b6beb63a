"""Where items come from: lists, text files, record files, generator functions."""

from __future__ import annotations

import gzip
import io
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from propeller.data.node import (
    Context,
    Entries,
    Node,
    Origin,
    Position,
    as_index,
    as_parts,
    iterate_by_index,
    name_of,
)
from propeller.data.record import RecordFile
from propeller.data.signature import Signature, file_entry, function_name, items_sha256
from propeller.errors import ConfigError, DataError

PathLike: TypeAlias = str | os.PathLike[str]

log = logging.getLogger("propeller")

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


class ListSource(Node):
    """Items of a sequence. Position: the index of the next item."""

    def __init__(self, items: Sequence[Any]):
        self._items = items

    @property
    def indexed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._items)

    def at(self, index: int, context: Context) -> Any:
        return self._items[index]

    def iterate(self, position: Position, context: Context) -> Entries:
        return iterate_by_index(self, position, context)

    def origin(self, position: Position, context: Context) -> Origin | None:
        return Origin("<list>", as_index(position))

    def signature(self) -> Signature:
        return [{"kind": "list", "items": len(self._items), "sha256": items_sha256(self._items)}]


class GeneratorSource(Node):
    """Items of a fresh iterator for each pass. Position: the number of items seen."""

    def __init__(self, func: Callable[[], Iterable[Any]]):
        self._func = func

    def iterate(self, position: Position, context: Context) -> Entries:
        seen = as_index(position)
        items = iter(self._func())
        if seen:
            log.info("%s is a stream: replaying %d items to get to the position", name_of(self._func), seen)
        for count, item in enumerate(islice(items, seen, None), seen + 1):
            yield item, count

    def origin(self, position: Position, context: Context) -> Origin | None:
        return Origin(f"<{name_of(self._func)}>", as_index(position))

    def signature(self) -> Signature:
        return [{"kind": "generator", "function": function_name(self._func)}]


class _Again:
    """A function that starts an iterable anew, for a `GeneratorSource`.

    Args:
        items: the iterable. An iterator can be gone through once: a second start is an error.
    """

    def __init__(self, items: Iterable[Any]):
        self._items = items
        self._is_spent = False
        self.__qualname__ = type(items).__qualname__

    def __call__(self) -> Iterator[Any]:
        iterator = iter(self._items)
        if iterator is self._items:
            if self._is_spent:
                raise DataError(
                    f"this dataset was made of a {self.__qualname__}, which can be gone through only once, "
                    "and was. Give a list, or the function that makes it, for more than one pass."
                )
            self._is_spent = True
        return iterator


class RecordSource(Node):
    """Records of a file that `RecordWriter` wrote. Position: the index of the next record."""

    def __init__(self, records: RecordFile):
        self._records = records

    @property
    def indexed(self) -> bool:
        return True

    def size(self) -> int:
        return len(self._records)

    def at(self, index: int, context: Context) -> Any:
        return self._records[index]

    def iterate(self, position: Position, context: Context) -> Entries:
        return iterate_by_index(self, position, context)

    def origin(self, position: Position, context: Context) -> Origin | None:
        index = as_index(position) - 1
        first = 0
        for path, line, count in self._records.metadata.get("origins", ()):
            if index < first + count:
                return Origin(path, line + index - first)
            first += count
        return Origin(str(self._records.path), index + 1)

    def signature(self) -> Signature:
        return [{"kind": "records", "examples": len(self._records), "sha256": self._records.sha256()}]


class FileSource(Node):
    """Lines of text files, as `Dataset.from_file` documents them.

    Position: (index of the file, byte offset in its plain text, lines before it).
    """

    def __init__(self, paths: Sequence[Path], skip_header: int, gz: bool | None):
        self._paths = paths
        self._skip_header = skip_header
        self._gz = gz

    def iterate(self, position: Position, context: Context) -> Entries:
        first, offset, number = (0, 0, 0) if position is None else as_parts(position, 3)
        empty = position is None
        for index in range(first, len(self._paths)):
            for line, after, count in self._lines(self._paths[index], offset, number):
                empty = False
                yield line, (index, after, count)
            offset = number = 0
        if empty:
            header = f" after {self._skip_header} header line(s)" if self._skip_header else ""
            others = f", and so are the {len(self._paths) - 1} after it" if len(self._paths) > 1 else ""
            raise DataError(f"is empty{header}{others}; expected at least one line", path=self._paths[0])

    def origin(self, position: Position, context: Context) -> Origin | None:
        index, _, number = as_parts(position, 3)
        return Origin(str(self._paths[index]), number)

    def signature(self) -> Signature:
        files = [file_entry(path) for path in self._paths]
        return [{"kind": "files", "skip_header": self._skip_header, "files": files}]

    def _lines(self, path: Path, offset: int, number: int) -> Iterator[tuple[str, int, int]]:
        """Yields (line, byte offset after it, lines up to and with it)."""
        try:
            with open_text_file(path, self._gz) as stream:
                if offset:
                    if isinstance(stream, gzip.GzipFile):
                        log.info("%s is compressed: replaying %d lines to get to the position", path, number)
                    stream.seek(offset)
                for raw in stream:
                    bom = offset == 0 and raw.startswith(_BOM)
                    offset += len(raw)
                    number += 1
                    if number > self._skip_header:
                        yield decode_line(raw[3:] if bom else raw, path, number), offset, number
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot be read: {error}", path=path, line=number + 1) from error


def source_of(data: Any) -> Node:
    """Returns the source that `Dataset.of` documents.

    Raises:
        ConfigError: the data are of a kind that is no source.
    """
    if isinstance(data, (str, bytes, os.PathLike)):
        raise ConfigError(f"the data are {data!r:.80}; from_file() reads a file, load_dataset() knows names")
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, list(data)[:5]))
        raise ConfigError(f"the data are a dict with {names or 'nothing'}; expected one of its values")
    if hasattr(data, "iloc") and hasattr(data, "to_dict"):  # a data frame, whose index means columns
        return ListSource(data.to_dict("records"))
    if _has_length(data):
        return ListSource(data)
    if isinstance(data, Iterable):
        return GeneratorSource(_Again(data))
    if callable(data):
        return GeneratorSource(data)
    raise ConfigError(f"the data are {data!r:.80}; expected a sequence, an iterable or a function")


def _has_length(data: Any) -> bool:
    """Whether data have an index and a length: streams may define both, only to raise."""
    if not hasattr(data, "__getitem__"):
        return False
    try:
        len(data)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def open_text_file(path: Path, gz: bool | None) -> io.BufferedReader | gzip.GzipFile:
    """Opens a plain or gzipped file for reading bytes.

    Args:
        path: the file.
        gz: whether it is gzipped; None: told by its name (`.gz`) or its first bytes.

    Raises:
        DataError: there is no such file.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", path=path) from error
    if gz is None:
        gz = path.suffix == ".gz" or raw.peek(2)[:2] == _GZIP_MAGIC
    if not gz:
        return raw
    raw.close()
    return gzip.open(path)


def decode_line(raw: bytes, path: Path, number: int) -> str:
    r"""Returns a line without its end: one `\n`, and one `\r` before it, as editors on Windows write it.

    Raises:
        DataError: it is not UTF-8.
    """
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} of the line is not UTF-8 ({raw[error.start : error.end]!r}); expected "
            "UTF-8 text. Convert the file, for example with iconv.",
            path=path,
            line=number,
        ) from error


def first_line(path: Path, gz: bool | None) -> str:
    """Returns the first line of a text file.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    line, _ = next(FileSource([path], 0, gz).iterate(None, Context(seed=0)))
    return str(line)
