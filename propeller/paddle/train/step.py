"""One update of the weights, from one batch.

    for each micro-batch of this rank:
        forward -> loss -> finite? -> backward
    sum the gradients over the ranks, divide by the weight of the whole batch
    clip -> optimizer

What makes another kind of update of the same parts is a step strategy: a function like `plain_step`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from propeller.errors import ConfigError, DataError
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Batch, Model, part_of, run_loss
from propeller.paddle.train.precision import Precision
from propeller.paddle.train.profiling import Profiler

log = logging.getLogger("propeller")


class Step:
    """The update being made.

    Args:
        model: the live model.
        optimizer: its optimizer.
        parameters: those it trains, by name.
        batches: this rank's micro-batches; none, where the batch has fewer rows than there are parts.
        ranks: the processes that make this step together.
        precision: of forward and loss.
        profiler: what measures the parts.

    Attributes:
        num_examples: of the whole batch, over all ranks; known after `backward`.
        num_tokens: likewise.
        updated: whether `update` has changed the weights. In fp16 a gradient that overflows changes
            nothing; the step counts all the same.
    """

    def __init__(
        self,
        model: Model,
        optimizer: paddle.optimizer.Optimizer,
        parameters: Mapping[str, paddle.Tensor],
        batches: Sequence[Batch],
        *,
        ranks: Ranks,
        precision: Precision,
        profiler: Profiler,
    ):
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.num_examples = self.num_tokens = 0
        self._batches, self._ranks, self._precision, self._profiler = batches, ranks, precision, profiler
        self._alone = ranks.size == 1 and len(batches) == 1
        self.updated = False
        self._weight = math.nan
        self._overflowed = False

    def backward(self) -> float:
        """Adds the gradient of the batch's loss to `.grad`; may be called more than once.

        With several ranks or micro-batches `.grad` is of the sum over this rank's rows; `update` sums over
        the ranks and divides.

        Returns:
            The mean loss of the whole batch.

        Raises:
            FloatingPointError: it is not finite, and says what; the weights are untouched.
            DataError: there is nothing to learn from in the whole batch.
        """
        total = weight = 0.0
        for batch in self._batches:
            batch_total, batch_weight = self._forward(batch)
            total, weight = total + batch_total.item(), weight + batch_weight
            if math.isfinite(total) and (batch_weight or not self._alone):
                with self._profiler.span("backward"):
                    # Alone, the loss is divided and not the gradients, which are many more.
                    loss = batch_total / batch_weight if self._alone else batch_total
                    self._precision.scaled(loss).backward()
        examples, tokens = (
            sum(getattr(batch, name) for batch in self._batches) for name in ("num_examples", "num_tokens")
        )
        with self._profiler.span("communication"):
            total, self._weight, examples, tokens = self._ranks.sum([total, weight, examples, tokens])
        self.num_examples, self.num_tokens = int(examples), int(tokens)
        if not self._weight:
            raise DataError(
                "The loss of a batch has the weight 0: there is nothing in it to learn from. Leave out "
                "examples without a label that counts, or take larger batches."
            )
        loss = float(total / self._weight)
        if not math.isfinite(loss):
            if not self._precision.may_overflow:
                raise FloatingPointError(f"The loss is {loss}")
            self._overflowed = True
        return loss

    def _forward(self, batch: Batch) -> tuple[paddle.Tensor, float]:
        with self._profiler.span("forward"), self._precision.autocast():
            predictions = self.model(batch.features)
        with self._profiler.span("loss"), self._precision.autocast():
            return run_loss(self.model, predictions, batch)

    def gradient(self, parameter: paddle.Tensor) -> paddle.Tensor:
        """The gradient so far, summed over the ranks: the same on all, up to a common factor."""
        gradient = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with self._profiler.span("communication"):
            return self._ranks.sum_tensor(gradient)

    def update(self) -> None:
        """Brings the gradients together, clips them, updates the weights and drops the gradients."""
        with self._profiler.span("communication"):
            used = self._used_somewhere()
            if not self._alone:
                _refuse_sparse(self.parameters)
                self._ranks.sum_gradients(used, 1.0 / self._weight)
        with self._profiler.span("optimizer"):
            finite = self._precision.unscale(used) and not self._overflowed
            if finite:
                self.optimizer.step()
            self.updated = finite
            self._precision.update(finite)
            # Not to zero: what the next batch does not use must not count as used.
            self.optimizer.clear_grad(set_to_zero=False)

    def _used_somewhere(self) -> list[paddle.Tensor]:
        """The parameters that some rank has a gradient for; those that not all have are reported once."""
        has = [parameter.grad is not None for parameter in self.parameters.values()]
        if self._ranks.size > 1:
            *counts, working = self._ranks.sum([*has, bool(self._batches)])
            has = [count > 0 for count in counts]
            partly = [0 < count < working for count in counts]
            for name in itertools.compress(self.parameters, partly):
                _report_unused(name)
        return list(itertools.compress(self.parameters.values(), has))


# Makes one update, by `step.update()`, and returns the mean loss.
StepStrategy = Callable[[Step], float]


def plain_step(step: Step) -> float:
    """One forward and backward pass over the batch, and the update; returns the mean loss."""
    loss = step.backward()
    step.update()
    return loss


def _refuse_sparse(parameters: Mapping[str, paddle.Tensor]) -> None:
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.is_selected_rows():
            raise ConfigError(
                f"{name} has a sparse gradient, which cannot be summed over ranks and micro-batches here. "
                "Make its embedding with sparse=False; of tables only the rows in use are sent in any case."
            )


@functools.cache  # says it once for each
def _report_unused(name: str) -> None:
    log.warning(
        "%s was not used by some ranks for their rows of a batch, where others used it. A missing gradient "
        "counts as zero, as it would in one process.",
        name,
    )


def micro_batches(model: Model, columns: Mapping[str, Any], ranks: Ranks, count: int) -> list[Batch]:
    """Cuts this rank's rows out of a batch, in `count` parts; a part without rows is left out."""
    num_parts = ranks.size * count
    if num_parts == 1:
        return [Batch.of(model, columns)]
    parts = [part_of(columns, ranks.rank + ranks.size * part, num_parts) for part in range(count)]
    return [Batch.of(model, part) for part in parts if len(next(iter(part.values())))]
