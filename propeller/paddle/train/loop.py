"""The training loop, in the order in which things happen.

    resume from the newest whole checkpoint, else start anew
    train_begin
    for each batch:
        step_begin
        seed -> forward -> loss -> finite? -> backward -> clip -> optimizer -> schedule
        step += 1
        step_end
        evaluate, if due; export, if better -> eval_end
        checkpoint, if due      -> checkpoint_saved
        stop, if asked or at the last step
    train_end, also after a crash

Evaluation, export and checkpoint always run at the last step. The checkpoint comes last: a run killed
before it evaluates that step once more and finds its best in place, where the other order would lose it. An
evaluation that a signal cuts short, or an export that fails, is noted in the checkpoint and made up for when
the run goes on. Hooks watch; they do not change this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from propeller import atomic
from propeller.data import Dataset
from propeller.errors import DataError, Interrupted, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.checkpoint import (
    Checkpoint,
    Checkpointer,
    optimizer_tensors,
    schedule_of,
    schedule_state,
    set_optimizer_tensors,
    set_weights,
)
from propeller.paddle.train.evaluation import CutShort, evaluate_all
from propeller.paddle.train.exporter import Exporter
from propeller.paddle.train.hooks import Hook, StepResult, check_hooks
from propeller.paddle.train.model import Batch, Model, run_loss
from propeller.types import RunConfig, RunMode, RunState

log = logging.getLogger("propeller")

StepStrategy = Callable[[Model, "paddle.optimizer.Optimizer", Batch], float]


@dataclasses.dataclass
class Job:
    """What one training run works with."""

    model: Model
    optimizer: paddle.optimizer.Optimizer
    run_config: RunConfig
    train_dataset: Dataset
    eval_datasets: Mapping[str, Dataset]
    hooks: Sequence[Hook]
    exporters: Sequence[Exporter]
    checkpointer: Checkpointer
    step_strategy: StepStrategy


def plain_step(model: Model, optimizer: paddle.optimizer.Optimizer, batch: Batch) -> float:
    """Forward, loss, backward, clip and update for one batch; returns its mean loss.

    Raises:
        FloatingPointError: the loss is not finite; the weights are untouched.
    """
    predictions = model(batch.features)
    total, weight = run_loss(model, predictions, batch)
    mean = total / weight
    loss = float(mean.item())
    if not math.isfinite(loss):
        raise FloatingPointError(str(loss))
    mean.backward()
    optimizer.step()
    optimizer.clear_grad()
    return loss


def train(job: Job) -> RunState:
    """Trains until the last step, the end of the data, or somebody asks to stop.

    Returns:
        The state reached.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        NonFiniteLossError: the loss became NaN or infinite.
        DataError: the data is empty or cannot be read.
    """
    check_hooks(job.hooks)
    config, model = job.run_config, job.model
    state, position = _resume(job)
    last = _last_step(config, state)
    error: BaseException | None = None
    reason: str | None = None
    begun: list[Hook] = []
    for exporter in job.exporters:
        exporter.begin(state)
    try:
        for hook in job.hooks:
            reason = hook.train_begin(config, state, last) or reason
            begun.append(hook)
        _hook_states(job)  # what JSON cannot hold shows now, not at the first checkpoint
        batches = _last_marked(job.train_dataset.iterate(position, seed=config.seed), state)
        with contextlib.closing(batches), _catch_signals() as caught:
            if state.evaluation_due:
                state, asked = _evaluate(job, state, caught)
                reason = asked or reason
                _save(job, state, position)
                if caught:
                    raise _interrupted(caught[0], state)
            if last is not None and state.step >= last:
                reason = f"step {last} is already reached"
            if reason is not None:
                log.info("nothing to do: %s", reason)
                return state
            model.mode = RunMode.TRAIN
            for columns, position, is_last in batches:
                for hook in job.hooks:
                    hook.step_begin(state)
                result = _step(job, state, Batch.of(model, columns))
                state = _advanced(state, result, job.train_dataset.epoch(position))
                reason = _asked([hook.step_end(state, result) for hook in job.hooks])
                done = is_last or state.step == last or reason is not None
                try:
                    if _due(config.eval_steps, config, state, done):
                        state = dataclasses.replace(state, evaluation_due=True)
                        state, asked = _evaluate(job, state, caught)
                        reason = asked or reason
                        done = done or reason is not None
                finally:  # a failing export must not cost the steps
                    if caught or _due(config.save_steps, config, state, done):
                        _save(job, state, position)
                if caught:
                    raise _interrupted(caught[0], state)
                if done:
                    break
        if reason is not None:
            log.info("stopped at step %d: %s", state.step, reason)
        return state
    except BaseException as raised:
        error = raised
        raise
    finally:
        _end(begun, state, error)


def _resume(job: Job) -> tuple[RunState, Any]:
    """Takes up the newest whole checkpoint, if there is one."""
    checkpoint = job.checkpointer.load_latest()
    if checkpoint is None:
        return RunState(), None
    source = job.checkpointer.path(checkpoint.state.step)
    set_weights(job.model, checkpoint.model, source)
    set_optimizer_tensors(job.optimizer, job.model, checkpoint.optimizer)
    schedule = schedule_of(job.optimizer)
    if schedule is not None:
        schedule.set_state_dict(dict(checkpoint.schedule))
    for hook in job.hooks:
        if hook.name in checkpoint.hooks:
            hook.load_state_dict(checkpoint.hooks[hook.name])
    log.info("resumed from %s", source)
    return checkpoint.state, checkpoint.position


def _last_step(config: RunConfig, state: RunState) -> int | None:
    ends = [config.max_steps, None if config.run_steps is None else state.step + config.run_steps]
    return min((end for end in ends if end is not None), default=None)


def _last_marked(
    items: Generator[tuple[Any, Any], None, None], state: RunState
) -> Generator[tuple[Any, Any, bool], None, None]:
    """Marks the last batch: one is read ahead, since the last step must evaluate and save."""
    with contextlib.closing(items):
        held = next(items, None)
        if held is None and state.step > 0:
            log.info("nothing to do: the training data ended at step %d", state.step)
            return
        if held is None:
            raise DataError("The training data gave no batch. Is it empty, or smaller than one batch?")
        for item in items:
            yield *held, False
            held = item
        yield *held, True


def _step(job: Job, state: RunState, batch: Batch) -> StepResult:
    _seed(job.run_config.seed, state.step)
    learning_rate = job.optimizer.get_lr()
    try:
        loss = job.step_strategy(job.model, job.optimizer, batch)
    except FloatingPointError as error:
        saved = job.checkpointer.steps()
        kept = job.checkpointer.path(saved[-1]) if saved else "none was saved yet"
        raise NonFiniteLossError(
            f"The loss is {error} at step {state.step + 1} (learning rate {learning_rate:.3g}). "
            f"Last good checkpoint: {kept}. Try a lower learning rate, or look at that batch."
        ) from error
    schedule = schedule_of(job.optimizer)
    if schedule is not None:
        schedule.step()
    return StepResult(loss, learning_rate, batch.num_examples, batch.num_tokens)


def _seed(seed: int, step: int) -> None:
    """Makes dropout and the like a function of (seed, step), so that a resume needs no generator state."""
    paddle.seed((seed << 32) + step)
    np.random.seed(np.random.SeedSequence([seed, step]).generate_state(4))
    random.seed((seed << 32) + step)


def _advanced(state: RunState, result: StepResult, epoch: int) -> RunState:
    return RunState(
        step=state.step + 1,
        epoch=epoch,
        examples=state.examples + result.num_examples,
        tokens=state.tokens + result.num_tokens,
    )


def _asked(reasons: Sequence[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _evaluate(job: Job, state: RunState, caught: Sequence[int]) -> tuple[RunState, str | None]:
    """Evaluates every set, exports what is better, tells the hooks.

    Returns:
        The state, in which an evaluation is no longer due unless a signal cut it short, and a hook's
        reason to stop.
    """
    config = job.run_config
    try:
        results = evaluate_all(
            job.model, job.eval_datasets, config.eval_max_steps, state.step, stop=lambda: bool(caught)
        )
    except CutShort:
        return state, None
    if results:
        columns = next(iter(next(iter(job.eval_datasets.values()))))
        for exporter in job.exporters:
            exporter.export(job.model, state, results, columns)
    state = dataclasses.replace(state, evaluation_due=False)
    return state, _asked([hook.eval_end(state, results) for hook in job.hooks]) if results else None


def _due(every: int, config: RunConfig, state: RunState, done: bool) -> bool:
    return done or (state.step % every == 0 and state.step >= config.skip_steps)


def _save(job: Job, state: RunState, position: Any) -> None:
    weights = job.model.state_dict()
    bad = [name for name, tensor in weights.items() if not paddle.isfinite(tensor.sum()).item()]
    if bad:
        raise NonFiniteLossError(
            f"After step {state.step} these weights are not finite: {', '.join(bad[:5])}; they were not "
            "saved, so the last checkpoint is the last good one. Try a lower learning rate."
        )
    path = job.checkpointer.save(
        Checkpoint(
            state=state,
            position=position,
            model=weights,
            optimizer=optimizer_tensors(job.optimizer, job.model),
            schedule=schedule_state(job.optimizer),
            hooks=_hook_states(job),
        )
    )
    for hook in job.hooks:
        hook.checkpoint_saved(state, path)


def _hook_states(job: Job) -> dict[str, Any]:
    """The state of each hook by its name.

    Raises:
        ConfigError: JSON cannot hold it.
    """
    states = {hook.name: hook.state_dict() for hook in job.hooks}
    atomic.to_json(states)
    return states


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM for the next step boundary; the second one ends at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, previous[number])
        # Not by the log: the handler may have interrupted it.
        os.write(2, b"stopping after this step, with a checkpoint; once more ends at once, without\n")

    for number in previous:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupted(signum: int, state: RunState) -> Interrupted:
    return Interrupted(
        f"Stopped by {signal.Signals(signum).name} at step {state.step}; the checkpoint is saved. "
        "The same command goes on from there.",
        signum,
    )


def _end(hooks: Sequence[Hook], state: RunState, error: BaseException | None) -> None:
    """Runs every hook's `train_end`, each whether or not another failed.

    The first failure is raised, unless the run itself failed: then that error is the one to see.
    """
    failures = []
    for hook in hooks:
        try:
            hook.train_end(state, error)
        except Exception as failure:
            log.error("train_end of the hook %s failed: %r", hook.name, failure, exc_info=failure)
            failures.append(failure)
    if failures and error is None:
        raise failures[0]
