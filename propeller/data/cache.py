"""Files read through a cache: which files are read, and the records made of their rows."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from propeller import atomic
from propeller.data.chunks import fail_together
from propeller.data.dataset import Dataset
from propeller.data.node import Context, Node, Origin
from propeller.data.record import FORMAT_VERSION, RecordFile, RecordWriter
from propeller.data.sources import PathLike, RecordSource
from propeller.errors import ConfigError, DataError
from propeller.version import __version__

log = logging.getLogger("propeller")

_CHUNK = 512
# Caches kept of one source, so that runs with different settings do not undo each other's.
_KEPT = 4
# Names that say which part of a data set a file is: a folder of such files is no folder of parts.
_SPLITS = frozenset({"train", "dev", "test", "valid", "validation", "eval", "infer", "predict"})

Example = dict[str, Any]
Prepare = Callable[[list[Example]], list[Example]]


@dataclass(frozen=True)
class Build:
    """What a cache is made from.

    Attributes:
        name: of the data set.
        sources: each file, and the node that reads its examples, one a line.
        signature: what the examples depend on besides the files; None: that cannot be told.
        prepare: what is done to chunks of them.
        prepare_key: what stands for `prepare`.
    """

    name: str
    sources: Sequence[tuple[Path, Node]]
    signature: str | None
    prepare: Prepare | None
    prepare_key: str | None

    @property
    def stem(self) -> str:
        """The beginning of the cache's file name, one for these source files."""
        paths = "\n".join(os.path.abspath(path) for path, _ in self.sources)
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.name)}-{_sha256(paths)[:16]}"

    def key(self) -> str | None:
        """Returns what changes whenever the examples might, or None if that cannot be told."""
        if self.signature is None or (self.prepare is not None and self.prepare_key is None):
            return None
        # A release may read lines otherwise than the one before.
        parts = [__version__, str(FORMAT_VERSION), self.signature, self.prepare_key or ""]
        return _sha256("\n".join(parts + [_contents(path) for path, _ in self.sources]))[:32]


def source_files(
    name: str, data_dir: PathLike | None = None, files: PathLike | Sequence[PathLike] | None = None
) -> list[Path]:
    """Returns the files to read, as `FeatureColumns.build_dataset` documents.

    Raises:
        ConfigError: not exactly one of `data_dir` and `files`, or both a folder and a file of this name.
        DataError: there is no such file, or the folder is empty.
    """
    if files is not None and data_dir is None:
        paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        if not paths:
            raise ConfigError(f"the data set {name!r} has an empty list of files; expected at least one")
        return [Path(path) for path in paths]
    if data_dir is None or files is not None:
        raise ConfigError(f"the data set {name!r} is read from data_dir or files; expected one of the two")
    folder = Path(data_dir)
    if not folder.is_dir():
        if not folder.exists():
            raise DataError("there is no such file or folder", path=folder)
        return [folder]
    candidates = [folder / f"{name}{suffix}" for suffix in ("", ".tsv", ".tsv.gz")]
    found = [path for path in candidates if path.exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(
            f"{folder} holds {names}; expected one of them. Remove the others, or name the file."
        )
    if found:
        return _parts(found[0]) if found[0].is_dir() else found
    parts = _parts(folder)
    splits = sorted({path.name.split(".")[0] for path in parts} & _SPLITS)
    if splits:
        names = ", ".join(path.name for path in parts)
        raise DataError(f"there is no {name}, {name}.tsv or {name}.tsv.gz; found {names}", path=folder)
    return parts


def _parts(folder: Path) -> list[Path]:
    parts = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    if not parts:
        raise DataError("the folder holds no file; expected one or several parts of a data set", path=folder)
    return parts


def prepare_files(
    name: str,
    files: Sequence[PathLike],
    read: Callable[[Path], Dataset],
    *,
    read_key: str | None,
    prepare: Prepare | None = None,
    prepare_key: str | None = None,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Reads files through a cache of binary records, with random access.

    The cache is built at the first call, once for all processes that ask for it, and again when the contents
    of the files, `read_key`, `prepare_key` or the release of this package change.

    Args:
        name: what is read, `train` for example.
        files: at least one.
        read: gives the rows of a file, dicts of name to value.
        read_key: stands for what `read` does and its settings. Without one, what it made is not used again:
            the cache is a temporary file of this dataset.
        prepare: a function of a list of rows, such as a tokenizer, which the cache holds the results of. It
            gets up to 512 at a time, and may make fewer of them, or more.
        prepare_key: as `read_key`, for `prepare`.
        cache_dir: where the cache lies; None: `$XDG_CACHE_HOME/propeller` or `~/.cache/propeller`. If it
            cannot be written, a temporary folder takes its place and a warning is logged.

    Raises:
        ConfigError: there is no file.
        DataError: a file cannot be read, there is no row, a row is malformed, or `prepare` failed.
    """
    sources = [(path, read(path)._node) for path in source_files(name, files=files)]
    build = Build(name, sources, read_key, prepare, prepare_key)
    return Dataset(RecordSource(cached_records(build, None if cache_dir is None else Path(cache_dir))))


def cached_records(build: Build, cache_dir: Path | None) -> RecordFile:
    """Returns the records of a source, out of the cache if they are there, else made now.

    Raises:
        DataError: a row, or `prepare`, failed; or there is no row.
    """
    key = build.key()
    if key is None:
        return _temporary_records(build)
    folder = default_folder() if cache_dir is None else cache_dir
    try:
        lock = _locked(folder, build.stem)
    except OSError as error:
        log.warning("cannot write the cache folder %s (%s): using a temporary one", folder, error.strerror)
        return _temporary_records(build)
    with lock:
        path = folder / f"{build.stem}-{key}.records"
        records = _open_whole(path)
        if records is None:
            _write(build, path)
            records = RecordFile(path)
            log.info("cached %d examples of %s in %s", len(records), build.name, path)
        _keep_newest(folder, build.stem, path)
    return records


def default_folder() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/propeller`, or in `~/.cache`.

    A user without a home has one among the temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        base = os.path.join(tempfile.gettempdir(), f"propeller-cache-{os.getuid()}")
    return Path(base) / "propeller"


def _temporary_records(build: Build) -> RecordFile:
    # Open files outlive their folder, and are gone with the process however it ends. (Not on Windows, where
    # removing fails.)
    with tempfile.TemporaryDirectory(prefix="propeller-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f"{build.stem}.records"
        _write(build, path)
        return RecordFile(path)


def _locked(folder: Path, stem: str) -> TextIO:
    """Returns an open file that holds a lock on the caches of one source until it is closed.

    Without locks (Windows) two processes may build the same cache; each puts a whole file in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / f"{stem}.lock").open("a", encoding="utf-8")
    try:
        atomic.lock_file(stream, wait=True)
    except OSError:
        stream.close()
        raise
    return stream


def _open_whole(path: Path) -> RecordFile | None:
    """Returns a cache that is there and sound."""
    if not path.exists():
        return None
    try:
        records = RecordFile(path)
        records.verify()
    except DataError as error:
        log.warning("building the cache again: %s", error)
        return None
    return records


def _keep_newest(folder: Path, stem: str, path: Path) -> None:
    """Marks a cache as used, and removes those of the same source that were not for longest."""
    # Whatever cannot be touched or removed (another user's file) stays: that costs space, no more.
    with contextlib.suppress(OSError):
        os.utime(path)
        others = [other for other in folder.glob(f"{stem}-*.records") if other != path]
        others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
        # Under the lock nobody writes, so that what is half written is from a process that died.
        for stale in [*others[_KEPT - 1 :], *folder.glob(f".{stem}-*.tmp")]:
            stale.unlink()


def _write(build: Build, path: Path) -> None:
    """Makes the record file. Its metadata say from which lines the records are, if each is from the next."""
    context = Context(seed=0)
    origins: list[tuple[str, int, int]] | None = []
    with RecordWriter(path) as writer:
        examples = _Examples(writer, build.prepare)
        for source, node in build.sources:
            rows = node.iterate(None, context)
            first: Origin | None = None
            count = 0
            while entries := list(islice(rows, _CHUNK)):
                try:
                    added = examples.add([row for row, _ in entries])
                except Exception as error:
                    func = build.prepare or writer.write
                    fail_together(func, error, entries, node, context, again=examples.add)
                first = first or node.origin(entries[0][1], context)
                last = node.origin(entries[-1][1], context)
                count += added
                one_each = added == len(entries)
                if not one_each or first is None or last is None or last.line != first.line + count - 1:
                    origins = None
            if origins is not None and first is not None:
                origins.append((os.path.abspath(source), first.line, count))
        if examples.names is None:
            raise DataError("there is no example in it; expected at least one", path=build.sources[0][0])
        if origins is not None:
            writer.metadata["origins"] = origins


class _Examples:
    """What is made of rows, on its way into a record file.

    Args:
        writer: of the file.
        prepare: makes examples of rows; None: they are examples.

    Attributes:
        names: those that all examples have; None as long as there is no example.
    """

    def __init__(self, writer: RecordWriter, prepare: Prepare | None):
        self.names: set[str] | None = None
        self._writer, self._prepare = writer, prepare

    def add(self, rows: list[Example]) -> int:
        """Writes what `rows` become, and returns how many that are.

        Raises:
            DataError: an example cannot be written, or has other names than those before it.
        """
        examples = rows if self._prepare is None else list(self._prepare(rows))
        for example in examples:
            self._check(example)
            self._writer.write(example)
        return len(examples)

    def _check(self, example: Example) -> None:
        if not isinstance(example, dict):
            raise DataError(f"an example is {type(example).__name__}; expected a dict of name to value")
        if self.names is None:
            self.names = set(example)
        if self.names != example.keys():
            raise DataError(
                f"an example has {sorted(example)}, those before it {sorted(self.names)}; expected the same "
                "columns throughout the parts of a data set"
            )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _contents(path: Path) -> str:
    try:
        return atomic.sha256(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error
