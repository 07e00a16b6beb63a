"""GLUE from its files as they are downloaded, to the files that its server takes.

Source: Wang et al. 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
    Understanding", the tasks and their metrics; the sample submission of gluebenchmark.com, names and form of
    the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from ernie.tasks.arguments import DataFiles
from ernie.tasks.classification_files import Layout
from propeller import atomic
from propeller.errors import ConfigError, DataError, PropellerError, did_you_mean
from propeller.processor import Answer

log = logging.getLogger("ernie")

_ENDS = (".tsv", ".tsv.gz", "")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task of which the files, the labels and the metrics are known.

    Attributes:
        name: by which it is asked for.
        folder: what its folder is called in a download.
        layout: how its files are laid out.
        labels: label texts by id; None for a regression.
        metrics: names of its metrics; the first is the one to choose a model by.
        files: set name -> the names of its file in the folder, without their ends, the first that is there
            counts; None: train, dev and test.
        submissions: set without labels -> the file that GLUE's server takes for it.
        range: least and greatest value of a regression.
    """

    name: str
    folder: str
    layout: Layout
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]] | None = None
    submissions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    range: tuple[float, float] | None = None


_SENTENCES = Layout(text_a=("sentence1",), text_b=("sentence2",), label=(), pair=True)
_NLI = ("contradiction", "entailment", "neutral")
_ENTAILMENT = ("entailment", "not_entailment")
_BINARY = ("0", "1")

_TASKS = (
    Task(
        "cola",
        "CoLA",
        # Train and dev have no header: source, label, the author's mark, sentence.
        Layout(text_a=("sentence",), label=(), pair=False, cells=("_", "label", "_", "text_a")),
        _BINARY,
        ("mcc",),
        submissions={"test": "CoLA.tsv"},
    ),
    Task(
        "sst-2",
        "SST-2",
        Layout(text_a=("sentence",), label=(), pair=False),
        _BINARY,
        ("acc",),
        submissions={"test": "SST-2.tsv"},
    ),
    Task(
        "mrpc",
        "MRPC",
        Layout(text_a=("#1 String",), text_b=("#2 String",), label=("Quality",), pair=True),
        _BINARY,
        ("f1", "acc"),
        submissions={"test": "MRPC.tsv"},
    ),
    Task(
        "sts-b",
        "STS-B",
        dataclasses.replace(_SENTENCES, label=("score",)),
        None,
        ("pearson", "spearman"),
        submissions={"test": "STS-B.tsv"},
        range=(0.0, 5.0),
    ),
    Task(
        "qqp",
        "QQP",
        Layout(("question1",), ("question2",), ("is_duplicate",), pair=True, skips_malformed=True),
        _BINARY,
        ("acc", "f1"),
        submissions={"test": "QQP.tsv"},
    ),
    Task(
        "mnli",
        "MNLI",
        Layout(("sentence1", "Premise"), ("sentence2", "Hypothesis"), ("gold_label", "Label"), pair=True),
        _NLI,
        ("acc", "mcc"),  # the second is what AX is measured by
        {
            "train": ("train",),
            "dev_matched": ("dev_matched", "m/dev"),
            "dev_mismatched": ("dev_mismatched", "mm/dev"),
            "test_matched": ("test_matched", "m/test"),
            "test_mismatched": ("test_mismatched", "mm/test"),
            "ax": ("diagnostic-full", "../diagnostic/diagnostic-full", "../AX/diagnostic-full"),
            "test_ax": ("diagnostic", "../diagnostic/diagnostic", "../AX/diagnostic", "../AX/test"),
        },
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "test_ax": "AX.tsv"},
    ),
    Task(
        "qnli",
        "QNLI",
        Layout(text_a=("question",), text_b=("sentence",), label=(), pair=True),
        _ENTAILMENT,
        ("acc",),
        submissions={"test": "QNLI.tsv"},
    ),
    Task("rte", "RTE", _SENTENCES, _ENTAILMENT, ("acc",), submissions={"test": "RTE.tsv"}),
    Task("wnli", "WNLI", _SENTENCES, _BINARY, ("acc",), submissions={"test": "WNLI.tsv"}),
    # No task of GLUE, but one whose download is as particular.
    Task(
        "xnli",
        "XNLI",
        Layout(("premise", "sentence1"), ("hypo", "sentence2"), ("gold_label",), pair=True, language="zh"),
        _NLI,
        ("acc",),
        {
            "train": ("train", "multinli.train.zh"),
            "dev": ("dev", "xnli.dev"),
            "test": ("test", "xnli.test"),
        },
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def find_task(name: str) -> Task:
    """The task of this name, in any case; `sst2` is `sst-2`.

    Raises:
        ConfigError: there is none.
    """
    plain = name.lower()
    by_name = {**TASKS, **{known.replace("-", ""): task for known, task in TASKS.items()}}
    if plain not in by_name:
        more = " AX is a set of mnli, which has its labels." if plain == "ax" else ""
        raise ConfigError(
            f"--task {name} is not known.{did_you_mean(plain, TASKS)}{more} Known are {', '.join(TASKS)}; "
            "other data needs no --task."
        )
    return by_name[plain]


def set_files(task: Task, folder: Path) -> dict[str, Path]:
    """Set name -> file (or folder of parts) of the sets that are in a folder, in the order of the task."""
    found: dict[str, Path] = {}
    for name, candidates in (task.files or {name: (name,) for name in ("train", "dev", "test")}).items():
        paths = (folder / f"{candidate}{end}" for candidate in candidates for end in _ENDS)
        there = next(filter(Path.exists, paths), None)
        if there is not None:
            found[name] = there
    return found


def task_files(task: Task | None, args: argparse.Namespace) -> dict[str, Path]:
    """Set name -> file, `train` first, then the set that a model is chosen by.

    Raises:
        ConfigError: train or dev is missing, or a file that was named; what was looked for is named.
    """
    if task is None or task.files is None or args.train_set or args.dev_set or args.data_dir is None:
        return dict(DataFiles.of(args).items())
    folder = Path(args.data_dir)
    if not folder.is_dir():
        raise ConfigError(f"--data_dir {folder} is no folder.")
    found = set_files(task, folder)
    for name, candidates in itertools.islice(task.files.items(), 2):
        if name not in found:
            looked_for = " or ".join(f"{candidate}.tsv" for candidate in candidates)
            raise ConfigError(f"No {name} data of {task.name} in {folder}: expected {looked_for}.")
    return found if args.test_set is None else {**found, "test": Path(args.test_set)}


def write_submission(path: Path, task: Task, answers: Iterable[Answer | PropellerError]) -> None:
    """Writes what GLUE's server takes: a header, then for each row of a test set its index and prediction.

    Args:
        path: the file.
        task: whose test set it is.
        answers: in the order of the rows.

    Raises:
        PropellerError: a row has an error for an answer.
        DataError: the file cannot be written.
    """
    lines = ["index\tprediction"]
    lines += (f"{index}\t{_prediction(task, answer)}" for index, answer in enumerate(answers))
    try:
        atomic.write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path=path) from error
    log.info("wrote %d predictions to %s", len(lines) - 1, path)


def _prediction(task: Task, answer: Answer | PropellerError) -> str:
    if isinstance(answer, PropellerError):
        raise answer
    if task.labels is not None:
        return str(answer["label"])
    value = float(answer["value"])
    if task.range is not None:
        value = min(max(value, task.range[0]), task.range[1])
    return f"{value:.6f}"
