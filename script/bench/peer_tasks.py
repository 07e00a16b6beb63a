"""Tasks over a text or a pair, for the reference side: GLUE's and WikiQA's files, features, dev metrics.

It is written without the project, as a second opinion: only `peer_transformers.py` imports it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import BertForSequenceClassification

Row = Mapping[str, str]
Features = list[dict[str, Any]]
Score = Callable[[list[Row], np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Prepared:
    """What is trained and evaluated.

    Attributes:
        train, dev: one model input each, unpadded, with its labels.
        score: dev logits, in the order of `dev`, to metrics by name.
        by_length: whether a batch holds inputs of one length only, so that none is padded.
    """

    train: Features
    dev: Features
    score: Callable[[np.ndarray], dict[str, float]]
    by_length: bool = False


def classified(*names: str) -> Score:
    """The metrics of predicted classes."""
    known: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "acc": accuracy_score,
        "f1": f1_score,
        "mcc": matthews_corrcoef,
    }

    def score(rows: list[Row], labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
        predicted = logits.argmax(axis=-1)
        return {name: float(known[name](labels, predicted)) for name in names}

    return score


def correlated(rows: list[Row], labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation."""
    values = logits[:, 0]
    return {
        "pearson": float(stats.pearsonr(values, labels)[0]),
        "spearman": float(stats.spearmanr(values, labels)[0]),
    }


def ranked(rows: list[Row], labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """MRR and MAP over the queries; of equal scores the later row goes first, as trec_eval has it."""
    groups: dict[str, list[tuple[float, int]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row["qid"], []).append((float(logits[place, 1]) - float(logits[place, 0]), place))
    reciprocals, averages = [], []
    for group in groups.values():
        relevant = [labels[place] > 0 for _, place in sorted(group, reverse=True)]
        ranks = [rank for rank, is_relevant in enumerate(relevant, start=1) if is_relevant]
        reciprocals.append(1 / ranks[0] if ranks else 0.0)
        averages.append(float(np.mean([n / rank for n, rank in enumerate(ranks, start=1)])) if ranks else 0.0)
    return {"mrr": float(np.mean(reciprocals)), "map": float(np.mean(averages))}


@dataclass(frozen=True)
class TextTask:
    """Where a task's rows are and what they mean: files below the data folder, columns by name.

    Attributes:
        header: names of the cells of files that have no header.
        labels: label texts by class; None for a regression.
    """

    train_file: str
    dev_file: str
    text_columns: tuple[str, ...]
    label_column: str
    score: Score = field(repr=False)
    labels: tuple[str, ...] | None = ("0", "1")
    header: tuple[str, ...] | None = None
    max_train_rows: int | None = None
    num_epochs: int = 1
    max_seqlen: int = 128

    model_class = BertForSequenceClassification
    head = "classifier"

    @property
    def num_labels(self) -> int:
        return 1 if self.labels is None else len(self.labels)

    def prepare(self, data: Path, tokenizer: Any) -> Prepared:
        """Reads and tokenises train and dev."""
        dev_rows = read_rows(data / self.dev_file, self)
        dev = self._features(dev_rows, tokenizer)
        labels = np.array([features["labels"] for features in dev])
        return Prepared(
            self._features(read_rows(data / self.train_file, self, self.max_train_rows), tokenizer),
            dev,
            lambda logits: self.score(dev_rows, labels, logits),
        )

    def _features(self, rows: list[Row], tokenizer: Any) -> Features:
        texts = ([row[name] for row in rows] for name in self.text_columns)
        encoded = tokenizer(*texts, truncation="longest_first", max_length=self.max_seqlen)
        return [
            {
                **{name: values[place] for name, values in encoded.items()},
                "labels": self._label(row[self.label_column]),
            }
            for place, row in enumerate(rows)
        ]

    def _label(self, text: str) -> int | float:
        return float(text) if self.labels is None else self.labels.index(text)


def read_rows(path: Path, task: TextTask, max_rows: int | None = None) -> list[Row]:
    """Reads the first `max_rows` rows of a TSV, plain or `.gz`; quotes are data, a BOM is not.

    Raises:
        ValueError: A column is missing, or a line has another number of fields than the header.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[Row] = []
    with opener(path, "rb") as file:
        names = task.header or file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
        if missing := {*task.text_columns, task.label_column} - set(names):
            raise ValueError(f"{path}: no column {sorted(missing)}; the header has {names}")
        for number, line in enumerate(file, start=1 if task.header else 2):
            if len(rows) == max_rows:
                break
            fields = line.decode("utf-8").rstrip("\r\n").split("\t")
            if len(fields) != len(names):
                raise ValueError(f"{path}:{number}: {len(fields)} fields, expected {len(names)}: {names}")
            rows.append(dict(zip(names, fields, strict=True)))
    return rows


_PAIR = ("sentence1", "sentence2")
TEXT_TASKS = {
    "cola": TextTask(
        "CoLA/train.tsv",
        "CoLA/dev.tsv",
        ("sentence",),
        "label",
        classified("mcc"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": TextTask(
        "SST-2/train.tsv.gz",
        "SST-2/dev.tsv",
        ("sentence",),
        "label",
        classified("acc"),
        max_train_rows=10_000,
    ),
    "mrpc": TextTask(
        "MRPC/train.tsv",
        "MRPC/dev.tsv",
        ("#1 String", "#2 String"),
        "Quality",
        classified("acc", "f1"),
        num_epochs=3,
    ),
    "rte": TextTask(
        "RTE/train.tsv",
        "RTE/dev.tsv",
        _PAIR,
        "label",
        classified("acc"),
        labels=("entailment", "not_entailment"),
        num_epochs=3,
    ),
    "stsb": TextTask("STS-B/train.tsv", "STS-B/dev.tsv", _PAIR, "score", correlated, labels=None),
    "wikiqa": TextTask("train.tsv", "dev.tsv", ("text_a", "text_b"), "label", ranked),
}
