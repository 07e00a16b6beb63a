"""Units looked up in a SentencePiece vocabulary, without SentencePiece's own segmentation."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ernie.tokenizing import SpecialTokens, Tokenizer, WordPieceTokenizer
from propeller.errors import ConfigError

# SentencePiece's mark of a piece that begins a word.
_BEGIN = "\u2581"
# Characters that are words by themselves in any case: Chinese ones, and punctuation of all kinds.
_WORD = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\\w\\s]")


def over_sentence_pieces(tokenizer: Tokenizer) -> WordPieceTokenizer:
    """Makes a tokenizer that looks words up in a SentencePiece vocabulary.

    Each word is the longest pieces known from its beginning on: first one that begins a word (`\u2581`), then
    those without that mark. A Chinese character, or a punctuation mark, is a word; of these a piece without
    the mark does as well.

    Args:
        tokenizer: has the vocabulary, ERNIE-tiny's for example; what it does with a text plays no part.

    Raises:
        ConfigError: no piece of the vocabulary begins a word.

    Source: `CharTokenizer(vocab, sentencepiece_style_vocab=True)` of PaddlePaddle/ERNIE, which knows a
        Chinese character only with the mark.
    """
    known = tokenizer.convert_ids_to_tokens(
        [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    )
    special = SpecialTokens(*known)
    return WordPieceTokenizer(_as_word_pieces(tokenizer.vocab, special), special=special)


def _as_word_pieces(vocab: Mapping[str, int], special: SpecialTokens) -> dict[str, int]:
    """The same ids with WordPiece's marks: it marks the pieces that do not begin a word, by `##`."""
    begins = {token[1:] for token in vocab if token.startswith(_BEGIN)} - {""}
    if not begins:
        raise ConfigError(
            f"No token of the vocabulary begins with {_BEGIN!r}: it is none of SentencePiece. Leave "
            "--use_sentence_piece_vocab out."
        )
    pieces: dict[str, int] = {}
    for token, index in vocab.items():
        if token in special.names():
            name = token
        elif token.startswith(_BEGIN):
            name = token[1:]
        elif _WORD.fullmatch(token) and token not in begins:
            name = token
        else:
            name = f"##{token}"
        if name:
            pieces.setdefault(name, index)
    return pieces
