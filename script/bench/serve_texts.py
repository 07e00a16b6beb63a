"""Texts for `serve.py`: sentences of GLUE, or made-up ones where there is no data."""

from __future__ import annotations

import csv
import gzip
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

# Short ones (CoLA, STS-B), film reviews of any length, news, and some paragraphs (RTE).
_FILES = {
    "SST-2/dev.tsv": ("sentence",),
    "STS-B/train.tsv": ("sentence1", "sentence2"),
    "MRPC/train.tsv": ("#1 String", "#2 String"),
    "RTE/train.tsv": ("sentence1", "sentence2"),
}
_MADE_UP = 20_000
# Tokens in a sentence, about as in GLUE: most are short, some are not.
_MEAN_WORDS, _MAX_WORDS = 18, 180
# What a service meets sooner or later; the last one is longer than any model takes.
HARD = ("", " ", "a", "\U0001f600 \u4f60\u597d caf\u00e9", "tab\tand\nline", "word " * 600)
SHORT = "the film is a delight from start to end"


def read_texts(data: Path | None, seed: int = 0) -> list[str]:
    """Reads all sentences in a random order, each once.

    Args:
        data: the GLUE folder; None makes texts up.
        seed: of the order, and of what is made up.

    Raises:
        FileNotFoundError: the folder has none of the files.
    """
    rng = random.Random(seed)
    if data is None:
        words = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "en", "ime", "osity", "ub")]
        lengths = [min(_MAX_WORDS, 2 + int(rng.expovariate(1 / _MEAN_WORDS))) for _ in range(_MADE_UP)]
        texts = {" ".join(rng.choices(words, k=length)): None for length in lengths}
    else:
        texts = dict.fromkeys(_sentences(data))
        if not texts:
            raise FileNotFoundError(f"{data} has none of {', '.join(_FILES)}")
    shuffled = list(texts)
    rng.shuffle(shuffled)
    return shuffled


def _sentences(data: Path) -> Iterator[str]:
    for name, columns in _FILES.items():
        path = data / name
        if not path.exists():
            continue
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield from (row[column].strip() for column in columns if (row.get(column) or "").strip())


def piece(texts: Sequence[str], number: int, size: int) -> list[str]:
    """The texts of a round: the next ones in order, beginning anew after the last."""
    start = number * size % len(texts)
    return list(itertools.islice(itertools.cycle(texts), start, start + size))
