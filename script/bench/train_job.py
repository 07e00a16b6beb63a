"""What `train.py` gives a trainer and what it gets back; in nothing but Python, for all of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """One round of one trainer.

    Attributes:
        init: Hugging Face folder with the first weights and the tokenizer.
        examples: `input_ids` with special tokens, and `label`, in the order of the steps.
        batch_size: examples a step.
        num_steps: steps of the round; each takes the next `batch_size` examples.
        num_uncounted_steps: of these, the first so many are not counted.
        seed: of dropout, and of whatever order the trainer chooses by itself.
    """

    init: str
    examples: list[dict[str, Any]]
    batch_size: int
    num_steps: int
    num_uncounted_steps: int
    seed: int
    learning_rate: float = 5e-5
    weight_decay: float = 0.01

    def training_arguments(self) -> dict[str, Any]:
        """What the `TrainingArguments` of Transformers and PaddleNLP have in common."""
        return {
            "max_steps": self.num_steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a trainer did in one round, without the steps that do not count.

    Attributes:
        seconds: from the end of the last uncounted step to the end of the last one.
        examples, tokens, cells: seen in these; cells are tokens and padding.
        loss: mean over the steps.
        num_parameters: of the model.
        peak_bytes: largest resident memory until the end of the last step; of several ranks the sum, in
            which the libraries that they share count for each.
        versions: of what it ran on.
    """

    seconds: float
    examples: int
    tokens: int
    cells: int
    loss: float
    num_parameters: int
    peak_bytes: int
    versions: dict[str, str]


class Recorder:
    """Watches a trainer: `batch` for each batch in its order, `step_end` after each step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._shapes: list[tuple[int, int, int]] = []
        self._ended: list[float] = []
        self._peak_bytes = 0

    def batch(self, num_rows: int, width: int, num_tokens: int) -> None:
        """A batch was padded; trainers that read ahead may be some batches further than their steps."""
        self._shapes.append((num_rows, num_tokens, num_rows * width))

    def step_end(self) -> None:
        """A step is over."""
        self._ended.append(time.perf_counter())
        self._peak_bytes = peak_bytes()

    def report(self, loss: float, num_parameters: int, versions: dict[str, str]) -> Report:
        """Sums up the steps that count.

        Raises:
            RuntimeError: the trainer made another number of steps.
        """
        first, last = self._job.num_uncounted_steps, self._job.num_steps
        if len(self._ended) != last or len(self._shapes) < last:
            raise RuntimeError(f"{len(self._ended)} steps of {len(self._shapes)} batches; expected {last}")
        examples, tokens, cells = (sum(column) for column in zip(*self._shapes[first:last], strict=True))
        seconds = self._ended[-1] - self._ended[first - 1]
        return Report(seconds, examples, tokens, cells, loss, num_parameters, self._peak_bytes, versions)


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_job(description: str, *switches: str) -> tuple[Job, argparse.Namespace]:
    """Reads the flags of a trainer's script: `--job`, `--out` and switches of its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--job", type=Path, required=True, help="JSON file, as train.py writes it")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes")
    for switch in switches:
        parser.add_argument(switch, action="store_true")
    args = parser.parse_args()
    return Job(**json.loads(args.job.read_text())), args


def write_report(report: Report, path: Path) -> None:
    """Writes it as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(report)))


def read_report(path: Path, rank_peaks: Sequence[Path] = ()) -> Report:
    """Reads a report; `rank_peaks` are files with the peak of each rank but the first."""
    report = Report(**json.loads(path.read_text()))
    others = sum(int(rank.read_text()) for rank in rank_peaks)
    return dataclasses.replace(report, peak_bytes=report.peak_bytes + others)
