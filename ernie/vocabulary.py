"""Vocabularies: the files `vocab.txt` as BERT and ERNIE write them, and the special tokens.

Two forms are in use, BERT's with one token a line, whose id is the line's number from 0, and ERNIE's
with `token<TAB>id`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propeller.atomic import write_text
from propeller.errors import ConfigError, DataError

log = logging.getLogger("ernie")

# What no line of a vocabulary file can hold.
_BREAKING = frozenset("\t\r\n")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """How a vocabulary writes the tokens that mean something to the model.

    Args:
        pad: fills a batch's shorter rows.
        unk: stands for every word that the vocabulary cannot spell.
        cls: begins every input.
        sep: ends each text of an input.
        mask: hides a token in pretraining; the only one that a vocabulary may lack.
    """

    pad: str = "[PAD]"
    unk: str = "[UNK]"
    cls: str = "[CLS]"
    sep: str = "[SEP]"
    mask: str = "[MASK]"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SpecialTokens:
        """Reads `pad_token`, `unk_token`, ... of a Hugging Face `tokenizer_config.json`."""
        found: dict[str, str] = {}
        for field in dataclasses.fields(cls):
            token = config.get(f"{field.name}_token")
            if isinstance(token, Mapping):
                token = token.get("content")
            if token is not None:
                found[field.name] = str(token)
        return cls(**found)

    def to_config(self) -> dict[str, str]:
        """The keys that `from_config` reads."""
        return {f"{name}_token": token for name, token in dataclasses.asdict(self).items()}

    def names(self) -> tuple[str, ...]:
        """All five, in the order of the fields."""
        return dataclasses.astuple(self)


def read_vocab(path: str | Path) -> dict[str, int]:
    """Reads a `vocab.txt` of either form.

    An ordinary token that stands twice keeps its later id, as in the loaders of BERT, Transformers and
    PaddleNLP: ERNIE 3.0's own file has `$` twice. Ids may come in any order and leave gaps.

    Returns:
        Token -> id, in the order of the file.

    Raises:
        ConfigError: the file cannot be opened.
        DataError: the file is empty or not UTF-8, or a line is empty, mixes the two forms, has an id
            that is no number, or repeats an id or a token in brackets such as `[SEP]`.
    """
    lines = _lines(Path(path))
    with_ids = "\t" in lines[0]
    vocab: dict[str, int] = {}
    line_of_id: dict[int, int] = {}
    repeated: list[str] = []
    for number, line in enumerate(lines, 1):
        token, index = _split(line, number, with_ids, path)
        if index in line_of_id:
            raise DataError(
                f"id {index} of {token!r} is already taken in line {line_of_id[index]}; "
                "every token needs an id of its own.",
                path=path,
                line=number,
            )
        line_of_id[index] = number
        if token in vocab:
            if token.startswith("[") and token.endswith("]"):
                raise DataError(
                    f"special token {token!r} stands already in line {line_of_id[vocab[token]]}; "
                    "remove the one that the model was not trained with.",
                    path=path,
                    line=number,
                )
            repeated.append(token)
        vocab[token] = index
    if repeated:
        log.warning("%s has %d tokens twice, the later counts: %s", path, len(repeated), repeated[:5])
    return vocab


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Vocabulary {path} cannot be read ({error.strerror}). Name an existing vocab.txt."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 ({error.reason}). A vocabulary is a UTF-8 text file with one token a line.",
            path=path,
            line=data.count(b"\n", 0, error.start) + 1,
        ) from error
    # Only "\n" ends a line: BERT's Chinese vocabulary has U+2028 for a token, others U+0085.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError("the vocabulary is empty; expected one token a line.", path=path)
    return lines


def _split(line: str, number: int, with_ids: bool, path: str | Path) -> tuple[str, int]:
    """Token and id of a line, counted from 1."""
    token, *ids = line.split("\t")
    if not token:
        raise DataError("empty line or token; expected a token.", path=path, line=number)
    if not with_ids:
        if ids:
            raise DataError(f"tab in {line!r}, but the first line has no id.", path=path, line=number)
        return token, number - 1
    if len(ids) != 1 or not (ids[0].isascii() and ids[0].strip().isdigit()):
        raise DataError(
            f"expected token<TAB>id with a whole number, as in the first line, found {line!r}.",
            path=path,
            line=number,
        )
    return token, int(ids[0])


def check_vocab(vocab: Mapping[str, int], special: SpecialTokens, source: str) -> None:
    """Checks that a tokenizer can work with `vocab` and that `write_vocab` can write it.

    Args:
        source: where the vocabulary comes from, for the message.

    Raises:
        ConfigError: a special token other than the mask is missing, an id is no whole number or is
            shared, or a token is empty or holds a tab or line end.
    """
    missing = [token for token in special.names() if token not in vocab and token != special.mask]
    if missing:
        raise ConfigError(
            f"{source} has no {', '.join(missing)} among its {len(vocab)} tokens. Take the vocabulary that "
            "belongs to the model; a tokenizer_config.json beside it may name other special tokens."
        )
    wrong = [token for token, index in vocab.items() if type(index) is not int or index < 0]
    if wrong:
        raise ConfigError(f"{source} has ids that are no whole numbers from 0 on, those of {wrong[:5]}.")
    if len(set(vocab.values())) != len(vocab):
        raise ConfigError(f"{source} gives one id to several tokens; every token needs an id of its own.")
    wrong = [token for token in vocab if not token or not _BREAKING.isdisjoint(token)]
    if wrong:
        raise ConfigError(f"{source} has tokens that are empty or hold a tab or line end: {wrong[:5]}.")


def write_vocab(path: Path, vocab: Mapping[str, int]) -> None:
    """Writes `vocab` by ascending id: BERT's form if its ids leave no gap, else ERNIE's."""
    ordered = sorted(vocab.items(), key=lambda item: item[1])
    if [index for _, index in ordered] == list(range(len(ordered))):
        lines = [token for token, _ in ordered]
    else:
        lines = [f"{token}\t{index}" for token, index in ordered]
    write_text(path, "".join(f"{line}\n" for line in lines))
