"""How a run is saved and taken up again: rank 0 has the files, all ranks get what is in them."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import numpy as np

from propeller import atomic
from propeller.data import difference
from propeller.errors import ConfigError, NonFiniteLossError, RankError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.averaging import WeightAverage
from propeller.paddle.train.checkpoint import (
    Checkpoint,
    make_accumulators,
    optimizer_tensors,
    schedule_of,
    schedule_state,
    set_optimizer_tensors,
    set_weights,
)
from propeller.paddle.train.job import Job
from propeller.types import RunState

log = logging.getLogger("propeller")


def take_up(job: Job) -> tuple[RunState, Any]:
    """Goes on from the newest whole checkpoint, if there is one; all ranks then have rank 0's weights.

    Returns:
        How far the run is, and where its data goes on; None for the beginning.

    Raises:
        ConfigError: the run began with other data, or another model.
        CheckpointError: there are checkpoints, and none can be used.
    """
    ranks, model, optimizer = job.ranks, job.model, job.optimizer
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    ranks.check_same([job.data, model.identity, shapes], "Training data, seed or model")
    checkpoint = job.checkpointer.load_latest() if ranks.is_main else None
    if checkpoint is not None:
        _check_same(job, checkpoint)
        source = job.checkpointer.path(checkpoint.state.step)
        set_weights(model, checkpoint.model, source)
        set_optimizer_tensors(optimizer, model, checkpoint.optimizer)
        log.info("resumed from %s", source)
    found: Any = None
    if checkpoint is not None:
        found = {
            **checkpoint.values(),
            "optimizer": list(checkpoint.optimizer),
            "average": bool(checkpoint.average),
        }
    found = ranks.broadcast(found)
    if found is not None and not ranks.is_main:
        make_accumulators(optimizer, model, found["optimizer"])
    tensors = {**model.state_dict(), **optimizer_tensors(optimizer, model)}
    ranks.broadcast_tensors([tensors[name] for name in sorted(tensors)])
    if job.run_config.ema_decay is not None:
        job.average = WeightAverage(model, job.run_config.ema_decay)
        if found is not None and found["average"]:
            averages = checkpoint.average if checkpoint is not None else job.average.tensors()
            job.average.load(averages, found["average_updates"])
            ranks.broadcast_tensors(list(job.average.tensors().values()))
    if found is None:
        return RunState(), None
    schedule = schedule_of(optimizer)
    if schedule is not None:
        schedule.set_state_dict(found["schedule"])
        if isinstance(schedule, paddle.optimizer.lr.LambdaDecay):
            schedule.last_lr = schedule.get_lr()  # of the peak and the length that it has now
    job.precision.load(found["scaler"])
    for hook in job.hooks:
        if hook.name in found["hooks"]:
            hook.load_state_dict(found["hooks"][hook.name])
    return RunState(**found["run"]), found["position"]


def _check_same(job: Job, checkpoint: Checkpoint) -> None:
    """Refuses to go on over other data or with another model: the result would be neither run's."""
    problems = []
    changed = difference(checkpoint.data, job.data)
    if changed is not None:
        problems.append(f"its training data or its batches ({changed})")
    identity = json.loads(atomic.to_json(job.model.identity))
    for name in sorted({*checkpoint.identity, *identity}):
        before, now = checkpoint.identity.get(name), identity.get(name)
        if before != now:
            problems.append(f"its model ({name}: {_short(before)} -> {_short(now)})")
    if problems:
        raise ConfigError(
            f"The run in {job.run_config.model_dir} cannot go on from step {checkpoint.state.step}: "
            f"{' and '.join(problems)} changed. Bring back what it began with, choose another model_dir, or "
            "begin anew with --restart, which keeps this folder aside."
        )


def _short(value: Any) -> str:
    return f"{value!r:.80}"


def save(job: Job, state: RunState, position: Any) -> None:
    """Saves a checkpoint. Called by all ranks.

    Raises:
        NonFiniteLossError: a weight is NaN or infinite; nothing was saved.
        RankError: the ranks have different weights, which must never be.
        CheckpointError: it cannot be written.
    """
    with job.profiler.span("checkpoint"):
        _check_alike(job, state)
        if job.ranks.is_main:
            write(job, state, position)
        else:
            _check_finite(job, state)  # as rank 0, so that all say the same


def _check_finite(job: Job, state: RunState) -> None:
    bad = [
        name
        for name, parameter in job.model.named_parameters()
        if parameter.is_floating_point() and not paddle.isfinite(parameter.sum()).item()
    ]
    if bad:
        raise NonFiniteLossError(
            f"After step {state.step} these weights are not finite: {', '.join(bad[:5])}; they were not "
            "saved, so the last checkpoint is the last good one. Try a lower learning rate."
        )


def _check_alike(job: Job, state: RunState) -> None:
    """Makes sure that the ranks have the same weights: sums of the same bits are equal."""
    if job.ranks.size == 1:
        return
    sums = {name: parameter.sum().item() for name, parameter in job.model.named_parameters()}
    own = np.array(list(sums.values()), np.float64)
    for rank, other in enumerate(job.ranks.gather({"sums": own})):
        same = np.equal(other["sums"], own) | (np.isnan(own) & np.isnan(other["sums"]))
        differing = [name for name, alike in zip(sums, same, strict=True) if not alike]
        if differing:
            raise RankError(
                f"After step {state.step} the ranks {job.ranks.rank} and {rank} have different weights: "
                f"{', '.join(differing[:5])}. Does the model change them outside its optimizer?"
            )


def share_buffers(job: Job) -> None:
    """Gives all ranks rank 0's buffers, and what no gradient changes.

    The running means of a batch norm, which are parameters to Paddle, are each rank's own. Frozen weights are
    the same on all, and are not sent.
    """
    if job.ranks.size == 1:
        return
    untrained = [p for name, p in job.model.named_parameters() if name not in job.parameters]
    own = np.array([parameter.sum().item() for parameter in untrained], np.float64)
    sums = np.stack([found["sums"] for found in job.ranks.gather({"sums": own})])
    changed = ~(sums == sums[0]).all(axis=0)  # the same on all ranks
    job.ranks.broadcast_tensors([*job.model.buffers(), *itertools.compress(untrained, changed)])


def write(job: Job, state: RunState, position: Any) -> None:
    """Writes a checkpoint, without a word to the other ranks; for rank 0.

    Raises:
        NonFiniteLossError: a weight is NaN or infinite; nothing was saved.
        CheckpointError: it cannot be written.
    """
    _check_finite(job, state)
    path = job.checkpointer.save(
        Checkpoint(
            state=state,
            position=position,
            data=job.data,
            identity=job.model.identity,
            model=job.model.state_dict(),
            optimizer=optimizer_tensors(job.optimizer, job.model),
            schedule=schedule_state(job.optimizer),
            scaler=job.precision.state(),
            average={} if job.average is None else job.average.tensors(),
            average_updates=0 if job.average is None else job.average.num_updates,
            hooks=hook_states(job),
        )
    )
    for hook in job.hooks:
        hook.checkpoint_saved(state, path)


def hook_states(job: Job) -> dict[str, Any]:
    """The state of each hook by its name.

    Raises:
        ConfigError: JSON cannot hold it.
    """
    states = {hook.name: hook.state_dict() for hook in job.hooks}
    atomic.to_json(states)
    return states
