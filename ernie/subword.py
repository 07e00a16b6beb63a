"""ERNIE-tiny's tokenizer: a cut into words by a dictionary, then SentencePiece.

The original (`WSSPTokenizer` in PaddlePaddle/ERNIE, `ErnieTinyTokenizer` in PaddleNLP) takes at each place
the longest word of at most 5 characters that its dictionary holds, else one character; drops blanks,
lower-cases, joins the words by blanks and hands that to SentencePiece; and looks the pieces up in
`vocab.txt`. Here the offsets are carried along to the original text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from ernie.convert.unpickle import PLAIN_TYPES, safe_load
from ernie.encoding import Pieces, Tokenizer
from ernie.vocabulary import SpecialTokens, read_vocab, write_vocab
from propeller.atomic import new_file, to_json, write_text
from propeller.errors import ConfigError, DataError

MODEL_NAME = "sentencepiece.model"
WORDS_NAME = "word_dict.json"
_LONGEST_WORD = 5


def read_word_dict(path: str | Path) -> frozenset[str]:
    """Reads the words of a segmentation dictionary.

    Args:
        path: the official `dict.wordseg.pickle` (or another pickle of a dict, list, tuple or set of
            strings), or such a thing as `.json`. The values of a dict play no part in the cut.

    Raises:
        ConfigError: the file cannot be opened.
        CheckpointError: it is a pickle that names anything but plain containers, or is damaged.
        DataError: it holds something else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = json.load(file) if path.suffix == ".json" else safe_load(file, PLAIN_TYPES)
    except OSError as error:
        raise ConfigError(f"Word dictionary {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"not JSON ({error}); expected a list of words.", path=path) from error
    if not isinstance(content, dict | list | tuple | set | frozenset):
        raise DataError(f"holds a {type(content).__name__}; expected a collection of words.", path=path)
    wrong = next((word for word in content if not isinstance(word, str)), None)
    if wrong is not None:
        raise DataError(f"holds {wrong!r:.80} where words were expected.", path=path)
    return frozenset(content)


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece, after a cut into words if there is a dictionary for it.

    Args:
        model_file: a SentencePiece model, or its bytes.
        vocab_file: a `vocab.txt` (or token -> id) that numbers the pieces, as ERNIE-tiny's does; None
            means the model's own ids.
        word_dict: a file for `read_word_dict`, or the words.
        do_lower_case: whether text is lower-cased (after the cut, as in the original).
        special: how the vocabulary writes the special tokens; None means BERT's names, and for those
            that a model without `vocab_file` lacks, its own padding, unknown, begin and end pieces.

    Raises:
        ConfigError: a file cannot be opened, is no SentencePiece model, or lacks a special token.
        CheckpointError: a pickled `word_dict` names anything but plain containers.
        DataError: a line of `vocab_file` or the content of `word_dict` is wrong.
    """

    def __init__(
        self,
        model_file: str | Path | bytes,
        vocab_file: str | Path | Mapping[str, int] | None = None,
        word_dict: str | Path | Iterable[str] | None = None,
        do_lower_case: bool = True,
        *,
        special: SpecialTokens | None = None,
    ):
        self._model = _load_model(model_file)
        source = "The vocabulary"
        if vocab_file is None:
            source = "The SentencePiece model (no vocabulary was given)"
            pieces = self._model.id_to_piece(list(range(self._model.get_piece_size())))
            vocab: Mapping[str, int] = {piece: index for index, piece in enumerate(pieces)}
            special = special or _own_special(self._model, vocab)
        elif isinstance(vocab_file, Mapping):
            vocab = vocab_file
        else:
            vocab, source = read_vocab(vocab_file), str(vocab_file)
        super().__init__(vocab, special or SpecialTokens(), source)
        self.do_lower_case = do_lower_case
        self._own_ids = vocab_file is None
        if isinstance(word_dict, str | Path):
            word_dict = read_word_dict(word_dict)
        self._words = None if word_dict is None else frozenset(word_dict)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        with new_file(folder / MODEL_NAME) as temporary:
            temporary.write_bytes(self._model.serialized_model_proto())
        if not self._own_ids:
            write_vocab(folder / "vocab.txt", self._vocab)
        if self._words is not None:
            write_text(folder / WORDS_NAME, to_json(sorted(self._words)) + "\n")
        config = {
            "tokenizer_class": "SentencePieceTokenizer",
            "do_lower_case": self.do_lower_case,
            **self._special.to_config(),
        }
        write_text(folder / "tokenizer_config.json", to_json(config, indent=2) + "\n")

    def _settings(self) -> dict[str, Any]:
        settings = {"do_lower_case": self.do_lower_case, "own_ids": self._own_ids}
        return settings | self._special.to_config() | self._hashes

    @cached_property
    def _hashes(self) -> dict[str, str]:
        words = None if self._words is None else sorted(self._words)
        return {
            "model": hashlib.sha256(self._model.serialized_model_proto()).hexdigest(),
            "words": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
        }

    def _pieces(self, texts: list[str]) -> Pieces:
        prepared = [self._prepare(text) for text in texts]
        # One thread: more gain little on sentences, and would compete with the trainer's.
        found = self._model.encode(
            [text for text, _ in prepared], return_type="offset_mapping", num_threads=1
        )
        ids: list[int] = []
        offsets: list[int] = []
        splits = [0]
        for row, (text, places) in zip(found, prepared, strict=True):
            ids += row["ids"] if self._own_ids else self.convert_tokens_to_ids(row["pieces"])
            offsets += _trace(row["offsets"], text, places)
            splits.append(len(ids))
        return Pieces(
            np.array(ids, dtype=np.int64),
            np.array(offsets, dtype=np.int32).reshape(-1, 2),
            np.array(splits, dtype=np.int64),
        )

    def _prepare(self, text: str) -> tuple[str, list[int]]:
        """What SentencePiece gets, and the place in `text` of each of its characters."""
        spans = [(0, len(text))] if self._words is None else self._cut(text)
        words: list[str] = []
        places: list[int] = []
        for start, stop in spans:
            if words:
                places.append(start)  # of the blank between
            word = text[start:stop].lower() if self.do_lower_case else text[start:stop]
            words.append(word)
            if len(word) == stop - start:
                places.extend(range(start, stop))
            else:  # "İ" becomes two characters
                places.extend(place for place in range(start, stop) for _ in text[place].lower())
        return " ".join(words), places

    def _cut(self, text: str) -> list[tuple[int, int]]:
        """Begin and end of each word but blanks."""
        words = self._words or ()
        spans = []
        start = 0
        while start < len(text):
            stop = min(start + _LONGEST_WORD, len(text))
            while stop > start + 1 and text[start:stop] not in words:
                stop -= 1
            if text[start:stop] != " ":
                spans.append((start, stop))
            start = stop
        return spans


def _trace(offsets: list[tuple[int, int]], text: str, places: list[int]) -> list[int]:
    """Turns offsets into `text` into begin, end, begin, ... in the original, blanks at both ends cut off."""
    traced: list[int] = []
    for start, stop in offsets:
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and text[stop - 1].isspace():
            stop -= 1
        if start < stop:
            traced += places[start], places[stop - 1] + 1
        else:
            place = places[start] if start < len(places) else places[-1] + 1
            traced += place, place
    return traced


def _load_model(model_file: str | Path | bytes) -> sentencepiece.SentencePieceProcessor:
    if isinstance(model_file, bytes):
        return sentencepiece.SentencePieceProcessor(model_proto=model_file)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=os.fspath(model_file))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{model_file} is no readable SentencePiece model ({error}).") from error


def _own_special(model: sentencepiece.SentencePieceProcessor, vocab: Mapping[str, int]) -> SpecialTokens:
    """BERT's names where the model has such pieces, else its own special pieces."""
    own = {"pad": model.pad_id(), "unk": model.unk_id(), "cls": model.bos_id(), "sep": model.eos_id()}
    names = {
        name: model.id_to_piece(index)
        for name, index in own.items()
        if index >= 0 and getattr(SpecialTokens, name) not in vocab
    }
    return SpecialTokens(**names)
