"""Classification and regression of sentences and sentence pairs, without Paddle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ernie.tasks.classification_files import Layout, label_text, read_classification
from ernie.tasks.glue import Task, find_task
from ernie.tasks.processor import TextProcessor
from ernie.tokenizing import Tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.metrics import F1, MCC, Acc, MacroF1, Metric, Pearson, Spearman
from propeller.metrics.base import Array, read_output
from propeller.metrics.multi_label import ExactMatch, MicroF1, MultiLabelMacroF1, sigmoid
from propeller.processor import Answer, Raw, register_processor

_METRICS: Mapping[str, Callable[[], Metric]] = {
    "acc": Acc,
    "f1": F1,
    "macro_f1": MacroF1,
    "mcc": MCC,
    "pearson": Pearson,
    "spearman": Spearman,
}
_LABELS_SHOWN = 20
_GREATEST = float(np.finfo(np.float32).max)


@register_processor
class ClassificationProcessor(TextProcessor):
    """Texts and pairs in, labels with probabilities (or a number, for regression) out.

    Args:
        tokenizer: the model's tokenizer.
        labels: label texts by id; None means regression.
        max_seqlen: tokens of an example at most, special ones included; longer ones are cut.
        pair: whether an example has a `text_b`.
        task: the known task that this is, see `ernie.tasks.glue`; it says how files are laid out and which
            metrics count.
        label_separator: not None: an example may have any number of labels, none among them, and in a
            table's cell this stands between them.
        thresholds: label -> probability from which on it is given. Of two labels the second may have one;
            without, the more probable is given. Where there may be any number, the others have 0.5.

    Raises:
        ConfigError: fewer than two labels, a `max_seqlen` without room for text, an unknown task, or
            thresholds that the labels do not allow.
    """

    name = "classification"

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str] | None,
        *,
        max_seqlen: int,
        pair: bool,
        task: str | None = None,
        label_separator: str | None = None,
        thresholds: Mapping[str, float] | None = None,
    ):
        super().__init__(tokenizer, max_seqlen=max_seqlen)
        least = 5 if pair else 3  # the special tokens, and one of each text
        if max_seqlen < least:
            raise ConfigError(
                f"max_seqlen {max_seqlen} leaves no room for {'two texts' if pair else 'a text'}: "
                f"expected {least} or more."
            )
        self.labels = None if labels is None else list(labels)
        self.pair = pair
        self.task: Task | None = None if task is None else find_task(task)
        self.label_separator = label_separator
        self.thresholds = dict(thresholds or {})
        self._ids = {label: index for index, label in enumerate(self.labels or ())}
        self._check_labels()

    def _check_labels(self) -> None:
        if self.labels is None:
            if self.multi_label or self.thresholds:
                raise ConfigError("A regression has no labels, so none to separate or to have a threshold.")
            return
        if len(self._ids) < (1 if self.multi_label else 2):
            least = "one label" if self.multi_label else "two labels"
            raise ConfigError(f"A classifier needs at least {least}, got {self.labels}.")
        if len(self._ids) != len(self.labels):
            raise ConfigError(f"Some of the labels are the same: {self.labels}.")
        allowed = self.labels if self.multi_label else self.labels[1:2] if len(self.labels) == 2 else []
        for label, threshold in self.thresholds.items():
            if label not in allowed or not 0 <= threshold <= 1:
                raise ConfigError(
                    f"The threshold {threshold!r} of the label {label!r} cannot be used; expected a "
                    f"probability, and one of the labels {', '.join(allowed) or '(none here)'}."
                )

    @property
    def multi_label(self) -> bool:
        """Whether an example may have any number of labels."""
        return self.label_separator is not None

    @property
    def num_outputs(self) -> int:
        """Size of the model's last axis: the number of labels, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def settings(self) -> dict[str, Any]:
        optional = {
            "task": None if self.task is None else self.task.name,
            "label_separator": self.label_separator,
            "thresholds": self.thresholds or None,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"labels": self.labels, "max_seqlen": self.max_seqlen, "pair": self.pair, **given}

    def with_thresholds(self, thresholds: Mapping[str, float]) -> ClassificationProcessor:
        """The same processor with other thresholds."""
        return ClassificationProcessor(self.tokenizer, **{**self.settings, "thresholds": thresholds})

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch.

        Returns:
            For each example `input_ids` and `token_type_ids` (int64 `[seq_len]`), `num_tokens` (before
            it was cut) and its `label`, where it has one: an id, for a regression a float32; where there may
            be any number, float32 `[labels]`, 1 for those that it has.

        Raises:
            DataError: a text is missing or none, or a label is not known.
        """
        pairs = [self._text(raw, "text_b") for raw in raws] if self.pair else None
        encodings = self.tokenizer.encode_batch(
            [self._text(raw, "text_a") for raw in raws], pairs, max_seqlen=self.max_seqlen
        )
        examples = []
        for raw, encoding in zip(raws, encodings, strict=True):
            example: dict[str, Any] = {
                "input_ids": encoding.input_ids,
                "token_type_ids": encoding.token_type_ids,
                "num_tokens": encoding.num_tokens,
            }
            if "label" in raw:
                example["label"] = self._label(raw["label"])
            examples.append(example)
        return examples

    def _text(self, raw: Raw, field: str) -> str:
        text = raw.get(field)
        if not isinstance(text, str):
            if field in raw:
                raise DataError(f"expected a text as {field!r}, found {text!r:.80}")
            keys = ", ".join(repr(key) for key in raw) or "nothing"
            raise DataError(f"the text {field!r} is missing; the example has {keys}")
        return text

    def _label(self, value: Any) -> Any:
        if self.labels is None:
            return _number(value)
        if self.multi_label:
            row = np.zeros(len(self.labels), np.float32)
            row[[self._id(label) for label in (value if isinstance(value, list) else [value])]] = 1
            return row
        if isinstance(value, list):
            raise DataError(f"one label was expected, found {value!r:.80}; for several set --multi_label")
        return np.int64(self._id(value))

    def _id(self, value: Any) -> int:
        label = label_text(value)
        if label not in self._ids:
            labels = list(self._ids)
            more = f" and {len(labels) - _LABELS_SHOWN} more" if len(labels) > _LABELS_SHOWN else ""
            known = ", ".join(map(repr, labels[:_LABELS_SHOWN]))
            raise DataError(
                f"unknown label {label!r:.80}; known are {known}{more}.{did_you_mean(label, labels)}"
            )
        return self._ids[label]

    def probabilities(self, logits: Any) -> npt.NDArray[np.float64]:
        """What `logits`, float `[rows, labels]`, say of each label; in rows of sum 1 where one is given."""
        scores = np.asarray(logits, dtype=np.float64)
        if self.multi_label:
            return sigmoid(scores)
        exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
        rows: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
        return rows

    def _decide(self, logits: Any) -> npt.NDArray[np.int64]:
        """The id of the label that each row is given, int64 `[rows]`."""
        rows = self.probabilities(logits)
        if self.thresholds and self.labels is not None:
            return (rows[:, 1] >= self.thresholds[self.labels[1]]).astype(np.int64)
        return rows.argmax(axis=-1)

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns `logits` (float `[rows, labels]`) into answers.

        Returns:
            `{"label", "probability", "probabilities"}` for each row, `{"labels", "probabilities"}` where
            there may be any number, `{"value"}` for regression.
        """
        logits = outputs["logits"]
        if self.labels is None:
            return [{"value": float(value)} for value in np.asarray(logits).reshape(-1)]
        named = [dict(zip(self.labels, row, strict=True)) for row in self.probabilities(logits).tolist()]
        if self.multi_label:
            return [{"labels": self._given(row), "probabilities": row} for row in named]
        chosen = [self.labels[index] for index in self._decide(logits).tolist()]
        return [
            {"label": label, "probability": row[label], "probabilities": row}
            for label, row in zip(chosen, named, strict=True)
        ]

    def _given(self, probabilities: Mapping[str, float]) -> list[str]:
        return [label for label, value in probabilities.items() if value >= self.thresholds.get(label, 0.5)]

    def layout(self, columns: Sequence[str] | None = None) -> Layout:
        """How the task's files are laid out.

        Args:
            columns: names of the cells of a table without a header, in order.
        """
        layout = Layout() if self.task is None else self.task.layout
        cells = layout.cells if columns is None else tuple(columns)
        return dataclasses.replace(layout, pair=self.pair, cells=cells, separator=self.label_separator)

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        return read_classification(path, self.layout(columns))

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
        if self.multi_label:
            thresholds = [self.thresholds.get(label, 0.5) for label in self.labels or ()]
            return {
                "micro_f1": MicroF1(thresholds=thresholds),
                "macro_f1": MultiLabelMacroF1(thresholds=thresholds),
                "exact_match": ExactMatch(thresholds=thresholds),
            }
        metrics = {name: _METRICS[name]() for name in self._metric_names()}
        if not self.thresholds:
            return metrics
        return {name: AtThreshold(metric, self._decide) for name, metric in metrics.items()}

    def _metric_names(self) -> Sequence[str]:
        if self.task is not None:
            return self.task.metrics
        if self.labels is None:
            return ("pearson", "spearman")
        return ("acc", "f1" if len(self.labels) == 2 else "macro_f1")


def _number(value: Any) -> np.float32:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the label is {value!r:.80}; expected a number") from error
    if not abs(number) <= _GREATEST:  # nor is NaN
        raise DataError(f"the label is {value!r:.80}; expected a finite number, of float32")
    return np.float32(number)


class AtThreshold(Metric):
    """A metric over class ids, where these are not simply those of the highest score.

    Args:
        metric: takes class ids as the output `logits`.
        decide: float `[B, C]` logits -> class ids `[B]`.
    """

    def __init__(self, metric: Metric, decide: Callable[[Array], Array]):
        self._metric = metric
        self._decide = decide

    def reset(self) -> None:
        self._metric.reset()

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        decided = self._decide(read_output(predictions, "logits"))
        self._metric.update({"logits": decided}, labels, features)

    def compute(self) -> Any:
        return self._metric.compute()

    def state(self) -> dict[str, Array]:
        return self._metric.state()

    def merge(self, state: Mapping[str, Array]) -> None:
        self._metric.merge(state)
