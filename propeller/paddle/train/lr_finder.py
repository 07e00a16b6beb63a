"""Which learning rate? A short trial with a rate that rises, after which all is as it was before.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", section 3.3 (the range test). The
suggestion, a tenth of the rate with the least loss, is a rule of practice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np

from propeller.errors import ConfigError, DataError, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.job import Job
from propeller.paddle.train.model import Model
from propeller.types import RunMode

# The loss shown is averaged over some ten steps; a trial ends when it is four times the least so far.
_SMOOTHING = 0.9
_DIVERGED = 4.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a learning-rate trial showed.

    Attributes:
        rates: the learning rates tried, rising.
        losses: the smoothed loss at each.
        suggestion: a tenth of the rate with the least smoothed loss.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    suggestion: float

    def table(self, rows: int = 20) -> str:
        """Some of the rates with their losses, and the suggestion, as text."""
        chosen = np.unique(np.linspace(0, len(self.rates) - 1, rows).round().astype(int))
        lines = [f"{self.rates[index]:12.3g}{self.losses[index]:12.4f}" for index in chosen]
        return "\n".join(
            [f"{'rate':>12}{'loss':>12}", *lines, f"suggested learning rate: {self.suggestion:.1g}"]
        )


def find_learning_rate(job: Job, *, lowest: float, highest: float, num_steps: int) -> Trial:
    """Trains with a rate that rises from `lowest` to `highest`, then puts weights and generators back.

    The job's own optimizer is used, but not its schedule.

    Raises:
        ConfigError: the rates do not rise, or there are fewer than 10 steps.
        DataError: the data ends after fewer than 10 batches.
        NonFiniteLossError: the loss of the first weights is not finite.
    """
    if not 0 < lowest < highest or num_steps < 10:
        raise ConfigError(
            "A learning-rate trial needs 0 < lowest < highest and 10 steps at least, got "
            f"{lowest}, {highest} and {num_steps} steps."
        )
    with _without_a_trace(job.model):
        job.model.mode = RunMode.TRAIN
        rates, losses, diverged = _rising(job, lowest, (highest / lowest) ** (1 / (num_steps - 1)), num_steps)
    if not losses or len(losses) < 10 and not diverged:
        raise DataError(f"The data gave {len(losses)} batches; a learning-rate trial needs 10 at least.")
    if not math.isfinite(losses[0]):
        raise NonFiniteLossError(
            "The loss of the first step is not finite, so no learning rate can be suggested: look at the "
            "model and the first batch. In a training run, check_numerics names the operation."
        )
    return Trial(rates, losses, rates[int(np.argmin(losses))] / 10)


def _rising(job: Job, lowest: float, growth: float, num_steps: int) -> tuple[list[float], list[float], bool]:
    """Trains; returns the rates, the smoothed losses, and whether these ran away."""
    schedule = paddle.optimizer.lr.LambdaDecay(lowest, lambda step: growth**step)
    job.optimizer.set_lr_scheduler(schedule)
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    with contextlib.closing(job.train_dataset.iterate(seed=job.run_config.seed)) as batches:
        for columns, _ in itertools.islice(batches, num_steps):
            rates.append(job.optimizer.get_lr())
            try:
                loss = job.step_strategy(job.step(columns))
            except FloatingPointError:
                loss = math.inf
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            losses.append(average / (1 - _SMOOTHING ** len(rates)))
            if not losses[-1] < _DIVERGED * min(losses):
                return rates, losses, True
            schedule.step()
    return rates, losses, False


@contextlib.contextmanager
def _without_a_trace(model: Model) -> Iterator[None]:
    """Puts back weights, buffers, mode, gradients and generators after the block."""
    mode = model.mode
    generators = paddle.get_rng_state(), np.random.get_state(), random.getstate()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with paddle.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name], True)
        model.clear_gradients(set_to_zero=False)
        model.mode = mode
        paddle.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
