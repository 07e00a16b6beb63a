"""The data of a classification run: which files there are, how they are read, and what labels they have."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie.tasks import glue
from ernie.tasks.arguments import column_names
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_files import Layout, begins_with_example, read_classification, read_parts
from ernie.tasks.classification_labels import LabelCounts, find_labels
from ernie.tasks.glue import Task
from ernie.tokenizing import Tokenizer
from propeller.data import source_files
from propeller.errors import ConfigError, DataError
from propeller.processor import Raw

log = logging.getLogger("ernie")

# What may stand between the labels of a table's cell, where nothing is said.
_SEPARATOR = ","


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of classification, besides those of every task."""
    group = parser.add_argument_group("classification")
    group.add_argument("--task", metavar="NAME", help=f"files as downloaded of {', '.join(glue.TASKS)}")
    group.add_argument("--multi_label", action="store_true", help="examples have any number of labels")
    group.add_argument("--label_separator", metavar="TEXT", help="what stands between these; default: ,")
    group.add_argument(
        "--tune_threshold", action="store_true", help="export with the thresholds of the best F1 on dev"
    )


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """What a run learns from and is measured on.

    Attributes:
        processor: for the labels of the training data.
        labelled: the sets to train on and to evaluate, by name; `train`, then the one to choose a model by.
        unlabelled: the sets that have no labels.
        label_counts: the labels of the training data.
        layout: how the files are laid out.
    """

    processor: ClassificationProcessor
    labelled: Mapping[str, Path]
    unlabelled: Mapping[str, Path]
    label_counts: LabelCounts
    layout: Layout

    @classmethod
    def of(cls, args: argparse.Namespace, tokenizer: Tokenizer, *, num_label: Any) -> ClassificationData:
        """Finds the files and looks at the training data.

        Args:
            args: flags of `arguments.argument_parser` and `add_arguments`.
            tokenizer: the model's.
            num_label: how many labels there should be; 1 is a regression, None takes what is there.

        Raises:
            ConfigError: files or flags that cannot be used, or labels that are not the wanted ones.
            DataError: the training data cannot be read, or there is no row for the task in a file; it names
                file and line.
        """
        task = glue.find_task(args.task) if args.task else None
        files = glue.task_files(task, args)
        layout = Layout() if task is None else task.layout
        if names := column_names(args):
            layout = dataclasses.replace(layout, cells=tuple(names))
        if args.multi_label or args.label_separator:
            layout = dataclasses.replace(layout, separator=args.label_separator or _SEPARATOR)
        first, counts = _look(files["train"], layout)
        if isinstance(first["label"], list) and layout.separator is None:  # JSON says it by itself
            layout = dataclasses.replace(layout, separator=_SEPARATOR)
        processor = ClassificationProcessor(
            tokenizer,
            _labels(task, files["train"], layout, counts, num_label),
            max_seqlen=args.max_seqlen,
            pair="text_b" in first,
            task=None if task is None else task.name,
            label_separator=layout.separator,
        )
        layout = processor.layout(layout.cells)
        unlabelled = {name: files[name] for name in list(files)[2:] if not _has_labels(files[name], layout)}
        labelled = {name: path for name, path in files.items() if name not in unlabelled}
        return cls(processor, labelled, unlabelled, counts, layout)

    def raws(self, name: str) -> Iterator[Raw]:
        """Raw examples of a set.

        Raises:
            DataError: the data cannot be read; it names file and line.
        """
        labelled = name in self.labelled
        path = self.labelled[name] if labelled else self.unlabelled[name]
        return read_parts(path, lambda part: read_classification(part, self.layout, labelled=labelled))

    def texts(self) -> dict[str, Iterator[tuple[str, ...]]]:
        """What makes two examples the same, for each set with labels."""
        fields = ("text_a", "text_b") if self.processor.pair else ("text_a",)
        return {
            name: (tuple(raw[field] for field in fields) for raw in self.raws(name)) for name in self.labelled
        }


def _look(train: Path, layout: Layout) -> tuple[Raw, LabelCounts]:
    """The first example of the training data, and all its labels."""

    def raws() -> Iterator[Raw]:
        return read_parts(train, lambda part: read_classification(part, layout))

    first = next(raws(), None)
    if first is None:
        raise DataError("every row was left out; expected labelled examples", path=train)
    log.info("columns of %s: %s", train, ", ".join(first))
    return first, LabelCounts.of(raws())


def _labels(
    task: Task | None, train: Path, layout: Layout, counts: LabelCounts, wanted: Any
) -> list[str] | None:
    """Label texts by id: the task's, else those that were found."""
    if task is None:
        return find_labels(train, counts, wanted, firsts=_first_labels(train, layout))
    labels = None if task.labels is None else list(task.labels)
    number = 1 if labels is None else len(labels)
    if wanted not in (None, number):
        raise ConfigError(f"num_label is {wanted!r}, but {task.name} has {number}. Leave it out.")
    return labels


def _first_labels(train: Path, layout: Layout) -> dict[Path, str]:
    """The label in the first line of each file that does not begin with a known header."""
    found = {}
    for part in source_files(train.name, data_dir=train):
        first = next(iter(read_classification(part, layout)), None)
        if first is not None and begins_with_example(part, layout):
            label = first["label"]
            found[part] = label if isinstance(label, str) else ",".join(label)
    return found


def _has_labels(path: Path, layout: Layout) -> bool:
    first = next(read_parts(path, lambda part: read_classification(part, layout, labelled=False)), None)
    if first is None:
        raise DataError("every row was left out; expected examples", path=path)
    return "label" in first
