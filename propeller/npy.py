"""Arrays on disk that grow row by row: `.npy` files, as `numpy.load` reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import PropellerError


def header(dtype: npt.DTypeLike, shape: Sequence[int]) -> bytes:
    """What stands before the rows of an array; of one length, however many rows there are.

    Raises:
        PropellerError: this numpy is too old for that.
    """
    made = _header(dtype, shape)
    if len(made) != len(_header(dtype, (1 << 62, *shape[1:]))):
        raise PropellerError(
            f"numpy {np.__version__} writes headers that cannot grow; install 1.26 or later."
        )
    return made


def _header(dtype: npt.DTypeLike, shape: Sequence[int]) -> bytes:
    stream = io.BytesIO()
    entry = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, entry)
    return stream.getvalue()


class NpyWriter:
    """Writes an array of rows; the file is whole when the writer is closed.

    Args:
        path: the file, which is made or replaced.
        row_shape: the shape of a row; `()` for a number.
        dtype: of the array.
    """

    def __init__(self, path: Path, row_shape: Sequence[int], dtype: npt.DTypeLike = "<f4"):
        self._row_shape, self._dtype = tuple(row_shape), np.dtype(dtype)
        self._num_rows = 0
        self._file = path.open("wb")
        self._file.write(header(self._dtype, (0, *self._row_shape)))

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Adds rows, `[n, *row_shape]`.

        Raises:
            PropellerError: their shape or dtype is another.
        """
        if rows.shape[1:] != self._row_shape or rows.dtype != self._dtype:
            raise PropellerError(
                f"rows of {rows.dtype} {list(rows.shape[1:])} came where {self._dtype} "
                f"{list(self._row_shape)} was expected"
            )
        self._file.write(np.ascontiguousarray(rows).data)
        self._num_rows += len(rows)

    def close(self) -> None:
        """Writes down how many rows there are."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(header(self._dtype, (self._num_rows, *self._row_shape)))
            self._file.close()
