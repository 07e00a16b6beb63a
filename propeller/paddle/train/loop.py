"""The training loop, in the order in which things happen.

    train_begin
    for each batch:
        step_begin
        seed -> the step (see `step`) -> schedule
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

All ranks run this in step. What only one of them knows, a signal or a hook's wish to stop, they agree on at
the end of a step and of an evaluation. Hooks, exports and files are rank 0's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
import re
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from propeller import signals
from propeller.errors import DataError, Interrupted, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.paddle.train import saving
from propeller.paddle.train.checkpoint import schedule_of
from propeller.paddle.train.evaluation import CutShort, Results, evaluate_all
from propeller.paddle.train.hooks import Hook, StepResult
from propeller.paddle.train.job import Job
from propeller.types import RunConfig, RunMode, RunState

log = logging.getLogger("propeller")

# What Paddle says of an operation, where check_numerics has it look.
_NOT_FINITE = re.compile(r"There are NAN or INF .*?\]")
_PATIENCE_S = 5.0


def train(job: Job, state: RunState, position: Any) -> RunState:
    """Trains until the last step, the end of the data, or somebody asks to stop.

    Args:
        job: the run.
        state: how far it is; see `saving.take_up`.
        position: where its data goes on.

    Returns:
        The state reached.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
        NonFiniteLossError: the loss became NaN or infinite.
        DataError: the data is empty or cannot be read.
        RankError: another rank failed.
    """
    config = job.run_config
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
        saving.hook_states(job)  # what JSON cannot hold shows now, not at the first checkpoint
        batches = _last_marked(job.train_dataset.iterate(position, seed=config.seed), state)
        with contextlib.closing(batches), _catch_signals(once=job.ranks.size == 1) as caught:
            if state.evaluation_due:
                state, results = _evaluate(job, state, caught)
                reason, signum = _heard(job, state, results, reason, caught)
                saving.save(job, state, position)
                if signum:
                    raise _interrupted(signum, state)
            if is_over(config, state):
                reason = f"step {last} is already reached (the run is at step {state.step})"
            reason, _ = _agreed(job, reason, ())
            if reason is not None:
                log.info("nothing to do: %s", reason)
                return state
            job.model.mode = RunMode.TRAIN
            # A run that failed between two backward passes has left some.
            job.model.clear_gradients(set_to_zero=False)
            for columns, position, is_last in _timed(job, batches):
                state, result = _advance(job, state, columns, position)
                with job.profiler.span("hooks"):
                    reason = _asked([hook.step_end(state, result) for hook in job.hooks])
                end = is_last or state.step == last
                state, reason, signum = _settle(job, state, position, reason, caught, end=end)
                job.profiler.step_done()
                if signum:
                    raise _interrupted(signum, state)
                if end or reason is not None:
                    break
        if reason is not None:
            log.info("stopped at step %d: %s", state.step, reason)
        return state
    except BaseException as raised:
        error = raised
        raise
    finally:
        _end(begun, state, error)


def _advance(
    job: Job, state: RunState, columns: Mapping[str, Any], position: Any
) -> tuple[RunState, StepResult]:
    """Makes one step and counts it."""
    with job.profiler.span("hooks"):
        for hook in job.hooks:
            hook.step_begin(state)
    result = _step(job, state, columns)
    state = RunState(
        step=state.step + 1,
        epoch=job.train_dataset.epoch(position),
        examples=state.examples + result.num_examples,
        tokens=state.tokens + result.num_tokens,
    )
    return state, result


def _settle(
    job: Job, state: RunState, position: Any, reason: str | None, caught: Sequence[int], *, end: bool
) -> tuple[RunState, str | None, int]:
    """Evaluates and saves, where that is due after a step.

    Returns:
        The state, the reason to stop if there is one, and the signal or 0; the same on all ranks.
    """
    config = job.run_config
    with job.profiler.span("communication"):
        reason, signum = _agreed(job, reason, caught)
    evaluates = _due(config.eval_steps, config, state, end or reason is not None)
    if evaluates or signum or _due(config.save_steps, config, state, False):
        saving.share_buffers(job)
    if evaluates:
        state = dataclasses.replace(state, evaluation_due=True)
        try:
            state, results = _evaluate(job, state, caught)
        except Exception:  # a failing export must not cost the steps
            if job.ranks.is_main:
                saving.write(job, state, position)
            raise
        # Beyond this a failure costs the steps since the last checkpoint: hooks must not hear of it twice.
        reason, signum = _heard(job, state, results, reason, caught)
    if signum or _due(config.save_steps, config, state, end or reason is not None):
        saving.save(job, state, position)
    return state, reason, signum


def _agreed(job: Job, reason: str | None, caught: Sequence[int]) -> tuple[str | None, int]:
    """What all ranks know after this: whether to stop, and the signal that one of them caught, or 0."""
    stop, signum = job.ranks.max([reason is not None, caught[0] if caught else 0])
    return reason or ("rank 0 asked for it" if stop else None), signum


def is_over(config: RunConfig, state: RunState) -> bool:
    """Whether a run has nothing left to do: its last step is made, and evaluated."""
    last = _last_step(config, state)
    return last is not None and state.step >= last and not state.evaluation_due


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


def _timed(
    job: Job, batches: Iterator[tuple[Any, Any, bool]]
) -> Iterator[tuple[Mapping[str, Any], Any, bool]]:
    """The same, waiting for each measured."""
    while True:
        with job.profiler.span("data"):
            item = next(batches, None)
        if item is None:
            return
        yield item


def _step(job: Job, state: RunState, columns: Mapping[str, Any]) -> StepResult:
    config, optimizer = job.run_config, job.optimizer
    _seed(config.seed, state.step, job.ranks.rank)
    learning_rate = optimizer.get_lr()
    step = job.step(columns)
    try:
        with _checked_numerics(config.check_numerics):
            loss = job.step_strategy(step)
    except DataError as error:
        raise DataError(f"At step {state.step + 1}: {error}") from error
    except (FloatingPointError, RuntimeError) as error:
        found = _NOT_FINITE.search(str(error))
        if not isinstance(error, FloatingPointError) and found is None:
            raise
        saved = job.checkpointer.steps()
        kept = job.checkpointer.path(saved[-1]) if saved else "none was saved yet"
        what = error if found is None else found[0]
        more = (
            "" if config.check_numerics else "; check_numerics in the run configuration names the operation"
        )
        raise NonFiniteLossError(
            f"{what} at step {state.step + 1} (learning rate {learning_rate:.3g}). Last good checkpoint: "
            f"{kept}. Try a lower learning rate, or look at that batch{more}."
        ) from error
    with job.profiler.span("optimizer"):
        schedule = schedule_of(optimizer)
        if schedule is not None:
            schedule.step()
        if job.average is not None and step.updated:
            job.average.update()
    return StepResult(loss, learning_rate, step.num_examples, step.num_tokens)


@contextlib.contextmanager
def _checked_numerics(wanted: bool) -> Iterator[None]:
    """Has Paddle look at the result of every operation of a step, where `wanted`.

    Not of an export: the look fails within oneDNN's kernels.
    """
    if wanted:
        paddle.set_flags({"FLAGS_check_nan_inf": True})
    try:
        yield
    finally:
        if wanted:
            paddle.set_flags({"FLAGS_check_nan_inf": False})


def _seed(seed: int, step: int, rank: int) -> None:
    """Makes dropout and the like a function of (seed, step, rank): a resume needs no generator state.

    Ranks never share a dropout mask.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    np.random.seed(words)
    number = int(words[0]) << 31 | int(words[1]) >> 1  # Paddle takes what an int64 holds
    paddle.seed(number)
    random.seed(number)


def _asked(reasons: Sequence[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _evaluate(job: Job, state: RunState, caught: Sequence[int]) -> tuple[RunState, Results]:
    """Evaluates every set, and exports what is better.

    Returns:
        The state, in which an evaluation is no longer due unless a signal cut it short, and the results;
        none if it was cut short.
    """
    config = job.run_config
    try:
        with job.profiler.span("evaluation"), _averages(job):
            results = evaluate_all(
                job.model,
                job.eval_datasets,
                config.eval_max_steps,
                state.step,
                ranks=job.ranks,
                stop=lambda: bool(caught),
            )
            if results and job.exporters:
                with job.profiler.span("export"):
                    for exporter in job.exporters:
                        exporter.export(job.model, state, results, job.probe)
    except CutShort:
        return state, {}
    return dataclasses.replace(state, evaluation_due=False), results


def _heard(
    job: Job, state: RunState, results: Results, reason: str | None, caught: Sequence[int]
) -> tuple[str | None, int]:
    """Tells the hooks of an evaluation; returns what all ranks then agree on."""
    with job.profiler.span("hooks"):
        asked = _asked([hook.eval_end(state, results) for hook in job.hooks]) if results else None
    return _agreed(job, asked or reason, caught)


def _averages(job: Job) -> contextlib.AbstractContextManager[None]:
    """Puts the averages of the weights, where there are any, into the model for the block."""
    return contextlib.nullcontext() if job.average is None else job.average.applied()


def _due(every: int, config: RunConfig, state: RunState, done: bool) -> bool:
    return done or (state.step % every == 0 and state.step >= config.skip_steps)


@contextlib.contextmanager
def _catch_signals(*, once: bool) -> Iterator[list[int]]:
    """Collects the signals that ask to end for the next step boundary; a second one ends at once.

    Args:
        once: whether the second one counts at any time. A launcher of several ranks repeats its own within
            a second: of ranks only one that comes after `_PATIENCE_S` counts. So it is with SIGHUP, which a
            shell and the system both send when a terminal goes away.
    """
    caught: list[int] = []
    deadline = math.inf

    def note(number: int, frame: Any) -> None:
        nonlocal deadline
        caught.append(number)
        if once and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, previous[number])
            with contextlib.suppress(OSError):  # nobody may be there to read it
                # Not by the log: the handler may have interrupted it.
                os.write(2, b"stopping after this step, with a checkpoint; once more ends at once, without\n")
        elif time.monotonic() > deadline:  # a rank that hangs must not be deaf
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            deadline = min(deadline, time.monotonic() + _PATIENCE_S)

    with signals.handled(note) as previous:
        try:
            yield caught
        except Interrupted:
            if not once:  # the launcher repeats its signal until every rank has ended
                previous.update(dict.fromkeys(previous, signal.SIG_IGN))
            raise


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
