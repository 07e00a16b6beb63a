"""Columns: how one cell of a table becomes a value."""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError, did_you_mean

_LABELS_SHOWN = 20


class Column(abc.ABC):
    """A named column.

    Args:
        name: the name of its values in an example.
        aliases: names under which a header may hold it as well; the earlier wins.
        optional: whether files may lack it. An example of such a file has no value of this name.
    """

    def __init__(self, name: str, *, aliases: Sequence[str] = (), optional: bool = False):
        if name == "_":
            raise ConfigError("a column is named '_', which stands for a cell to skip; use another name")
        self.name = name
        self.aliases = tuple(aliases)
        self.optional = optional

    @abc.abstractmethod
    def convert(self, text: str) -> Any:
        """Returns the value of a cell.

        Raises:
            DataError: the cell holds no value of this column. It need not name the place.
        """

    @abc.abstractmethod
    def signature(self) -> str | None:
        """Returns what the values depend on besides the text, or None if that cannot be told.

        Two columns of one signature give the same values, in this process and in another; caches of what
        they made rely on it.
        """


class RawColumn(Column):
    """The text of the cell, as str."""

    def convert(self, text: str) -> str:
        return text

    def signature(self) -> str | None:
        return "RawColumn"


class TextColumn(Column):
    """Text as ids of its tokens, int64 [num_tokens].

    Args:
        name: see `Column`.
        tokenizer: text to tokens. A cache of what it made is used again only if its settings can be told: it
            is a function of a module, or has an attribute `fingerprint`, a str that stands for them.
        vocab: token to id.
        unk_id: id of the tokens that are not in `vocab`.
        aliases: see `Column`.
        optional: see `Column`.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Callable[[str], Iterable[str]],
        vocab: Mapping[str, int],
        *,
        unk_id: int,
        aliases: Sequence[str] = (),
        optional: bool = False,
    ):
        super().__init__(name, aliases=aliases, optional=optional)
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._unk_id = unk_id

    def convert(self, text: str) -> npt.NDArray[np.int64]:
        get, unk_id = self._vocab.get, self._unk_id
        tokens = self._tokenizer(text)
        if isinstance(tokens, (str, Mapping)):  # whose characters or keys would pass for tokens
            raise ConfigError(
                f"the tokenizer of column {self.name!r} gave a {type(tokens).__name__}; expected a list of "
                "tokens, as the method `tokenize` of a tokenizer gives"
            )
        return np.array([get(token, unk_id) for token in tokens], np.int64)

    def signature(self) -> str | None:
        tokenizer = fingerprint(self._tokenizer)
        if tokenizer is None:
            return None
        return f"TextColumn {tokenizer} {_digest(dict(self._vocab))} {self._unk_id}"


class TextIDColumn(Column):
    """Integers with spaces between them, int64 [num_ids]."""

    def convert(self, text: str) -> npt.NDArray[np.int64]:
        try:
            return np.array([int(number) for number in text.split()], np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"column {self.name!r}: expected integers and spaces, found {text!r:.80}"
            ) from error

    def signature(self) -> str | None:
        return "TextIDColumn"


class LabelColumn(Column):
    """A label: the id of a class, or a number.

    Args:
        name: see `Column`.
        vocab: label to id, or the labels in the order of their ids; None: the cell is a number itself.
        dtype: `int64`, or `float32` for a regression; a `vocab` gives int64.
        aliases: see `Column`.
        optional: see `Column`.

    Raises:
        ConfigError: another dtype, or a `vocab` with float32.
    """

    def __init__(
        self,
        name: str,
        vocab: Mapping[str, int] | Sequence[str] | None = None,
        *,
        dtype: str = "int64",
        aliases: Sequence[str] = (),
        optional: bool = False,
    ):
        super().__init__(name, aliases=aliases, optional=optional)
        if dtype not in ("int64", "float32"):
            raise ConfigError(f"LabelColumn {name!r} got dtype {dtype!r}; expected 'int64' or 'float32'")
        if vocab is not None and dtype != "int64":
            raise ConfigError(
                f"LabelColumn {name!r} got a vocab and dtype {dtype!r}; ids of a vocab are int64"
            )
        if vocab is not None and not isinstance(vocab, Mapping):
            vocab = {label: index for index, label in enumerate(vocab)}
        self._vocab = None if vocab is None else dict(vocab)
        self._dtype = dtype

    def convert(self, text: str) -> Any:
        label = text.strip()
        if self._vocab is not None:
            if label not in self._vocab:
                raise DataError(f"column {self.name!r}: unknown label {label!r:.80}; {self._known(label)}")
            return np.int64(self._vocab[label])
        try:
            if self._dtype == "int64":
                return np.int64(int(label))
            number = float(label)
        except (ValueError, OverflowError) as error:
            kind = "an integer" if self._dtype == "int64" else "a number"
            raise DataError(f"column {self.name!r}: expected {kind}, found {text!r:.80}") from error
        if not math.isfinite(number):
            raise DataError(f"column {self.name!r}: expected a finite number, found {text!r:.80}")
        return np.float32(number)

    def signature(self) -> str | None:
        return f"LabelColumn {self._dtype} {_digest(self._vocab)}"

    def _known(self, label: str) -> str:
        labels = list(self._vocab or ())
        more = f" and {len(labels) - _LABELS_SHOWN} more" if len(labels) > _LABELS_SHOWN else ""
        return f"known are {', '.join(map(repr, labels[:_LABELS_SHOWN]))}{more}.{did_you_mean(label, labels)}"


def fingerprint(func: Callable[..., Any]) -> str | None:
    """Returns a text that is equal for functions that do the same in all processes, or None.

    That is its attribute `fingerprint`, else the name of a module's function. A method, a closure or a
    callable object depends on more than its name, so it needs the attribute.
    """
    given = getattr(func, "fingerprint", None)
    if isinstance(given, str):
        return given
    name = getattr(func, "__qualname__", None)
    if not isinstance(name, str) or "<" in name or getattr(func, "__self__", None) is not None:
        return None
    return f"{func.__module__}.{name}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=int).encode()).hexdigest()
