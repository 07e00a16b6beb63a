"""Write aside, sync, swap; and locks: what is on disk is whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from propeller.errors import PropellerError

try:
    import fcntl
except ImportError:  # Windows has none; there a lock file is only a note of who runs
    fcntl = None  # type: ignore[assignment]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Makes the folder `target` at once: it appears whole, or not at all.

    Yields:
        A temporary folder beside `target` to write into. When the block ends without an error its
        files are synced and it is renamed; otherwise it is removed.

    Raises:
        FileExistsError: `target` is already there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise FileExistsError(f"{target} is already there.")
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Replaces the file `path` by `text` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Standard JSON of `value`; NaN and infinity are spelt out as strings, which `float` reads back."""
    return json.dumps(_spelt_out(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _spelt_out(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _spelt_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt_out(item) for item in value]
    return value


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
            PropellerError: another process, named by its id, holds it, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise PropellerError(f"{self.path.parent} cannot be made or written: {error}.") from error
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise PropellerError(
                f"{self.path.parent} is in use by process {holder}. Wait for it, stop it, "
                "or choose another model_dir."
            ) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
