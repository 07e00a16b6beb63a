"""Binary record files: dicts of arrays, numbers and strings with random access.

A file is `magic, blocks, footer, trailer`. A block holds up to some thousand records column by column,
integers in the narrowest type that holds them; the footer is JSON and says where each block and each of its
parts lies; the trailer says where the footer lies. Footer and blocks carry CRC-32 sums; a block's is checked
when it is first read. All numbers are little-endian. Nothing in the file can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import DataError

FORMAT_VERSION = 1
_MAGIC = b"PRPLREC\n"
_TRAILER = struct.Struct("<QQI8s")  # offset, size and CRC-32 of the footer, magic
_BLOCK_RECORDS = 4096
_BLOCK_BYTES = 4 << 20
_NARROW = tuple(np.dtype(name) for name in ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4"))

# How a value is stored: its kind, and for arrays and numpy scalars (`array`) dtype and number of axes.
_Field = tuple[str, str, str, int]
_Schema = tuple[_Field, ...]


class RecordWriter:
    """Writes a record file; the file appears, complete, when the writer is closed.

    Use it in a `with` block: if that ends by an exception, nothing is left behind.

    Args:
        path: the file to make or replace.

    Attributes:
        metadata: what may be set until the end and is found again as `RecordFile.metadata`; JSON-able.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._num_records = 0
        self._schemas: dict[_Schema, int] = {}
        self._blocks: list[list[Any]] = []
        self._schema: _Schema = ()
        self._rows: list[list[Any]] = []
        self._row_bytes = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self._stream = self._temporary.open("xb")
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", path=self.path) from error
        self._write(_MAGIC)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a record.

        Args:
            record: name to value: an array of numbers or booleans, a number, a bool, a str or bytes.

        Raises:
            DataError: a value is none of these, or the disk is full.
        """
        schema = tuple([_field(name, value) for name, value in record.items()])
        if schema != self._schema or len(self._rows) >= _BLOCK_RECORDS or self._row_bytes >= _BLOCK_BYTES:
            self._flush()
            self._schema = schema
        # Copies, for a caller may fill the same array again.
        row = [np.array(value) if isinstance(value, np.ndarray) else value for value in record.values()]
        self._rows.append(row)
        self._row_bytes += sum(map(_num_bytes, row))

    def close(self) -> None:
        """Writes what is left, syncs, and puts the file in place.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        try:
            self._flush()
            footer = json.dumps(
                {
                    "version": FORMAT_VERSION,
                    "num_records": self._num_records,
                    "schemas": list(self._schemas),
                    "blocks": self._blocks,
                    "metadata": self.metadata,
                }
            ).encode("utf-8")
            trailer = _TRAILER.pack(self._stream.tell(), len(footer), zlib.crc32(footer), _MAGIC)
            self._write(footer + trailer)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", path=self.path) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drops what was written, if the file is not complete yet."""
        self._rows = []
        with contextlib.suppress(OSError):  # a full disk fails the flush in close() once more
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        try:
            self._stream.write(data)
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", path=self.path) from error

    def _flush(self) -> None:
        """Writes the rows gathered so far as one block.

        Its entry in the footer: [records, schema, offset, size, CRC-32, parts], a part being
        [offset in the block, dtype, number of elements].
        """
        if not self._rows:
            return
        data = bytearray()
        parts: list[tuple[int, str, int]] = []
        for (_, kind, dtype, ndim), values in zip(self._schema, zip(*self._rows, strict=True), strict=True):
            for array in _columns(kind, dtype, ndim, values):
                data.extend(bytes(-len(data) % 8))
                parts.append((len(data), array.dtype.str, array.size))
                data.extend(array.tobytes())
        data.extend(bytes(-len(data) % 8))
        schema = self._schemas.setdefault(self._schema, len(self._schemas))
        entry = [len(self._rows), schema, self._stream.tell(), len(data), zlib.crc32(data), parts]
        self._write(bytes(data))
        self._blocks.append(entry)
        self._num_records += len(self._rows)
        self._rows, self._row_bytes = [], 0


def _field(name: str, value: Any) -> _Field:
    """Returns how a value is to be stored."""
    if isinstance(value, (str, bytes)):
        return name, "str" if isinstance(value, str) else "bytes", "|u1", 1
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return name, "array", value.dtype.newbyteorder("<").str, value.ndim
    if isinstance(value, bool):
        return name, "bool", "|b1", 0
    if isinstance(value, float):
        return name, "float", "<f8", 0
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return name, "int", "<i8", 0
    kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise DataError(
        f"{name!r} is {kind} ({value!r:.80}), which a record cannot hold; expected an array of numbers or "
        "booleans, a number within 64 bits, a str or bytes."
    )


def _num_bytes(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes)) else getattr(value, "nbytes", 8)


def _columns(kind: str, dtype: str, ndim: int, values: tuple[Any, ...]) -> list[npt.NDArray[Any]]:
    """Returns the arrays in which a block keeps one column: [ends, shapes,] values."""
    if ndim == 0:
        return [_narrowed(np.array(values, dtype))]
    if kind == "str":
        values = tuple([value.encode("utf-8", "surrogatepass") for value in values])
    if kind in ("str", "bytes"):
        flat, sizes = np.frombuffer(b"".join(values), "|u1"), [len(value) for value in values]
    else:
        flat, sizes = np.concatenate([value.ravel() for value in values]), [value.size for value in values]
    ends = np.zeros(len(values) + 1, "<i8")
    np.cumsum(sizes, out=ends[1:])
    columns = [_narrowed(ends), _narrowed(flat.astype(dtype, copy=False))]
    if ndim > 1:
        columns.append(np.array([value.shape for value in values], "<i8").ravel())
    return columns


def _narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns integers in the narrowest type that holds them all; other arrays as they are."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    low, high = array.min(), array.max()
    for dtype in _NARROW:
        info = np.iinfo(dtype)
        if dtype.itemsize < array.dtype.itemsize and info.min <= low and high <= info.max:
            return array.astype(dtype)
    return array


class RecordFile:
    """A record file, opened for reading: `len(file)`, `file[index]`.

    A record is a new dict; its arrays are copies, writable and independent of the file.

    Args:
        path: a file that `RecordWriter` wrote.

    Attributes:
        path: as given.
        metadata: what the writer set.

    Raises:
        DataError: there is no such file, it is no record file, cut short or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size < len(_MAGIC) + _TRAILER.size or stream.read(len(_MAGIC)) != _MAGIC:
                    raise DataError(
                        "is not a record file; expected one that RecordWriter wrote", path=self.path
                    )
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot be opened: {error.strerror}", path=self.path) from error
        footer = self._footer(size)
        self.metadata: dict[str, Any] = footer["metadata"]
        self._num_records: int = footer["num_records"]
        self._schemas: list[list[Any]] = footer["schemas"]
        self._blocks: list[list[Any]] = footer["blocks"]
        self._starts: list[int] = [0]
        for entry in self._blocks:
            self._starts.append(self._starts[-1] + entry[0])
        self._readers: list[list[tuple[str, Callable[[int], Any]]] | None] = [None] * len(self._blocks)

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._num_records:
            raise IndexError(f"record {index} of {self._num_records}")
        block = bisect_right(self._starts, index) - 1
        readers = self._readers[block] or self._open_block(block)
        row = index - self._starts[block]
        return {name: read(row) for name, read in readers}

    def verify(self) -> None:
        """Reads the whole file.

        Raises:
            DataError: a block is damaged.
        """
        for block in range(len(self._blocks)):
            self._open_block(block)

    def sha256(self) -> str:
        """Returns a digest of the records, without reading them: of the sizes and sums of their blocks.

        Two files that were written of the same records have the same one, whatever their metadata.
        """
        blocks = [[count, schema, size, crc] for count, schema, _, size, crc, _ in self._blocks]
        return hashlib.sha256(json.dumps([self._schemas, blocks]).encode()).hexdigest()

    def _footer(self, size: int) -> dict[str, Any]:
        offset, length, crc, magic = _TRAILER.unpack(self._data[size - _TRAILER.size :])
        if magic != _MAGIC or offset + length + _TRAILER.size != size:
            raise DataError("the record file is cut short or damaged; write it again", path=self.path)
        data = self._data[offset : offset + length]
        if zlib.crc32(data) != crc:
            raise DataError("the index of the record file is damaged; write it again", path=self.path)
        footer: dict[str, Any] = json.loads(data)
        if footer["version"] != FORMAT_VERSION:
            raise DataError(
                f"the record file has format version {footer['version']}; this release reads version "
                f"{FORMAT_VERSION}. Write it again.",
                path=self.path,
            )
        return footer

    def _open_block(self, block: int) -> list[tuple[str, Callable[[int], Any]]]:
        """Checks a block and returns a reader for each of its columns."""
        _, schema, offset, size, crc, parts = self._blocks[block]
        with memoryview(self._data) as view, view[offset : offset + size] as data:
            damaged = zlib.crc32(data) != crc
        if damaged:
            first = self._starts[block]
            raise DataError(
                f"records {first + 1} to {self._starts[block + 1]} are damaged; write the file again",
                path=self.path,
            )
        arrays = iter([np.frombuffer(self._data, dtype, count, offset + at) for at, dtype, count in parts])
        readers = []
        for name, kind, dtype, ndim in self._schemas[schema]:
            if ndim == 0:
                readers.append((name, _scalar_reader(kind, next(arrays), np.dtype(dtype))))
            else:
                ends, values = next(arrays).data, next(arrays)
                shapes = next(arrays).reshape(-1, ndim) if ndim > 1 else None
                readers.append((name, _array_reader(kind, ends, values, np.dtype(dtype), shapes)))
        self._readers[block] = readers
        return readers


def _scalar_reader(kind: str, values: npt.NDArray[Any], dtype: np.dtype[Any]) -> Callable[[int], Any]:
    if kind != "array":
        return values.item
    return values.astype(dtype).__getitem__


def _array_reader(
    kind: str,
    ends: memoryview,
    values: npt.NDArray[Any],
    dtype: np.dtype[Any],
    shapes: npt.NDArray[Any] | None,
) -> Callable[[int], Any]:
    def read_bytes(row: int) -> bytes:
        return values[ends[row] : ends[row + 1]].tobytes()

    def read_vector(row: int) -> npt.NDArray[Any]:
        return values[ends[row] : ends[row + 1]].astype(dtype)

    if kind == "bytes":
        return read_bytes
    if kind == "str":
        return lambda row: read_bytes(row).decode("utf-8", "surrogatepass")
    if shapes is None:
        return read_vector
    return lambda row: read_vector(row).reshape(shapes[row])
