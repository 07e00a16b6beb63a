"""What the processors of this package share: a tokenizer, a longest input, settings that JSON holds."""

from __future__ import annotations

import abc
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ernie.tokenizing import Tokenizer, library_versions, load_tokenizer
from propeller import atomic
from propeller.processor import Processor

P = TypeVar("P", bound="TextProcessor")


class TextProcessor(Processor):
    """A task whose model takes `input_ids` and `token_type_ids`.

    Args:
        tokenizer: the model's tokenizer.
        max_seqlen: tokens of an example at most, special ones included.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_seqlen: int):
        self.tokenizer = tokenizer
        self.max_seqlen = max_seqlen

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that `__init__` takes besides the tokenizer, by name; JSON."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay as it is while a run goes on; JSON.

        Spelt out rather than as the fingerprint: what differs can be named, and a newer tokenizer library
        does not end a run.
        """
        return {"tokenizer": self.tokenizer.fingerprint, **self.settings}

    @property
    def pad_values(self) -> dict[str, int | float]:
        """What fills up shorter rows, where that is not 0."""
        return {"input_ids": self.tokenizer.pad_token_id}

    def save(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save_pretrained(folder)
        return self.settings

    @classmethod
    def load(cls: type[P], folder: Path, settings: Mapping[str, Any]) -> P:
        return cls(load_tokenizer(folder), **settings)

    @property
    def fingerprint(self) -> str:
        tokens = [self.tokenizer.fingerprint, library_versions()]
        parts = [self.name, tokens, self.settings, _sources(type(self))]
        return hashlib.sha256(atomic.to_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _sources(cls: type) -> list[str]:
    """Digests of the files that define a class: who edits these must not train on what they made before."""
    digests = []
    for base in cls.__mro__:
        try:
            path = inspect.getsourcefile(base)
        except TypeError:  # built in
            continue
        if path is not None and Path(path).is_file():
            digests.append(atomic.sha256(Path(path)))
    return digests
