"""A SentencePiece vocabulary without SentencePiece."""

from __future__ import annotations

import itertools

import pytest

from ernie.tasks.sentence_pieces import over_sentence_pieces
from ernie.tokenizing import WordPieceTokenizer, load_tokenizer
from propeller.errors import ConfigError

PIECES = ["▁", "▁北", "北", "京", "▁un", "happy", "▁in", "h", "▁h", "，", "▁大学"]
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *PIECES]


def test_units_are_looked_up(tmp_path):
    """Longest first; what begins a word at its beginning, the rest behind it; Chinese by the character."""
    plain = WordPieceTokenizer({token: index for index, token in enumerate(VOCABULARY)})
    tokenizer = over_sentence_pieces(plain)
    tokenizer.save_pretrained(tmp_path)
    units = {
        "北": ["▁北"],
        "Unhappy": ["▁un", "happy"],
        "hh": ["▁h", "h"],
        "北京": ["▁北", "京"],
        "，": ["，"],
        "大学": ["[UNK]", "[UNK]"],
        "inn": ["[UNK]"],
        "[MASK]": ["[MASK]"],
        " ": [],
    }
    for each in (tokenizer, load_tokenizer(tmp_path)):
        encoding = each.encode_units(list(units))
        found = [VOCABULARY[index] for index in encoding.input_ids.tolist()]
        assert found == ["[CLS]", *itertools.chain.from_iterable(units.values()), "[SEP]"]
        assert (each.pad_token_id, each.vocab_size) == (0, len(VOCABULARY))


def test_a_real_model(real_data):
    """Most characters of a newspaper are known, though few with the mark; full-width commas are not."""
    folder = real_data / "sentencepiece"
    model = load_tokenizer(None, sentence_piece_model=folder / "cluecorpussmall_spm.model")
    tokenizer = over_sentence_pieces(model)
    lines = (real_data / "msra_ner" / "dev.tsv").read_text("utf-8").splitlines()[1:200]
    units = [unit for line in lines for unit in line.split("\t")[0].split("\x02")]
    encoding = tokenizer.encode_units(units)
    assert (encoding.words[1:-1] == range(len(units))).all()  # a token each
    unknown = {
        unit
        for unit, index in zip(units, encoding.input_ids[1:-1], strict=True)
        if index == model.unk_token_id
    }
    assert "，" in unknown and len(unknown) < 0.02 * len(set(units))
    assert sum(f"\u2581{unit}" in model.vocab for unit in units) < 0.2 * len(units)


def test_another_vocabulary():
    tokenizer = WordPieceTokenizer({token: index for index, token in enumerate(VOCABULARY[:5])})
    with pytest.raises(ConfigError, match="Leave --use_sentence_piece_vocab out"):
        over_sentence_pieces(tokenizer)
