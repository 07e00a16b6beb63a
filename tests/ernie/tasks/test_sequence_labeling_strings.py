"""Sequence labelling of any string there is: one tag a unit, offsets that cut their own text out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ernie.tasks.sentence_pieces import over_sentence_pieces
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from ernie.tasks.tagging import entities_of
from ernie.tokenizing import WordPieceTokenizer, load_tokenizer

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TOKENS = ["[CLS]", "[SEP]", "[UNK]", *"abcdefghij", *"人民北京大学在", "un", "##happy", "##x", "[PAD]"]
TOKENIZER = WordPieceTokenizer({token: index for index, token in enumerate(TOKENS)})

ALPHABETS = [
    "abcdefghij unhappy人民北京大学在，。",
    "\x00\x01\x07\x1f\x7f\x85\u2028\t\r\n\u3000 ",
    "\ud800\udc00\udfff",
    "e\u0301\u0302\u0489\u20dd\u200d\ufe0f",
    "😀👨‍👩‍👧🏳️‍🌈🇩🇪",
    "[CLS][SEP][PAD][UNK]",
    "\x02",
]


def random_text(rng):
    """Now and then 10,000 characters, with blanks or without."""
    if rng.random() < 0.001:
        return "".join(rng.choices("ab北😀\x00\ud800" + " " * rng.randint(0, 3), k=10_000))
    characters = "".join(rng.sample(ALPHABETS, rng.randint(1, len(ALPHABETS))))
    if rng.random() < 0.1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 20)))
    return "".join(rng.choices(characters, k=rng.choice([0, 1, 2, 5, 20, 60])))


def check_answers(processor, raws, seed):
    """One tag a unit whatever the outputs are, and entities whose offsets cut their own text out."""
    rng = np.random.default_rng(seed)
    for raw, examples in zip(raws, processor.windows(raws), strict=True):
        size = max(len(example["input_ids"]) for example in examples)
        assert size <= processor.max_seqlen
        parts = processor.finish({"logits": rng.normal(size=(len(examples), size, len(LABELS)))})
        found = processor.join(raw, examples, parts)
        separator = raw.get("separator", "").replace("\x02", "")
        text = raw["text_a"] if "text_a" in raw else separator.join(raw["units"])
        if "units" in raw:
            count = len(raw["units"])
        else:
            count = len(text) if processor.by_character else len(text.split())
        assert len(found["tags"]) == count
        assert set(found["tags"]) <= set(LABELS)
        assert len(found["entities"]) == len(entities_of(found["tags"]))
        end = 0
        for entity in found["entities"]:
            assert end <= entity["start"] < entity["end"]
            assert text[entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["score"] <= 1
            end = entity["end"]


def check_random_strings(count, seed, tokenizer=TOKENIZER):
    """A third each as a line, as free text in words and in characters."""
    rng = random.Random(seed)
    settings = {"max_seqlen": 16, "scheme": "BIO"}
    by_word = SequenceLabelingProcessor(tokenizer, LABELS, **settings)
    by_character = SequenceLabelingProcessor(tokenizer, LABELS, by_character=True, **settings)
    for start in range(0, count, 500):
        texts = [random_text(rng) for _ in range(min(500, count - start))]
        check_answers(by_word, [by_word.parse(text) for text in texts[::3]], start)
        check_answers(by_word, [by_word.raw_of(text) for text in texts[1::3]], start)
        check_answers(by_character, [by_character.raw_of(text) for text in texts[2::3]], start)


def test_random_strings():
    check_random_strings(2_000, seed=1)


@pytest.mark.slow
def test_many_random_strings():
    check_random_strings(100_000, seed=2)


def test_random_strings_in_sentence_pieces(real_data):
    """By the model's own segmentation, and with its vocabulary alone."""
    model = real_data / "sentencepiece" / "cluecorpussmall_spm.model"
    tokenizer = load_tokenizer(None, sentence_piece_model=model)
    check_random_strings(500, seed=3, tokenizer=tokenizer)
    check_random_strings(500, seed=4, tokenizer=over_sentence_pieces(tokenizer))
