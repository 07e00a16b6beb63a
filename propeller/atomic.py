"""Write aside, sync, swap; and locks: what is on disk is whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any

from propeller.errors import ConfigError, PropellerError

log = logging.getLogger("propeller")

try:
    import fcntl
except ImportError:  # Windows has none; there a lock file is only a note of who runs
    fcntl = None  # type: ignore[assignment]


def _aside(target: Path) -> Path:
    """A name of its own beside `target`: a rename is atomic only within one file system."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Makes the folder `target` at once: it appears whole, or not at all.

    Args:
        target: the folder.
        replace: take the place of a folder that is there, once the new one is on the disk. That takes two
            renames; between them both are there, under hidden names.

    Yields:
        A temporary folder beside `target` to write into. When the block ends without an error its
        files are synced and it is renamed; otherwise it is removed.

    Raises:
        FileExistsError: `target` is already there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not (replace and target.is_dir()):
        raise FileExistsError(f"{target} is already there.")
    temporary = _aside(target)
    old = temporary.with_name(f"{temporary.name}.old")
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        if replace and target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Makes or replaces the file `target` at once; its folder is made if it is not there.

    What a symbolic link leads to gets the content. A device or a pipe is not replaced but written.

    Yields:
        A temporary file to write into. When the block ends without an error it is synced and renamed, or
        copied to what cannot be replaced; otherwise it is removed.
    """
    if target.exists() and not target.is_file():
        with tempfile.TemporaryDirectory() as folder:
            yield (written := Path(folder) / target.name)
            with open(written, "rb") as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _aside(target)
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, which is its owner's alone
        with open(temporary, "rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        temporary.replace(target)
        if os.name != "nt":  # where a folder cannot be opened
            _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces the file `path` by `text` (UTF-8, line ends as they are) in one rename."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def swap_link(link: Path, target: Path) -> None:
    """Points the symbolic link `link` at `target` (a sibling or descendant of its folder) in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
    _sync(link.parent)


def free_path(path: Path) -> Path:
    """`path`, or where that is taken the same with a number behind it."""
    candidate, number = path, 0
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON of `value`, which may hold numpy's numbers and arrays, and paths.

    NaN and infinity are spelt out as strings, which `float` reads back.

    Raises:
        ConfigError: something in it is of a type that JSON has no place for; where it stands is named.
    """
    try:
        return _dumps(value, indent)
    except (TypeError, ValueError):  # most values are plain, and are written at once
        return _dumps(_plain(value, ""), indent)


def _dumps(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy, without importing it
        value = value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"{where.removeprefix('.') or 'The value'} is {value!r:.80} ({type(value).__name__}), which JSON has "
        "no place for: expected text, a number, true, false, None, or lists and dictionaries of these."
    )


def _key(key: Any, where: str) -> Any:
    plain = _plain(key, f"{where}.{key!r}")
    if isinstance(plain, Mapping | list):
        raise ConfigError(
            f"{where.removeprefix('.') or 'The value'} has the key {key!r:.80} ({type(key).__name__}); "
            "JSON's keys are text: expected that, or a number."
        )
    return plain


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Locks an open file for this process, until it is closed. Where the system has no locks, does nothing.

    Raises:
        BlockingIOError: another process holds it, and this one was not to wait.
        OSError: its file system cannot lock.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Keeps a second process out of a folder while this one works in it.

    The kernel releases the lock with its holder, however that ends; an orphan that still runs still
    holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file: Any = None

    def __enter__(self) -> FolderLock:
        """Takes the lock.

        Raises:
            PropellerError: another process, named by its id, holds it, or the folder cannot be written
                or locked.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise PropellerError(f"{self.path.parent} cannot be made or written: {error}.") from error
        try:
            lock_file(self._file, wait=False)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise PropellerError(
                f"{self.path.parent} is in use by process {holder}. Wait for it, stop it, "
                "or choose another model_dir."
            ) from None
        except OSError as error:
            self._file.close()
            raise PropellerError(
                f"{self.path.parent} cannot be locked: {error}. Choose a model_dir on a file system that "
                "has locks, such as a local disk."
            ) from error
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


def set_aside(folder: Path) -> Path | None:
    """Renames a folder to the first of `folder.1`, `folder.2`, ... that is free, and logs it.

    Returns:
        Its new place; None if there was nothing to keep: no folder, or nothing in it but a lock.

    Raises:
        PropellerError: another process, named by its id, works in it, or it cannot be renamed.
    """
    if not folder.exists():
        return None
    path = Path(os.path.abspath(folder))  # "." has no name
    with FolderLock(path) as lock:
        if all(found == lock.path for found in path.iterdir()):
            return None
        for inner in path.glob("*/.lock"):  # of a run that is being started
            with FolderLock(inner.parent):
                pass
        places = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        target = next(place for place in places if not os.path.lexists(place))
        try:
            if Path.cwd().is_relative_to(path.resolve()):
                raise OSError("it is, or holds, the current folder")
            path.rename(target)
        except OSError as error:
            raise PropellerError(
                f"{path} cannot be moved to {target}: {error}. Move what is in it yourself, or choose "
                "another model_dir."
            ) from error
    log.info("beginning anew; what was in %s is kept as %s", folder, target)
    return target
