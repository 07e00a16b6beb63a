"""What a pipeline's items and their order follow from, as JSON can keep it: made, and compared.

A checkpoint keeps the signature of the data beside the position in it: a position means something only over
the same items in the same order. A signature is a list with one entry for each source and transform, a dict
of its `kind` and its settings. It holds digests of contents and names of functions, and no paths: data that
was moved or renamed is the same data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from propeller import atomic
from propeller.errors import DataError

# One dict for each source and transform, from the source on.
Signature: TypeAlias = list[Any]

# Items of a list that go into its digest: 10,000 tokenised examples take 0.1 s.
_ITEMS_READ = 10_000
_CHANGES_SHOWN = 5
_SHA256_DIGITS = 64


def function_name(func: Callable[..., Any]) -> str:
    """Returns what stands for a user's function: equal in each process, and free of addresses and paths.

    That is its qualified name, and its attribute `fingerprint` (or that of the object whose method it is)
    where it has one. Of a `functools.partial`, numbers, short texts and functions among the arguments count
    as well, of others the type. What a closure holds cannot be told.
    """
    if isinstance(func, functools.partial):
        given = [_argument(value) for value in func.args]
        given += [f"{name}={_argument(value)}" for name, value in sorted(func.keywords.items())]
        return f"partial({', '.join([function_name(func.func), *given])})"
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", type(func).__qualname__)
    owner = getattr(func, "__self__", None)
    fingerprint = getattr(func, "fingerprint", None) or getattr(owner, "fingerprint", None)
    if isinstance(fingerprint, str):
        return f"{name} {hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}"
    return str(name)


def _argument(value: Any) -> str:
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    if isinstance(value, str) and "/" not in value and "\\" not in value:  # else it may be a path
        return repr(value)
    return function_name(value) if callable(value) else type(value).__name__


def file_entry(path: Path) -> dict[str, Any]:
    """Returns the size and sha256 of a file's bytes, as they lie on disk (gzipped ones, if it is gzipped).

    Reads the whole file, about 1.4 GB/s from the page cache where the CPU has instructions for sha256; once
    in a process as long as the file does not change. A pipe has no contents that could be read twice.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return {"bytes": None, "sha256": None}
        digest = _file_sha256(os.path.abspath(path), found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error
    return {"bytes": found.st_size, "sha256": digest}


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: str, mtime_ns: int, size: int) -> str:
    return atomic.sha256(Path(path))


def items_sha256(items: Sequence[Any]) -> str | None:
    """Returns a digest of the items of a list in memory, evenly spaced ones if there are many.

    Returns:
        None where it cannot be told: not a list, tuple or array (to read its items may be slow), or an item
        is not made of numbers, text, bytes, arrays, lists and dicts of these.
    """
    if not isinstance(items, (list, tuple, np.ndarray)):
        return None
    digest = hashlib.sha256()
    try:
        for index in range(0, len(items), -(-len(items) // _ITEMS_READ) or 1):
            _feed(digest.update, items[index])
    except _CannotTell:
        return None
    return digest.hexdigest()


class _CannotTell(Exception):
    """A value whose contents have no digest."""


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Feeds a value to a digest; kinds and lengths go first, so that no two values feed the same bytes."""
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.hasobject:
            raise _CannotTell
        update(f"array {value.dtype.str} {value.shape};".encode())
        update(value.tobytes())
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        update(f"{type(value).__name__} {len(data)};".encode())
        update(data)
    elif value is None or isinstance(value, (bool, int, float)):
        update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Mapping):
        update(f"dict {len(value)};".encode())
        for key, item in value.items():
            _feed(update, key)
            _feed(update, item)
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)};".encode())
        for item in value:
            _feed(update, item)
    else:
        signature = getattr(value, "signature", None)  # that of a dataset, of which there may be a list
        if isinstance(value, type) or not callable(signature) or not hasattr(value, "iterate"):
            raise _CannotTell
        _feed(update, signature())


def as_json(signature: Signature) -> Signature:
    """Returns a signature as it is after a trip through JSON."""
    plain: Signature = json.loads(atomic.to_json(signature))
    return plain


def difference(old: Sequence[Any], new: Sequence[Any]) -> str | None:
    """Says in what two signatures differ, in words that can stand in a sentence.

    Args:
        old: what `Dataset.signature` gave, possibly after a trip through JSON.
        new: the same of another dataset, or of this one on another day.

    Returns:
        For example `bucket: batch_size 32 -> 16`; None if they are equal.
    """
    before, after = as_json(list(old)), as_json(list(new))
    kinds = [[_kind(entry) for entry in entries] for entries in (before, after)]
    if kinds[0] != kinds[1]:
        return f"the steps of the pipeline: {', '.join(kinds[0])} -> {', '.join(kinds[1])}"
    changes = []
    for kind, was, now in zip(kinds[1], before, after, strict=True):
        if found := _changes(dict(_flat(was)), dict(_flat(now))):
            changes.append(f"{kind}: {', '.join(found)}")
    return "; ".join(changes) or None


def _kind(entry: Any) -> str:
    return str(entry["kind"] if isinstance(entry, dict) and "kind" in entry else entry)


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    shown = [f"{name} {_shown(was.get(name))} -> {_shown(now.get(name))}" for name in names]
    more = len(shown) - _CHANGES_SHOWN
    return shown if more <= 0 else [*shown[:_CHANGES_SHOWN], f"and {more} more"]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what is in nested dicts and lists, each with a name such as `files[1].bytes`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value, start=1):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, value


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == _SHA256_DIGITS:
        return f"{value[:12]}.."
    return repr(value)
