"""Pickles from elsewhere, read without letting them run anything.

A pickle is a program: each class or function that it names is imported and called. Here a name that is
not on the caller's list ends the reading before anything is imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from propeller.errors import CheckpointError

PLAIN_TYPES: Mapping[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
}
"""All that a pickle of dicts, lists, tuples, sets, strings and numbers may name (the second spelling is
Python 2's). The other containers and scalars have opcodes of their own and name nothing."""


class _AllowListUnpickler(pickle.Unpickler):
    def __init__(
        self,
        file: BinaryIO,
        allowed: Mapping[tuple[str, str], Any],
        persistent_load: Callable[[Any], Any] | None,
        name: str,
    ):
        # Python 2 wrote str as bytes; the texts in such files are UTF-8.
        super().__init__(file, encoding="utf-8")
        self._allowed = allowed
        self._load = persistent_load
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CheckpointError(
                f"{self._name} names {module}.{name}, which is not among what may be loaded from such a "
                "file. Nothing of it was run. Get the file from a source you trust, or convert it to a "
                "format that holds data only."
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._load is None:
            raise CheckpointError(
                f"{self._name} refers to data outside itself ({pid!r:.80}); a self-contained pickle was "
                "expected."
            )
        return self._load(pid)


def safe_load(
    file: BinaryIO,
    allowed: Mapping[tuple[str, str], Any],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads one pickle that may name only what is on a list.

    Args:
        file: open for reading bytes; read from where it stands.
        allowed: (module, name) as written in the pickle -> the object that stands for it, which need
            not be the real one. Each must be harmless when called with any arguments.
        persistent_load: turns the pickle's references to outside data into objects.

    Raises:
        CheckpointError: the pickle names something else, refers to outside data although
            `persistent_load` is None, or is damaged.
    """
    name = str(getattr(file, "name", "The pickle"))
    try:
        return _AllowListUnpickler(file, allowed, persistent_load, name).load()
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged pickle fails in whatever way its opcodes lead to; Python's documentation lists
        # UnpicklingError, AttributeError, EOFError, ImportError and IndexError as examples only.
        raise CheckpointError(
            f"{name} is not a readable pickle ({type(error).__name__}: {error}). "
            "It may be cut short or of another format."
        ) from error
