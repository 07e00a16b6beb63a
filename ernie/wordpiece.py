"""WordPiece on the Rust `tokenizers` library, each character and word of a corpus looked up there once.

BERT's tokenisation depends on context only within a word: every character is dropped, parts words, is
a token by itself (Chinese characters, punctuation), or belongs to a word. So what the library does with
a character is remembered in a table over all of Unicode, what it does with a word in a cache, and a
batch is put together from both by numpy. The result, offsets included, is the library's own; for
Chinese text the library alone is 4 to 6 times as fast as pure Python, this is about 10 times faster still.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from ernie.encoding import Pieces, Tokenizer, spans
from ernie.vocabulary import SpecialTokens, read_vocab, write_vocab
from propeller.atomic import to_json, write_text
from propeller.errors import ConfigError

# What the table holds for a character that is no token by itself (else the id of its token).
_SPACE, _DROPPED, _WORD, _UNSEEN = -1, -2, -3, -4
# Characters tokenised at a time: bounds the memory, and the arrays stay in the processor's cache.
_CHUNK_CHARS = 1 << 17
# Characters of all cached words together: some 300,000 words, 60 MB.
_CACHE_CHARS = 1 << 21
# A token of a cached word: id, begin, end.
_TOKEN_BYTES = 3 * np.dtype(np.intc).itemsize
# BERT makes longer words unknown, as published.
_MAX_WORD_CHARS = 100


class WordPieceTokenizer(Tokenizer):
    """The tokenizer of BERT and ERNIE: words and single Chinese characters, as the longest pieces known.

    Control characters go, accents too when text is lower-cased, runs of blanks part words. Special and
    added tokens that stand in a text literally are recognised, as in Transformers.

    Args:
        vocab: a `vocab.txt` of either form, or token -> id.
        do_lower_case: whether text is lower-cased.
        strip_accents: whether accents are removed; None means: if lower-cased.
        tokenize_chinese_chars: whether each Chinese character is a word.
        special: how the vocabulary writes the special tokens.
        added_tokens: tokens, in `vocab` or beyond it, that are found in the text before anything else
            is done to it; token -> id.

    Raises:
        ConfigError: the vocabulary cannot be opened, lacks a special token, or disagrees with the added ones.
        DataError: a line of the file is wrong.

    Source: `FullTokenizer` of google-research/bert, `BertTokenizer` of Transformers. The library's
        Unicode tables decide what is a control character, a mark or punctuation. Transformers' older
        pure-Python tokenizer took those of the Python in use, dropped all that had no place in them
        (new emoji), and composed accents in cased text.
    """

    def __init__(
        self,
        vocab: str | Path | Mapping[str, int],
        do_lower_case: bool = True,
        *,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        special: SpecialTokens | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ):
        special = special or SpecialTokens()
        source = "The vocabulary"
        if isinstance(vocab, str | Path):
            vocab, source = read_vocab(vocab), str(vocab)
        self._added = dict(added_tokens or {})
        self._beyond = self._added.keys() - vocab.keys()
        for token in self._added.keys() - self._beyond:
            if vocab[token] != self._added[token]:
                raise ConfigError(
                    f"{source} gives {token!r} the id {vocab[token]}, the added tokens give it "
                    f"{self._added[token]}. They belong to different models."
                )
        super().__init__({**vocab, **self._added}, special, source)
        self.do_lower_case = do_lower_case
        self.strip_accents = strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self._rust = tokenizers.Tokenizer(
            WordPiece(self._vocab, unk_token=special.unk, max_input_chars_per_word=_MAX_WORD_CHARS)
        )
        self._rust.normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=tokenize_chinese_chars,
            strip_accents=strip_accents,
            lowercase=do_lower_case,
        )
        self._rust.pre_tokenizer = BertPreTokenizer()
        literals = {*special.names(), *self._added} & self._vocab.keys()
        self._literals = sorted(literals, key=lambda token: (-len(token), token))
        self._literal = re.compile("|".join(map(re.escape, self._literals)))
        self._table = np.full(sys.maxunicode + 1, _UNSEEN, dtype=np.int32)
        self._cache: dict[str, bytes] = {}
        self._cache_chars = 0

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        own = {token: index for token, index in self._vocab.items() if token not in self._beyond}
        write_vocab(folder / "vocab.txt", own)
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.do_lower_case,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            **self._special.to_config(),
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True, "normalized": False}
                for token, index in self._added.items()
            },
        }
        write_text(folder / "tokenizer_config.json", to_json(config, indent=2) + "\n")

    def _settings(self) -> dict[str, Any]:
        strip = self.do_lower_case if self.strip_accents is None else self.strip_accents
        return {
            "do_lower_case": self.do_lower_case,
            "strip_accents": strip,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "literals": self._literals,
            **self._special.to_config(),
        }

    def _pieces(self, texts: list[str]) -> Pieces:
        chunks = [self._chunk(chunk) for chunk in _chunks(texts)]
        if len(chunks) == 1:
            return chunks[0]
        before = np.cumsum([0, *(len(chunk.ids) for chunk in chunks)])
        return Pieces(
            np.concatenate([chunk.ids for chunk in chunks]),
            np.concatenate([chunk.offsets for chunk in chunks]),
            np.concatenate([[0], *(c.splits[1:] + start for c, start in zip(chunks, before, strict=False))]),
        )

    def _chunk(self, texts: list[str]) -> Pieces:
        joined = "\n".join(["", *texts, ""])
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        newlines = np.cumsum(lengths + 1)  # those after each text
        codes = self._codes(np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32))
        literals = list(self._literal.finditer(joined))
        for literal in literals:
            codes[literal.start() : literal.end()] = _SPACE
            codes[literal.start()] = self._vocab[literal.group()]

        alone = np.flatnonzero(codes >= 0)
        in_word = codes <= _DROPPED
        edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
        starts, stops = edges[::2], edges[1::2]
        words = [joined[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        found = self._look_up(words)
        counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found)) // _TOKEN_BYTES
        tokens = np.frombuffer(b"".join(found), dtype=np.intc).reshape(-1, 3)

        tokens_at = np.zeros(len(codes), dtype=np.int64)  # how many tokens begin with this character
        tokens_at[alone] = 1
        tokens_at[starts] = counts
        first_at = np.cumsum(tokens_at) - tokens_at
        splits = first_at[np.concatenate([[0], newlines])]
        ids = np.empty(splits[-1], dtype=np.int64)
        offsets = np.empty((len(ids), 2), dtype=np.int32)
        target = first_at[alone]
        ids[target] = codes[alone]
        offsets[target, 0] = alone
        offsets[target, 1] = alone + 1
        target = spans(first_at[starts], counts)
        ids[target] = tokens[:, 0]
        offsets[target] = tokens[:, 1:] + np.repeat(starts, counts)[:, None]
        for literal in literals:
            offsets[first_at[literal.start()], 1] = literal.end()
        begins = newlines - lengths
        offsets -= np.repeat(begins, np.diff(splits)).astype(np.int32)[:, None]
        return Pieces(ids, offsets, splits)

    def _codes(self, points: np.ndarray) -> np.ndarray:
        """The table's entries for code points, which it learns when they are new."""
        codes: np.ndarray = self._table[points]
        unseen = codes == _UNSEEN
        if not unseen.any():
            return codes
        for point in np.unique(points[unseen]).tolist():
            self._table[point] = self._learn(chr(point))
        codes = self._table[points]
        return codes

    def _learn(self, char: str) -> int:
        normalised = self._rust.normalizer.normalize_str(f"a{char}a")
        words = [word for word, _ in self._rust.pre_tokenizer.pre_tokenize_str(normalised)]
        if len(words) == 1:
            return _DROPPED if words == ["aa"] else _WORD
        if len(words) == 2:
            return _SPACE
        # No character of Unicode makes more than one token between two letters.
        return int(self._rust.encode(char, add_special_tokens=False).ids[0])

    def _look_up(self, words: list[str]) -> list[bytes]:
        """The tokens of each word: int32 id, begin and end (within the word) of one after the other.

        Needs no lock, which a fork could copy while it is held: an entry is the same whoever makes it,
        and a full cache is replaced, not emptied.
        """
        cache = self._cache
        missing = [word for word in dict.fromkeys(words) if word not in cache]
        if missing:
            if self._cache_chars > _CACHE_CHARS:
                self._cache = cache = {word: cache[word] for word in words if word in cache}
                self._cache_chars = sum(map(len, cache))
            self._cache_chars += sum(map(len, missing))
            for word, encoding in zip(missing, self._encode(missing), strict=True):
                tokens = zip(encoding.ids, encoding.offsets, strict=True)
                cache[word] = array(
                    "i", [number for index, ends in tokens for number in (index, *ends)]
                ).tobytes()
        return [cache[word] for word in words]

    def _encode(self, words: list[str]) -> list[tokenizers.Encoding]:
        if max(map(len, words)) > 1000:
            # A batch lets go of the GIL, which a very long "word" would hold for long.
            return self._rust.encode_batch(words, add_special_tokens=False)
        # One at a time: a batch would start the library's thread pool, which gains nothing here and
        # does not go well with a later fork.
        return [self._rust.encode(word, add_special_tokens=False) for word in words]


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    """The texts in lists of at most about `_CHUNK_CHARS` characters; at least one list."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    yield chunk
