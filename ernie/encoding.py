"""From texts to model inputs: what every tokenizer of this package shares.

A tokenizer turns texts into pieces; here pieces become `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, cut to
a length. All rows of a batch are built at once, in a few numpy operations.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ernie.vocabulary import SpecialTokens, check_vocab
from propeller.errors import ConfigError, DataError

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One model input of S tokens. The arrays are views into those of its batch.

    Attributes:
        input_ids: int64 `[S]`.
        token_type_ids: int64 `[S]`; 0 up to the first `[SEP]`, 1 after it.
        offsets: int32 `[S, 2]`; where each token begins and ends, in characters of the text (or unit)
            that it comes from; (0, 0) for special tokens.
        num_tokens: tokens before truncation, special ones included.
        words: int32 `[S]`; for input in units the unit of each token, -1 for special tokens; else None.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    num_tokens: int
    words: np.ndarray | None = None


class Pieces(NamedTuple):
    """The tokens of several texts, without special ones, in one row.

    Attributes:
        ids: int64 `[T]`.
        offsets: int32 `[T, 2]`, in characters of the text that the token belongs to.
        splits: int64 `[texts + 1]`; text i owns tokens `splits[i]` to `splits[i + 1]`.
    """

    ids: np.ndarray
    offsets: np.ndarray
    splits: np.ndarray


class Tokenizer(abc.ABC):
    """Texts to ids of a vocabulary, and back.

    Safe to use from several threads, and after a fork. A lone surrogate, which no UTF-8 text can hold,
    counts as U+FFFD, so that offsets stay true.

    Args:
        vocab: token -> id.
        special: how `vocab` writes the special tokens.
        source: where `vocab` comes from, for messages.
    """

    def __init__(self, vocab: Mapping[str, int], special: SpecialTokens, source: str):
        check_vocab(vocab, special, source)
        self._vocab = dict(vocab)
        self._tokens = {index: token for token, index in self._vocab.items()}
        self._special = special

    @property
    def vocab(self) -> Mapping[str, int]:
        """Token -> id, read-only."""
        return MappingProxyType(self._vocab)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that a word table needs: the highest id + 1."""
        return max(self._tokens) + 1

    @property
    def pad_token_id(self) -> int:
        """Id that fills up a batch."""
        return self._vocab[self._special.pad]

    @property
    def pad_token_type_id(self) -> int:
        """Sentence type that fills up a batch."""
        return 0

    @property
    def unk_token_id(self) -> int:
        """Id of what the vocabulary does not know."""
        return self._vocab[self._special.unk]

    @property
    def cls_token_id(self) -> int:
        """Id that begins an input."""
        return self._vocab[self._special.cls]

    @property
    def sep_token_id(self) -> int:
        """Id that ends a text."""
        return self._vocab[self._special.sep]

    @property
    def mask_token_id(self) -> int:
        """Id that hides a token.

        Raises:
            ConfigError: the vocabulary has none.
        """
        try:
            return self._vocab[self._special.mask]
        except KeyError:
            raise ConfigError(
                f"The vocabulary has no {self._special.mask}, which masked-word prediction needs."
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 over vocabulary and settings: equal ones tokenise alike."""
        parts = [sorted(self._vocab.items(), key=lambda item: item[1]), self._settings()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokenize(self, text: str) -> list[str]:
        """Tokens of `text`, without special ones, uncut."""
        return self.convert_ids_to_tokens(self._pieces(_checked([text])).ids.tolist())

    def pieces(self, texts: Sequence[str]) -> Pieces:
        """Tokens of several texts, without special ones, uncut.

        Raises:
            DataError: an item is no string.
        """
        return self._pieces(_checked(texts))

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        max_seq_len: int | None = None,
        pad_to_max_seq_len: bool = False,
        return_dict: bool = False,
    ) -> dict[str, list[Any]] | list[dict[str, list[int]]]:
        """Makes model inputs by the call that users of PaddleNLP know; see `encode_batch`.

        Args:
            text, text_pair: one text each, or a list each.
            max_seq_len: what `encode_batch` calls `max_seqlen`.
            pad_to_max_seq_len: fill shorter inputs up to `max_seq_len`.
            return_dict: of a list of texts, give lists by name.

        Returns:
            `{"input_ids": [...], "token_type_ids": [...]}`; of a list of texts one for each.

        Raises:
            ConfigError: inputs are to be filled up, but not to which length; or see `encode_batch`.
            DataError: see `encode_batch`.

        Source: the guides of PaddleNLP 2.
        """
        if pad_to_max_seq_len and max_seq_len is None:
            raise ConfigError("pad_to_max_seq_len is set, but max_seq_len is not; expected both.")
        is_one = isinstance(text, str)
        texts: Any = [text] if is_one else text
        pairs: Any = [text_pair] if is_one and text_pair is not None else text_pair
        rows = []
        for encoding in self.encode_batch(texts, pairs, max_seqlen=max_seq_len):
            fill = (max_seq_len or 0) - len(encoding.input_ids) if pad_to_max_seq_len else 0
            ids, types = encoding.input_ids.tolist(), encoding.token_type_ids.tolist()
            rows.append({"input_ids": ids + [self.pad_token_id] * fill, "token_type_ids": types + [0] * fill})
        if is_one:
            return rows[0]
        if return_dict:
            return {name: [row[name] for row in rows] for name in ("input_ids", "token_type_ids")}
        return rows

    def encode(self, text: str, pair: str | None = None, *, max_seqlen: int | None = None) -> Encoding:
        """Makes the model input of one text or pair; see `encode_batch`."""
        return self.encode_batch([text], None if pair is None else [pair], max_seqlen=max_seqlen)[0]

    def encode_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_seqlen: int | None = None
    ) -> list[Encoding]:
        """Makes one model input for each text: `[CLS] a [SEP]`, or with `pairs` `[CLS] a [SEP] b [SEP]`.

        Args:
            texts: the first (or only) texts.
            pairs: the second texts, one for each of `texts`.
            max_seqlen: tokens of an input at most, special ones included; None cuts nothing. Of a pair
                the longer text loses its last token until both fit, the second if they are equal.

        Raises:
            ConfigError: `max_seqlen` leaves no room for the special tokens, or the two lists differ in
                length.
            DataError: an item is no string.

        Source: `_truncate_seq_pair` of google-research/bert; Transformers' `longest_first`.
        """
        texts = _checked(texts)
        parts = [self._pieces(texts)]
        if pairs is not None:
            pairs = _checked(pairs)
            if len(pairs) != len(texts):
                raise ConfigError(f"{len(texts)} texts came with {len(pairs)} pairs; expected one for each.")
            parts.append(self._pieces(pairs))
        kept, num_tokens = _kept(parts, max_seqlen)
        return self._assemble(parts, kept, num_tokens)

    def encode_units(self, units: Sequence[str], max_seqlen: int | None = None) -> Encoding:
        """Makes the model input of one text that is already split into units; see `encode_units_batch`."""
        return self.encode_units_batch([units], max_seqlen)[0]

    def encode_units_batch(
        self, texts: Sequence[Sequence[str]], max_seqlen: int | None = None
    ) -> list[Encoding]:
        """Makes the model inputs of texts that are already split into units (words, characters).

        Each unit is tokenised by itself. One that the tokenizer drops, a blank or control character,
        has no token: its index is missing from `words`. Offsets count within the unit.

        Args:
            texts: the units of each text in order.
            max_seqlen: as for `encode_batch`.

        Raises:
            ConfigError: `max_seqlen` leaves no room for the special tokens, or a text is one string.
            DataError: a unit is no string.
        """
        if any(isinstance(units, str) for units in texts):
            raise ConfigError("One string came where the list of a text's units was expected.")
        pieces = self._pieces(_checked([unit for units in texts for unit in units]))
        num_units = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        ends = np.concatenate([[0], np.cumsum(num_units)])
        words = np.repeat(spans(np.zeros_like(num_units), num_units), np.diff(pieces.splits))
        whole = pieces._replace(splits=pieces.splits[ends])
        kept, num_tokens = _kept([whole], max_seqlen)
        lengths = kept[0] + 2  # with [CLS] and [SEP]
        framed = np.full(int(lengths.sum()), -1, dtype=np.int32)
        begins = np.cumsum(lengths) - lengths
        framed[spans(begins + 1, kept[0])] = words[spans(whole.splits[:-1], kept[0])]
        encodings = self._assemble([whole], kept, num_tokens)
        return [
            dataclasses.replace(encoding, words=framed[begin : begin + length])
            for encoding, begin, length in zip(encodings, begins.tolist(), lengths.tolist(), strict=True)
        ]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """Ids of `tokens`; the unknown token's for those that the vocabulary lacks."""
        unk = self.unk_token_id
        return [self._vocab.get(token, unk) for token in tokens]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Tokens of `ids`; the unknown token for ids that the vocabulary leaves out."""
        unk = self._special.unk
        return [self._tokens.get(int(index), unk) for index in ids]

    @abc.abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes all that `load_tokenizer(folder)` needs; makes the folder if it is not there."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What besides the vocabulary decides the tokens, for the fingerprint; JSON."""

    @abc.abstractmethod
    def _pieces(self, texts: list[str]) -> Pieces:
        """Tokenises texts that hold no lone surrogates."""

    def _assemble(
        self, parts: list[Pieces], kept: list[np.ndarray], num_tokens: np.ndarray
    ) -> list[Encoding]:
        lengths = sum(kept, np.full(len(num_tokens), 1 + len(parts), dtype=np.int64))
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
        types = np.zeros_like(ids)
        offsets = np.zeros((len(ids), 2), dtype=np.int32)
        cursor = ends - lengths
        ids[cursor] = self.cls_token_id
        cursor += 1
        for number, (pieces, counts) in enumerate(zip(parts, kept, strict=True)):
            source = spans(pieces.splits[:-1], counts)
            target = spans(cursor, counts)
            ids[target] = pieces.ids[source]
            types[target] = number
            offsets[target] = pieces.offsets[source]
            cursor += counts
            ids[cursor] = self.sep_token_id
            types[cursor] = number
            cursor += 1
        stops = ends.tolist()
        return [
            Encoding(ids[start:stop], types[start:stop], offsets[start:stop], total)
            for start, stop, total in zip([0, *stops], stops, num_tokens.tolist(), strict=False)
        ]


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions `starts[i] .. starts[i] + counts[i] - 1` for each i, in one row; int64."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def _checked(texts: Sequence[str]) -> list[str]:
    """The texts as a list, without lone surrogates."""
    if isinstance(texts, str):
        raise ConfigError("One string came where a list of strings was expected; put it into a list.")
    texts = list(texts)
    try:
        clean = "".join(texts).isascii()
    except TypeError:
        place = next(place for place, text in enumerate(texts) if not isinstance(text, str))
        raise DataError(f"Text {place} is {texts[place]!r:.80}; expected a string.") from None
    if not clean and any(map(_SURROGATES.search, texts)):
        return [_SURROGATES.sub("\ufffd", text) for text in texts]
    return texts


def _kept(parts: list[Pieces], max_seqlen: int | None) -> tuple[list[np.ndarray], np.ndarray]:
    """How many tokens of each part each row keeps, and the rows' lengths before that."""
    lengths = [np.diff(pieces.splits) for pieces in parts]
    num_special = 1 + len(parts)
    total: np.ndarray = sum(lengths, np.zeros_like(lengths[0]))
    if max_seqlen is None:
        return lengths, total + num_special
    room = max_seqlen - num_special
    if room < 0:
        raise ConfigError(
            f"max_seqlen {max_seqlen} leaves no room for the {num_special} special tokens of "
            f"{'a pair' if len(parts) > 1 else 'a text'}; expected {num_special} or more."
        )
    if len(parts) == 1:
        return [np.minimum(lengths[0], room)], total + num_special
    # What popping one token at a time off the longer (off the second if equal) ends with.
    first = np.minimum(lengths[0], np.maximum(room - lengths[1], (room + 1) // 2))
    return [first, np.minimum(lengths[1], room - first)], total + num_special
