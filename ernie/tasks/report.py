"""A short report on the data, before training: what will be learnt from, and what looks wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ernie.tasks.classification import ClassificationProcessor
from propeller.errors import DataError


def data_report(
    sets: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    texts: Mapping[str, Iterable[tuple[str, ...]]],
    processor: ClassificationProcessor,
) -> str:
    """Describes prepared sets: rows, lengths, cuts, unknown tokens, labels, texts shared with train.

    Args:
        sets: unpadded examples (`input_ids`, `num_tokens`, `label`) by set name.
        texts: the raw texts of each example of each set.
        processor: what prepared them.

    Returns:
        One line for each set, and one for each that shares texts with `train`.

    Raises:
        DataError: a set is empty.
    """
    max_seqlen, unk_id = processor.max_seqlen, processor.tokenizer.unk_token_id
    lines = []
    for name, examples in sets.items():
        lengths, unknown, tokens = [], 0, 0
        found: list[Any] = []
        for example in examples:
            lengths.append(int(example["num_tokens"]))
            unknown += int(np.count_nonzero(example["input_ids"] == unk_id))
            tokens += len(example["input_ids"])
            found.append(example["label"])
        if not lengths:
            raise DataError(f"The {name} set is empty.")
        cut = sum(length > max_seqlen for length in lengths)
        lines.append(
            f"{name}: {len(lengths)} rows, tokens a row: mean {np.mean(lengths):.1f}, "
            f"95 % up to {np.percentile(lengths, 95):.0f}, longest {max(lengths)}; "
            f"cut at {max_seqlen}: {cut / len(lengths):.1%}; unknown tokens: {unknown / tokens:.2%}; "
            f"labels: {_label_counts(found, processor)}"
        )
    return "\n".join(lines + _shared(texts))


def _label_counts(found: Sequence[Any], processor: ClassificationProcessor) -> str:
    if processor.labels is None:
        values = np.asarray(found, np.float64)
        return f"{values.min():g} to {values.max():g}, mean {values.mean():.3f}"
    if processor.multi_label:
        rows = np.stack(found)
        counts = rows.sum(axis=0).astype(int)
        more = f"; {rows.sum(axis=1).mean():.2f} a row, {int((rows.sum(axis=1) == 0).sum())} rows without"
    else:
        counts, more = np.bincount(np.asarray(found), minlength=len(processor.labels)), ""
    named = zip(processor.labels, counts.tolist(), strict=True)
    return ", ".join(f"{label:.40} {count}" for label, count in named) + more


def _shared(texts: Mapping[str, Iterable[tuple[str, ...]]]) -> list[str]:
    """Hashes, not texts, are held, so that a large training set fits."""
    hashes = {name: [_digest(row) for row in rows] for name, rows in texts.items()}
    train = set(hashes.get("train", ()))
    lines = []
    for name, rows in hashes.items():
        both = sum(row in train for row in rows)
        if name != "train" and both:
            lines.append(f"warning: {both} of {len(rows)} texts of {name} also stand in train")
    return lines


def _digest(row: tuple[str, ...]) -> bytes:
    return hashlib.blake2b("\t".join(row).encode("utf-8", "surrogatepass"), digest_size=8).digest()
