"""Hooks watch a run and may ask it to stop; they never change the training itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from propeller.errors import ConfigError, did_you_mean
from propeller.types import RunConfig, RunState

Results = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        loss: mean loss of the batch.
        learning_rate: the rate this step was made with.
        num_examples: examples in it, over all ranks.
        num_tokens: tokens in it, padding left out, over all ranks.
    """

    loss: float
    learning_rate: float
    num_examples: int
    num_tokens: int


class Hook:
    """Base of all hooks: every method does nothing.

    A `str` returned by `train_begin`, `step_end` or `eval_end` asks the loop to stop, for that reason.
    `train_end` runs in any case, also after a crash.

    Attributes:
        name: unique in a run; the key of the hook's state in a checkpoint.
    """

    name: str = ""

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> str | None:
        """The run is set up, or resumed at `state`; `last_step` ends this session, where that is known."""

    def step_begin(self, state: RunState) -> None:
        """A batch is there, the forward pass follows."""

    def step_end(self, state: RunState, result: StepResult) -> str | None:
        """A step is done and counted in `state`."""

    def eval_end(self, state: RunState, results: Results) -> str | None:
        """All evaluation sets were gone through; `results` by set and metric name."""

    def checkpoint_saved(self, state: RunState, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def train_end(self, state: RunState, error: BaseException | None) -> None:
        """The run is over; `error` says why, if it did not end by itself."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that an exact resume needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raises ConfigError unless every hook has a name of its own."""
    names = [hook.name for hook in hooks]
    for hook in hooks:
        if not hook.name or names.count(hook.name) > 1:
            raise ConfigError(
                f"Hook {hook!r} needs a unique name, got {hook.name!r}; names here: {', '.join(names)}."
            )


def find_result(results: Results, metric: str, dataset: str | None) -> float:
    """Returns one metric of an evaluation, of the first set unless `dataset` names another.

    Raises:
        ConfigError: there is no such set or metric, or it is no number.
    """
    name = next(iter(results)) if dataset is None else dataset
    if name not in results:
        raise ConfigError(f"No evaluation set {name!r}.{did_you_mean(name, results)} Sets: {list(results)}.")
    if metric not in results[name]:
        raise ConfigError(
            f"No metric {metric!r} in the evaluation of {name!r}.{did_you_mean(metric, results[name])} "
            f"Metrics: {list(results[name])}."
        )
    value = results[name][metric]
    if not isinstance(value, float | int):
        raise ConfigError(f"Metric {metric!r} is no number to compare by, but {type(value).__name__}.")
    return float(value)


class EarlyStopping(Hook):
    """Asks to stop once a metric has not improved for `patience` evaluations; NaN is no improvement.

    Args:
        metric: its name, such as `loss` or `acc`.
        patience: evaluations without improvement that are allowed.
        greater_is_better: the direction; by default `loss` falls and all else rises.
        dataset: the evaluation set; None takes the first.
        min_delta: what counts as improvement at least.
    """

    def __init__(
        self,
        metric: str,
        *,
        patience: int = 3,
        greater_is_better: bool | None = None,
        dataset: str | None = None,
        min_delta: float = 0.0,
    ):
        if patience < 1:
            raise ConfigError(f"EarlyStopping needs a patience of at least 1, got {patience}.")
        self.name = f"early_stopping:{dataset or ''}:{metric}"
        self.metric, self.patience, self.dataset, self.min_delta = metric, patience, dataset, min_delta
        self.greater_is_better = metric != "loss" if greater_is_better is None else greater_is_better
        self.best: float | None = None
        self.bad_evaluations = 0

    def eval_end(self, state: RunState, results: Results) -> str | None:
        value = find_result(results, self.metric, self.dataset)
        sign = 1.0 if self.greater_is_better else -1.0
        first = self.best is None and not math.isnan(value)
        if first or (self.best is not None and sign * (value - self.best) > self.min_delta):
            self.best, self.bad_evaluations = value, 0
        else:
            self.bad_evaluations += 1
        return self._out_of_patience()

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> str | None:
        return self._out_of_patience()

    def _out_of_patience(self) -> str | None:
        if self.bad_evaluations < self.patience:
            return None
        best = math.nan if self.best is None else self.best
        return f"{self.metric} has not improved on {best:.6f} for {self.bad_evaluations} evaluations"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = None if state["best"] is None else float(state["best"])
        self.bad_evaluations = state["bad_evaluations"]
