"""Arrays that grow on disk are what numpy reads."""

from __future__ import annotations

import numpy as np
import pytest

from propeller.errors import PropellerError
from propeller.npy import NpyWriter, header


@pytest.mark.parametrize(
    ("row_shape", "dtype"), [((), "int64"), ((3,), "<f4"), ((2, 3), "float16"), ((0,), "<f4")]
)
def test_rows_come_back(tmp_path, row_shape, dtype):
    path = tmp_path / "a.npy"
    with NpyWriter(path, row_shape, dtype) as writer:
        pieces = [np.ones((count, *row_shape), dtype) * count for count in (2, 0, 5)]
        for piece in pieces:
            writer.write(piece)
    found = np.load(path)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.concatenate(pieces))
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), found)


def test_no_rows(tmp_path):
    NpyWriter(tmp_path / "a.npy", (4,)).close()
    assert np.load(tmp_path / "a.npy").shape == (0, 4)


def test_rows_of_any_layout(tmp_path):
    values = np.arange(24, dtype="<f4").reshape(4, 6)
    with NpyWriter(tmp_path / "a.npy", (3,)) as writer:
        writer.write(values[:, ::2])
        writer.write(np.asfortranarray(values[:, :3]))
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.concatenate([values[:, ::2], values[:, :3]])
    )


def test_headers_have_one_length():
    assert len(header("<f4", (0, 768))) == len(header("<f4", (1 << 40, 768)))


@pytest.mark.parametrize("rows", [np.ones((2, 4), "<f4"), np.ones((2, 3), "<f8"), np.ones(3, "<f4")])
def test_other_rows_are_refused(tmp_path, rows):
    with NpyWriter(tmp_path / "a.npy", (3,)) as writer, pytest.raises(PropellerError, match="was expected"):
        writer.write(rows)
