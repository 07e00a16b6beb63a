"""Classification and regression of sentences and sentence pairs, without Paddle."""

from __future__ import annotations

import collections
import itertools
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.tasks.processor import TextProcessor
from ernie.tokenizing import Tokenizer
from propeller.data import Column, Dataset, FeatureColumns, LabelColumn, RawColumn
from propeller.data.cache import source_files
from propeller.errors import ConfigError, DataError
from propeller.metrics import F1, Acc, MacroF1, Metric, Pearson, Spearman
from propeller.processor import Answer, Raw, register_processor

# What the public data sets call these columns.
TEXT_A_NAMES = ("sentence", "sentence1", "#1 String", "text", "query", "question1", "premise")
TEXT_B_NAMES = ("sentence2", "#2 String", "title", "question2", "hypothesis")
LABEL_NAMES = ("Quality", "score", "is_duplicate", "gold_label", "labels")


@register_processor
class ClassificationProcessor(TextProcessor):
    """Texts and pairs in, labels with probabilities (or a number, for regression) out.

    Args:
        tokenizer: the model's tokenizer.
        labels: label texts by id; None means regression.
        max_seqlen: tokens of an example at most, special ones included; longer ones are cut.
        pair: whether an example has a `text_b`.

    Raises:
        ConfigError: fewer than two labels, or a `max_seqlen` without room for text.
    """

    name = "classification"

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str] | None, *, max_seqlen: int, pair: bool):
        if labels is not None and len(set(labels)) < 2:
            raise ConfigError(f"A classifier needs at least two labels, got {list(labels)}.")
        least = 5 if pair else 3  # the special tokens, and one of each text
        if max_seqlen < least:
            raise ConfigError(
                f"max_seqlen {max_seqlen} leaves no room for {'two texts' if pair else 'a text'}: "
                f"expected {least} or more."
            )
        super().__init__(tokenizer, max_seqlen=max_seqlen)
        self.labels = None if labels is None else list(labels)
        self.pair = pair

    @property
    def num_outputs(self) -> int:
        """Size of the model's last axis: the number of labels, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "max_seqlen": self.max_seqlen, "pair": self.pair}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch.

        Returns:
            For each example `input_ids` and `token_type_ids` (int64 `[seq_len]`), `num_tokens` (before
            it was cut) and its `label`, where it has one.
        """
        pairs = [str(raw["text_b"]) for raw in raws] if self.pair else None
        encodings = self.tokenizer.encode_batch(
            [str(raw["text_a"]) for raw in raws], pairs, max_seqlen=self.max_seqlen
        )
        examples = []
        for raw, encoding in zip(raws, encodings, strict=True):
            example: dict[str, Any] = {
                "input_ids": encoding.input_ids,
                "token_type_ids": encoding.token_type_ids,
                "num_tokens": encoding.num_tokens,
            }
            if "label" in raw:
                example["label"] = raw["label"]
            examples.append(example)
        return examples

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns `logits` (float `[rows, labels]`) into answers.

        Returns:
            `{"label", "probability", "probabilities"}` for each row, `{"value"}` for regression.
        """
        logits = np.asarray(outputs["logits"], dtype=np.float64)
        if self.labels is None:
            return [{"value": float(value)} for value in logits.reshape(-1)]
        exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
        rows = exponents / exponents.sum(axis=-1, keepdims=True)
        best = rows.argmax(axis=-1)
        return [
            {
                "label": self.labels[index],
                "probability": float(row[index]),
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for index, row in zip(best.tolist(), rows, strict=True)
        ]

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        return file_columns(label_column(self.labels), pair=self.pair, names=columns).read(path)

    def parse(self, line: str) -> Raw:
        """Reads `text_a`, or `text_a<TAB>text_b` for pairs."""
        cells = line.split("\t")
        if len(cells) != 1 + self.pair:
            expected = "text_a<TAB>text_b" if self.pair else "one text without a tab"
            raise DataError(f"expected {expected}, found {len(cells)} cells")
        return dict(zip(("text_a", "text_b"), cells, strict=False))

    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the probabilities in label order, tab-separated; the value for regression."""
        values = [answer["value"]] if self.labels is None else answer["probabilities"].values()
        return "\t".join(f"{value:.8g}" for value in values)

    def metrics(self) -> dict[str, Metric]:
        if self.labels is None:
            return {"pearson": Pearson(), "spearman": Spearman()}
        if len(self.labels) == 2:
            return {"acc": Acc(), "f1": F1()}
        return {"acc": Acc(), "macro_f1": MacroF1()}


def file_columns(
    label: Column, *, pair: bool | None = None, names: Sequence[str] | None = None
) -> FeatureColumns:
    """The columns of training and evaluation files: `text_a`, `text_b` where there is one, the label.

    Args:
        label: how the label is read; see `label_column` and `raw_label_column`.
        pair: whether there is a `text_b`; None leaves it to the file.
        names: names of a file's columns in order, where it has no header; see `FeatureColumns`.
    """
    columns: list[Column] = [RawColumn("text_a", aliases=TEXT_A_NAMES)]
    if pair is not False:
        columns.append(RawColumn("text_b", aliases=TEXT_B_NAMES, optional=pair is None))
    return FeatureColumns([*columns, label], file_columns=names)


def label_column(labels: Sequence[str] | None) -> LabelColumn:
    """The label: ids in the order of `labels`, or float32 numbers for regression (None)."""
    if labels is None:
        return LabelColumn("label", dtype="float32", aliases=LABEL_NAMES)
    return LabelColumn("label", vocab=labels, aliases=LABEL_NAMES)


def raw_label_column(*, optional: bool = False) -> RawColumn:
    """The label as it stands in the file."""
    return RawColumn("label", aliases=LABEL_NAMES, optional=optional)


def find_labels(train: Path, columns: FeatureColumns, wanted: Any) -> list[str] | None:
    """Label texts by id: as `label_map.json` beside the training data says, else sorted as found in it.

    Args:
        train: the training file, or folder of parts.
        columns: with the label as it stands in the file; see `raw_label_column`.
        wanted: the number of labels there should be; 1 is a regression, None takes what is there.

    Returns:
        None for a regression.

    Raises:
        ConfigError: `label_map.json` is none, the number of labels is not the wanted one, or two labels
            are spellings of one (`1` and `01`, `yes` and `Yes`).
        DataError: a row without a label; it names file and line.
    """
    if wanted == 1:
        return None
    label_map = train.parent / "label_map.json"
    if label_map.exists():
        labels = _read_label_map(label_map)
    else:
        found = (columns.read(part).map(_label_of) for part in source_files(train.name, data_dir=train))
        counts = collections.Counter(itertools.chain.from_iterable(found))
        labels = number_labels(counts)
        if wanted is None and all(map(_is_number, labels)) and not all(map(_is_whole, labels)):
            raise ConfigError(
                f"The labels of {train} are numbers such as {labels[0]}. For a regression set num_label "
                "to 1; to take each for a class, set it to their number."
            )
        _check_spellings(counts, train)
    if wanted is not None and wanted != len(labels):
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise ConfigError(f"num_label is {wanted!r}, but there are {len(labels)} labels: {shown}.")
    return labels


def _check_spellings(counts: Mapping[str, int], train: Path) -> None:
    """Refuses labels that differ in spelling only, since each would become a class of its own."""
    spelt: dict[str, str] = {}
    for label in counts:
        plain = unicodedata.normalize("NFKC", label).strip().lower()
        other = spelt.setdefault(str(int(plain)) if _is_whole(plain) else plain, label)
        if other != label:
            raise ConfigError(
                f"{train} has the labels {other!r} ({counts[other]} rows) and {label!r} ({counts[label]} "
                "rows), two spellings of one. Correct the data; if they are meant to be two, number them "
                f"in {train.parent / 'label_map.json'}."
            )


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _label_of(row: Raw) -> str:
    label = str(row["label"]).strip()
    if not label:
        raise DataError("the label is empty")
    return label


def _read_label_map(path: Path) -> list[str]:
    """Reads a JSON object of label to id; returns the labels by id."""
    try:
        ids = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    numbers = list(ids.values()) if isinstance(ids, dict) else []
    if set(map(type, numbers)) != {int} or sorted(numbers) != list(range(len(numbers))):
        raise ConfigError(
            f"{path} must be an object that numbers the labels from 0 without gaps, got {ids!r:.200}."
        )
    return sorted(ids, key=ids.__getitem__)


def number_labels(found: Iterable[str]) -> list[str]:
    """Label texts in the order of their ids: by value if all are whole numbers, else sorted as text."""
    texts = sorted(set(found))
    if all(map(_is_whole, texts)):
        return sorted(texts, key=int)
    return texts
