"""What one training run works with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from propeller.data import Dataset
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle
from propeller.paddle.train.averaging import WeightAverage
from propeller.paddle.train.checkpoint import Checkpointer
from propeller.paddle.train.exporter import Exporter
from propeller.paddle.train.hooks import Hook
from propeller.paddle.train.model import Model
from propeller.paddle.train.precision import Precision
from propeller.paddle.train.profiling import Profiler
from propeller.paddle.train.step import Step, StepStrategy, micro_batches
from propeller.types import RunConfig


@dataclasses.dataclass
class Job:
    """One training run, as one of its ranks sees it.

    Attributes:
        data: what must stay the same while the run goes on: `Dataset.signature` of the training data, and
            the seed of its order.
        hooks: of rank 0; none on the others.
        exporters: likewise.
        average: of the weights, where it is wanted and once they are there.
    """

    model: Model
    optimizer: paddle.optimizer.Optimizer
    run_config: RunConfig
    train_dataset: Dataset
    data: Sequence[Any]
    eval_datasets: Mapping[str, Dataset]
    hooks: Sequence[Hook]
    exporters: Sequence[Exporter]
    checkpointer: Checkpointer
    step_strategy: StepStrategy
    ranks: Ranks
    precision: Precision
    profiler: Profiler
    average: WeightAverage | None = None

    def __post_init__(self) -> None:
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not parameter.stop_gradient
        }

    @functools.cached_property
    def probe(self) -> Mapping[str, Any]:
        """The batch that exports are compared on, the first of the first evaluation set."""
        return next(iter(next(iter(self.eval_datasets.values()))))

    def step(self, columns: Mapping[str, Any]) -> Step:
        """The update to be made from a batch: this rank's rows of it, on the device."""
        with self.profiler.span("to_device"):
            batches = micro_batches(self.model, columns, self.ranks, self.run_config.micro_batches)
        return Step(
            self.model,
            self.optimizer,
            self.parameters,
            batches,
            ranks=self.ranks,
            precision=self.precision,
            profiler=self.profiler,
        )
