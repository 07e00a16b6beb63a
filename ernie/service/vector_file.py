"""Where bulk encoding writes: npy or JSON lines, to a file that a killed run can go on with, or to a pipe.

    out.npy.part        what is there so far
    out.npy.part.json   how far that is, of which input, by which model: written after the part was synced

At the end the part is renamed to `out.npy`. What stands in the part behind the journal's size is dropped when
a run goes on.
"""

from __future__ import annotations

import abc
import dataclasses
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ernie.service.vector_json import number_list
from propeller import atomic, npy
from propeller.errors import ConfigError, PropellerError

_VERSION = 1
_PIECE_BYTES = 1 << 20
# How often what was written is made safe.
_COMMIT_S = 1.0

Row = np.ndarray | str
"""The vector of a line, or why it has none."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How much of the input has been read.

    Attributes:
        lines, num_bytes: so many.
        sha256: of these bytes.
    """

    lines: int
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        position: what has been encoded of the input.
        size: bytes of the output.
        errors: lines without a vector.
        truncated: lines that were cut.
    """

    position: Position
    size: int = 0
    errors: int = 0
    truncated: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Reads what `dataclasses.asdict` made."""
        return cls(**{**values, "position": Position(**values["position"])})


class Format(abc.ABC):
    """How rows are written."""

    @abc.abstractmethod
    def head(self, rows: int) -> bytes:
        """What stands before the rows; of one length, however many there are."""

    @abc.abstractmethod
    def rows(self, rows: Sequence[Row]) -> bytes:
        """Some rows."""


class Npy(Format):
    """One float32 array `[lines, dim]` as `numpy.save` writes it; NaN where a line has no vector."""

    def __init__(self, dim: int):
        self._dim = dim

    def head(self, rows: int) -> bytes:
        return npy.header("<f4", (rows, self._dim))

    def rows(self, rows: Sequence[Row]) -> bytes:
        array = np.full((len(rows), self._dim), np.nan, dtype="<f4")
        for place, row in enumerate(rows):
            if not isinstance(row, str):
                array[place] = row
        return array.tobytes()


class JsonLines(Format):
    """`{"embedding": [...]}` a line, a list for each token where these are given; or `{"error": "..."}`."""

    def head(self, rows: int) -> bytes:
        return b""

    def rows(self, rows: Sequence[Row]) -> bytes:
        written = [
            atomic.to_json({"error": row}) if isinstance(row, str) else f'{{"embedding":{number_list(row)}}}'
            for row in rows
        ]
        return "".join(f"{line}\n" for line in written).encode("utf-8", "backslashreplace")


class Target(abc.ABC):
    """Where rows go.

    Args:
        form: how they are written.
        progress: where to begin.

    Attributes:
        written: how far it is.
        kept: how far a run that starts now would begin; None where it could not.
    """

    kept: Progress | None = None

    def __init__(self, form: Format, progress: Progress):
        self._form = form
        self.written = progress
        self._committed_at = time.monotonic()

    def write(self, rows: Sequence[Row], position: Position, truncated: int) -> None:
        """Adds the rows of the lines up to a position, of which so many were cut."""
        data = self._form.rows(rows)
        self._write(data)
        before, errors = self.written, sum(isinstance(row, str) for row in rows)
        self.written = Progress(
            position, before.size + len(data), before.errors + errors, before.truncated + truncated
        )

    def is_due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._committed_at >= _COMMIT_S

    def commit(self) -> None:
        """Makes safe what was written."""
        self._commit()
        self._committed_at = time.monotonic()

    @abc.abstractmethod
    def finish(self) -> None:
        """Ends the output: it is whole."""

    @abc.abstractmethod
    def close(self) -> None:
        """Gives back what is open; what was not finished stays as it is."""

    @abc.abstractmethod
    def _write(self, data: bytes) -> None: ...

    @abc.abstractmethod
    def _commit(self) -> None: ...


class PartFile(Target):
    """A file that appears whole, and is written over several runs if need be.

    Args:
        path: the file.
        form: how rows are written.
        options: what must be the same for a run to go on; JSON.
        start: of an input of which nothing has been read.
        restart: drop what an earlier run has left.

    Raises:
        ConfigError: what is there is of another model or other options, or cannot be read.
        PropellerError: another process writes it.
    """

    def __init__(
        self, path: Path, form: Format, options: Mapping[str, Any], start: Position, *, restart: bool
    ):
        path = Path(os.path.realpath(path))  # what a symbolic link leads to gets the rows
        self._path, self._options = path, dict(options)
        self._part = path.with_name(f"{path.name}.part")
        self._journal = path.with_name(f"{path.name}.part.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "ab+")
        try:
            self._lock()
            for stale in path.parent.glob(f".{glob.escape(self._journal.name)}.*"):
                stale.unlink()  # of a run that was killed while it wrote its journal
            found = None if restart else self._found()
            super().__init__(form, found or Progress(start, size=len(form.head(0))))
            self.kept = self.written
            self._file.truncate(found.size if found else 0)
            if found is None:
                self._journal.unlink(missing_ok=True)
                self._file.write(form.head(0))
        except BaseException:
            self._file.close()
            raise

    def _write(self, data: bytes) -> None:
        self._file.write(data)

    def _commit(self) -> None:
        self._sync()
        self.kept = self.written
        values = {
            "version": _VERSION,
            "options": self._options,
            "progress": dataclasses.asdict(self.written),
        }
        atomic.write_text(self._journal, atomic.to_json(values, indent=1) + "\n")

    def finish(self) -> None:
        head = self._form.head(self.written.position.lines)
        if head:
            self._file.flush()
            with open(self._part, "rb+") as file:  # what is open for appending writes nowhere else
                file.write(head)
        self._sync()
        if os.name == "nt":  # which renames no open file, and has no locks to give up too early
            self._file.close()
        os.replace(self._part, self._path)
        self._journal.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            atomic.lock_file(self._file, wait=False)
            # Who held the lock until now may have given the file its last name: then it is whole.
            ours = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._part))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise PropellerError(f"{self._part} is being written by another process.")

    def _found(self) -> Progress | None:
        """How far the part is that an earlier run left; None if there is none."""
        size = self._file.seek(0, os.SEEK_END)
        if not (size and self._journal.exists()):
            return None
        try:
            values = json.loads(self._journal.read_text("utf-8"))
            version, options = values["version"], dict(values["options"])
            progress = Progress.from_dict(values["progress"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._journal} cannot be read ({error!r}); --restart begins anew."
            ) from error
        if version != _VERSION or size < progress.size:
            raise ConfigError(
                f"{self._part} is not what {self._journal.name} says: of another release, or shorter than "
                f"{progress.size} bytes. --restart begins anew."
            )
        names = sorted({*options, *self._options})
        differ = [
            f"{name} was {options.get(name)!r}, is {self._options.get(name)!r}"
            for name in names
            if options.get(name) != self._options.get(name)
        ]
        if differ:
            raise ConfigError(
                f"{self._part} was begun otherwise: {'; '.join(differ)}. Go on as it was begun, or begin "
                "anew with --restart."
            )
        return progress


class Pipe(Target):
    """Standard output, say. Rows are passed on at once, but of npy, whose header says how many there are.

    Args:
        sink: where rows go.
        form: how they are written.
        start: of an input of which nothing has been read.
    """

    def __init__(self, sink: BinaryIO, form: Format, start: Position):
        super().__init__(form, Progress(start))
        self._sink = sink
        self._spool = tempfile.TemporaryFile() if form.head(0) else None  # noqa: SIM115

    def _write(self, data: bytes) -> None:
        (self._spool or self._sink).write(data)
        if self._spool is None:
            self._sink.flush()

    def _commit(self) -> None:
        """What was passed on is safe, or it never will be."""

    def finish(self) -> None:
        if self._spool is not None:
            self._sink.write(self._form.head(self.written.position.lines))
            self._spool.seek(0)
            shutil.copyfileobj(self._spool, self._sink, _PIECE_BYTES)
        self._sink.flush()

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()
