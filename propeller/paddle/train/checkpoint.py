"""Checkpoints: everything an exact resume needs, whole on disk or not there at all.

    model_dir/checkpoints/step_00000100/
        model.safetensors       parameters and buffers by structured name
        optimizer.safetensors   accumulators as `parameter name|accumulator`
        average.safetensors     averages of the weights, where the run makes them
        state.json              run state, data and position in it, identity of the model, schedule, loss
                                scale, hooks
        manifest.json           format version, sizes and sha256 of the others; written last

The folder is written aside, synced and renamed once, so a run killed at any instant leaves the last
complete one. A step that is saved once more, since its evaluation was made up for, stands beside the first as
`step_00000100.new` until that is removed. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.paddle

from propeller import atomic, manifest
from propeller.errors import CheckpointError
from propeller.manifest import AGAIN, CHECKPOINTS, STATE, STEP, list_checkpoints
from propeller.paddle.runtime import paddle
from propeller.types import RunState

log = logging.getLogger("propeller")

MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"

Tensors = dict[str, "paddle.Tensor"]

_VALUES = ("position", "data", "identity", "schedule", "scaler", "average_updates", "hooks")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint in memory.

    Attributes:
        state: how far the run had come.
        position: where the training data goes on.
        data: `Dataset.signature` of the training data and the seed of its order, to which the position
            belongs.
        identity: `Model.identity`.
        model: parameters and buffers.
        optimizer: accumulators, see `optimizer_tensors`.
        schedule: state of the learning-rate schedule.
        scaler: state of the loss scale; empty without one.
        average: averages of the weights; empty where the run makes none.
        average_updates: how often these were updated.
        hooks: state of each hook by its name.
    """

    state: RunState
    position: Any
    data: Sequence[Any]
    identity: Mapping[str, Any]
    model: Tensors
    optimizer: Tensors
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any]
    average: Tensors
    average_updates: int
    hooks: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """All that is no tensor, as `state.json` holds it."""
        return {
            "run": dataclasses.asdict(self.state),
            **{name: getattr(self, name) for name in _VALUES},
        }


class Checkpointer:
    """Saves, lists, verifies and loads the checkpoints of one run.

    Args:
        model_dir: the run's folder.
        max_ckpt: keep the newest so many; two complete ones are always kept, so that a damaged
            newest one does not end the run.
    """

    def __init__(self, model_dir: str | Path, max_ckpt: int):
        self.folder = Path(model_dir) / CHECKPOINTS
        self.max_ckpt = max(2, max_ckpt)
        self._damaged: set[int] = set()

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and drops the oldest beyond `max_ckpt`.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; what was there stays.
        """
        target = self._place(checkpoint.state.step)
        try:
            self._tidy()
            # There may be a damaged one that the resume went behind, or the same one.
            is_again = target.is_dir()
            with atomic.new_folder(target.with_name(target.name + AGAIN) if is_again else target) as folder:
                safetensors.paddle.save_file(checkpoint.model, str(folder / MODEL))
                safetensors.paddle.save_file(checkpoint.optimizer, str(folder / OPTIMIZER))
                if checkpoint.average:
                    safetensors.paddle.save_file(checkpoint.average, str(folder / AVERAGE))
                (folder / STATE).write_text(atomic.to_json(checkpoint.values(), indent=1), "utf-8")
                manifest.write(folder, paddle=paddle.__version__)
            self._tidy()
            self._damaged.discard(checkpoint.state.step)
            whole = [step for step in self.steps() if step not in self._damaged]
            for old in whole[: -self.max_ckpt]:
                shutil.rmtree(self.path(old))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"Could not save {target}: {error}. Earlier checkpoints are untouched."
            ) from error
        return target

    def _tidy(self) -> None:
        """Ends what a save has begun, if need be one that was killed; the run's lock keeps others out."""
        for cut in self.folder.glob(f".{STEP}*"):
            shutil.rmtree(cut)
        for again in self.folder.glob(f"{STEP}*{AGAIN}"):
            first = again.with_suffix("")
            if first.exists():
                shutil.rmtree(first)
            again.rename(first)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        return [*list_checkpoints(self.folder.parent)]

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return list_checkpoints(self.folder.parent).get(step, self._place(step))

    def _place(self, step: int) -> Path:
        return self.folder / f"{STEP}{step:08d}"

    def load(self, step: int) -> Checkpoint:
        """Loads the checkpoint of one step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if step not in self.steps():
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {self.steps()}.")
        return load_checkpoint(self.path(step))

    def load_latest(self) -> Checkpoint | None:
        """Loads the newest checkpoint that is whole; a damaged one is named and passed over.

        Returns:
            The checkpoint, None when the run has none.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return load_checkpoint(self.path(step))
            except CheckpointError as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                problems.append(str(error))
                self._damaged.add(step)  # it does not count among those that are kept
        if problems:
            raise CheckpointError(
                "No checkpoint can be loaded. " + " ".join(problems) + " Bring one back, choose another "
                "model_dir, or begin anew with --restart, which keeps this folder aside."
            )
        return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verifies and loads one checkpoint folder.

    Raises:
        CheckpointError: it is damaged; the file is named.
    """
    manifest.verify(folder)
    values = json.loads((folder / STATE).read_text("utf-8"))
    average = folder / AVERAGE
    return Checkpoint(
        state=RunState(**values.pop("run")),
        model=safetensors.paddle.load_file(str(folder / MODEL)),
        optimizer=safetensors.paddle.load_file(str(folder / OPTIMIZER)),
        average=safetensors.paddle.load_file(str(average)) if average.exists() else {},
        **values,
    )


def set_weights(layer: paddle.nn.Layer, tensors: Mapping[str, Any], source: str | Path) -> None:
    """Sets every parameter and buffer of a layer.

    Raises:
        CheckpointError: a name is missing or left over, or a shape differs; all are listed.
    """
    own = layer.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"left over: {name}" for name in tensors if name not in own]
    problems += [
        f"{name}: {list(tensors[name].shape)} where the model has {list(own[name].shape)}"
        for name in own
        if name in tensors and list(tensors[name].shape) != list(own[name].shape)
    ]
    if problems:
        raise CheckpointError(
            f"The weights in {source} do not fit the model (was its configuration changed?): "
            + "; ".join(problems)
        )
    layer.set_state_dict(dict(tensors))


def _accumulator_names(optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer) -> dict[str, str]:
    """Paddle's name of each accumulator -> `parameter|accumulator`, which is stable across processes.

    Paddle joins the parameter's own name, the accumulator's and a counter: `linear_0.w_0_moment1_0`.
    """
    structured = {parameter.name: name for name, parameter in model.named_parameters()}
    names = {}
    for key, value in optimizer.state_dict().items():
        if isinstance(value, paddle.Tensor):
            owner = max((name for name in structured if key.startswith(name + "_")), key=len)
            accumulator = key[len(owner) + 1 :].rpartition("_")[0]
            names[key] = f"{structured[owner]}|{accumulator}"
    return names


def optimizer_tensors(optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer) -> Tensors:
    """The optimizer's accumulators by stable name."""
    state = optimizer.state_dict()
    return {name: state[key] for key, name in _accumulator_names(optimizer, model).items()}


def set_optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer, tensors: Mapping[str, Any]
) -> None:
    """Sets the accumulators of an optimizer that has not made a step yet.

    Raises:
        CheckpointError: the accumulators are not the saved ones.
    """
    names = make_accumulators(optimizer, model, tensors)
    optimizer.set_state_dict(
        {**{key: tensors[name] for key, name in names.items()}, "LR_Scheduler": schedule_state(optimizer)}
    )
    # Paddle keeps this second copy, and would look there for a parameter whose first gradient is to come.
    optimizer._accumulators_holder = {}


def make_accumulators(
    optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer, wanted: Collection[str]
) -> dict[str, str]:
    """Makes the accumulators of an optimizer that has not made a step yet.

    They otherwise come with the first step, under names nobody can foretell, for the parameters that it
    updates: one that never got a gradient has none.

    Args:
        optimizer, model: as they are.
        wanted: the accumulators' stable names.

    Returns:
        Paddle's name of each -> the stable one.

    Raises:
        CheckpointError: the optimizer makes others.
    """
    block = paddle.static.default_main_program().global_block()
    owners = {name.rpartition("|")[0] for name in wanted}
    updated = [p for name, p in model.named_parameters() if name in owners and not p.stop_gradient]
    optimizer._create_accumulators(block, updated)
    names = _accumulator_names(optimizer, model)
    if set(names.values()) != set(wanted):
        differing = sorted(set(names.values()) ^ set(wanted))
        raise CheckpointError(
            f"The saved optimizer state does not fit the optimizer; it differs in {len(differing)} "
            f"accumulators, such as {', '.join(differing[:5])}. (Were other parameters frozen?)"
        )
    return names


def schedule_of(optimizer: paddle.optimizer.Optimizer) -> paddle.optimizer.lr.LRScheduler | None:
    """The learning-rate schedule of an optimizer, None for a constant rate."""
    rate = optimizer._learning_rate
    return rate if isinstance(rate, paddle.optimizer.lr.LRScheduler) else None


def schedule_state(optimizer: paddle.optimizer.Optimizer) -> dict[str, Any]:
    """JSON-able state of the schedule, empty for a constant rate."""
    schedule = schedule_of(optimizer)
    return {} if schedule is None else dict(schedule.state_dict())
