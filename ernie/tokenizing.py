"""Tokenizers: texts to model inputs and back. No Paddle here: clients that tokenise install without it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.encoding import Encoding, Tokenizer
from ernie.vocabulary import SpecialTokens, read_vocab
from ernie.wordpiece import WordPieceTokenizer
from propeller.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ernie.subword import SentencePieceTokenizer

__all__ = [
    "Encoding",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "Tokenizer",
    "WordPieceTokenizer",
    "library_versions",
    "load_tokenizer",
    "read_vocab",
]

log = logging.getLogger("ernie")

# ERNIE-tiny's files: as saved here, in PaddleNLP's folders, in the official download.
_MODEL_NAMES = ("sentencepiece.model", "spm_cased_simp_sampled.model", "subword/spm_cased_simp_sampled.model")
_WORDS_NAMES = ("word_dict.json", "dict.wordseg.pickle", "subword/dict.wordseg.pickle")


def __getattr__(name: str) -> Any:
    if name == "SentencePieceTokenizer":  # only who uses it needs its library
        from ernie.subword import SentencePieceTokenizer

        return SentencePieceTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that tokenizers are made with, by name, of those that are installed.

    With `Tokenizer.fingerprint`, which holds none, they tell whether ids that were stored are still true.
    """
    versions = {}
    for name in ("tokenizers", "sentencepiece"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def load_tokenizer(
    folder: str | Path | None,
    *,
    vocab_file: str | Path | None = None,
    do_lower_case: bool | None = None,
    sentence_piece_model: str | Path | None = None,
    word_dict: str | Path | None = None,
) -> Tokenizer:
    """Makes the tokenizer of a model folder, of separate files, or of both.

    A folder is what `Tokenizer.save` wrote, or an ERNIE or Hugging Face BERT/ERNIE folder as it is:
    `vocab.txt` or `tokenizer.json`, with `tokenizer_config.json` and the like where they exist. It is
    ERNIE-tiny's if a SentencePiece model is in it or given.

    Args:
        folder: the model's folder; None if the files are given one by one.
        vocab_file: in place of the folder's vocabulary.
        do_lower_case: what holds if the folder does not say; None means true. What the folder says wins,
            since its model was trained so.
        sentence_piece_model: in place of the folder's.
        word_dict: in place of the folder's.

    Raises:
        ConfigError: the folder or a file does not exist, there is no vocabulary, or it is of another kind
            of tokenizer.
        DataError: a file's content is wrong.
        CheckpointError: a pickled word dictionary names anything but plain containers.
    """
    root = None if folder is None else Path(folder)
    if root is not None and not root.is_dir():
        raise ConfigError(f"Model folder {root} does not exist or is no folder.")
    model = sentence_piece_model or _first(root, _MODEL_NAMES)
    words = word_dict or _first(root, _WORDS_NAMES)
    config = {} if root is None else _folder_config(root, word_piece=model is None)
    if model is None and word_dict is not None:
        raise ConfigError("A word dictionary is of no use without a SentencePiece model; give that too.")
    vocab = vocab_file or _first(root, ("vocab.txt",)) or config.get("vocab")
    lower = _lower_case(config, do_lower_case, root)
    if model is not None:
        from ernie.subword import SentencePieceTokenizer

        special = SpecialTokens.from_config(config) if "cls_token" in config else None
        return SentencePieceTokenizer(model, vocab, words, lower, special=special)
    if vocab is None:
        raise ConfigError(f"No vocab.txt or tokenizer.json in {root or 'a folder'}; give a vocab_file.")
    return WordPieceTokenizer(
        vocab,
        lower,
        strip_accents=config.get("strip_accents"),
        tokenize_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        special=SpecialTokens.from_config(config),
        added_tokens=config.get("added_tokens"),
    )


def _lower_case(config: Mapping[str, Any], flag: bool | None, root: Path | None) -> bool:
    of_folder: bool | None = config.get("do_lower_case")
    if of_folder is None:
        return True if flag is None else flag
    if flag is not None and flag != of_folder:
        log.warning("do_lower_case is %s, as %s says; the flag says otherwise", of_folder, root)
    return of_folder


def _first(root: Path | None, names: tuple[str, ...]) -> Path | None:
    if root is None:
        return None
    return next((root / name for name in names if (root / name).is_file()), None)


def _folder_config(root: Path, word_piece: bool) -> dict[str, Any]:
    """The settings that the folder's files state, under the names of `tokenizer_config.json`.

    `added_tokens` is token -> id for those beyond the vocabulary; `vocab` is there if only
    `tokenizer.json` holds one.
    """
    try:
        config = _json(root / "special_tokens_map.json") | _json(root / "tokenizer_config.json")
        decoder = config.get("added_tokens_decoder") or {}
        added = {token["content"]: int(index) for index, token in decoder.items()}
        added |= _json(root / "added_tokens.json")
        if word_piece and not (root / "vocab.txt").is_file():
            whole = _json(root / "tokenizer.json")
            config = _whole_config(whole, root) | config
            added |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"tokenizer files unlike those of Transformers ({error!r}).", path=root) from error
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(config.get(name), bool | None):
            raise ConfigError(f"{root}: {name} is {config[name]!r}; expected true, false or null.")
    config["added_tokens"] = added
    return config


def _whole_config(whole: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What `tokenizer.json`, in which Transformers 5 keeps everything, says; empty if there is none."""
    if not whole:
        return {}
    model = whole.get("model") or {}
    normalizer = whole.get("normalizer") or {}
    if model.get("type") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
        raise ConfigError(
            f"{root / 'tokenizer.json'} is a {model.get('type')} tokenizer; expected BERT's WordPiece. "
            "Give the files of the tokenizer that this model was trained with."
        )
    return {
        "vocab": model["vocab"],
        "unk_token": model["unk_token"],
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON ({error}).", path=path) from error
    if not isinstance(content, dict):
        raise DataError(f"holds a {type(content).__name__}; expected an object.", path=path)
    return content
