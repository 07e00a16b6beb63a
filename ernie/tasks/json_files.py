"""JSON in files: objects, one a line or in an array, and whole documents."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from propeller.data import (
    Context,
    Dataset,
    Entries,
    Node,
    Origin,
    Position,
    Signature,
    as_index,
    file_entry,
    first_line,
    open_text_file,
)
from propeller.errors import DataError

_ENDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def is_json(path: Path) -> bool:
    """Whether a file is JSON: by its name (`.json`, `.jsonl`, also gzipped) or an object in its first line.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    if path.name.endswith(_ENDS):
        return True
    line = first_line(path, None)
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_objects(path: Path) -> Dataset:
    """Streams over the objects of a file: one a line, empty lines left out, or one array of them.

    Raises:
        DataError: the file cannot be read, or is empty; when iterated: what stands there is no object. It
            names file and line, in an array the object's number.
    """
    if first_line(path, None).lstrip().startswith("["):
        return Dataset(_Array(path))
    return Dataset.from_file(path).filter(str.strip).map(_object)


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"the line is no JSON: {error}; it ends with {line[-40:]!r}. Expected one object a line, such as "
            '{"text": "...", "label": "..."}, or one array of objects'
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"the line is a JSON {type(value).__name__}; expected an object")
    return value


class _Array(Node):
    """The objects of a file that is an array. Position: the number of those seen."""

    def __init__(self, path: Path):
        self._path = path

    def iterate(self, position: Position, context: Context) -> Entries:
        try:
            with open_text_file(self._path, None) as stream:
                content = stream.read()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot be read: {error}", path=self._path) from error
        values = parse(decode(content, self._path), self._path)
        if not isinstance(values, list) or not values:
            raise DataError("holds no object; expected an array of objects", path=self._path)
        for count, value in enumerate(values[as_index(position) :], as_index(position) + 1):
            if not isinstance(value, dict):
                raise DataError(
                    f"item {count} of the array is {value!r:.60}; expected an object", path=self._path
                )
            yield value, count

    def origin(self, position: Position, context: Context) -> Origin | None:
        return Origin(f"{self._path}, object", as_index(position))

    def signature(self) -> Signature:
        return [{"kind": "JSON array", "files": [file_entry(self._path)]}]


def decode(content: bytes, path: Path) -> str:
    """Returns a file's text, without a byte order mark.

    Raises:
        DataError: it is not UTF-8; names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"is not UTF-8 ({content[error.start : error.end]!r}). Convert the file, for example with iconv.",
            path=path,
            line=number,
        ) from error


def parse(text: str, path: Path, line: int | None = None, *, expected: str = "expected JSON") -> Any:
    """Parses JSON.

    Args:
        text: the JSON.
        path: where it comes from.
        line: its line, None if it is the whole file.
        expected: what to say of a file that does not begin as an object or an array.

    Raises:
        DataError: it is none, or nests too deep.
    """
    if not text.strip():
        raise DataError("is empty; expected JSON", path=path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        guess = "is it damaged?"
        if line is None and not text.lstrip().startswith(("{", "[")):
            guess = expected
        elif error.msg.startswith("Unterminated") or not text[error.pos :].strip():
            guess = "the text ends there: was it cut short?"
        raise DataError(
            f"no JSON: {error.msg.removesuffix(' at')} at column {error.colno}; {guess}",
            path=path,
            line=line or error.lineno,
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON that can be read: {error}", path=path, line=line) from error
