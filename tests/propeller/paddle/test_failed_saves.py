"""A disk that is full or cannot be written: the error names the folder, what was saved before stays."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from pathlib import Path

import pytest

import propeller.paddle as propeller
from propeller.errors import CheckpointError, NonFiniteLossError
from propeller.paddle.train.checkpoint import Checkpointer, load_checkpoint
from propeller.types import RunMode

HPARAMS = {"dropout": 0.3}
resource = pytest.importorskip("resource")  # Windows has none


def folder_of(config, step):
    return Path(config.model_dir) / "checkpoints" / f"step_{step:08d}"


def names_in(config):
    """All there is in the folder of checkpoints, hidden ones included."""
    return sorted(path.name for path in (Path(config.model_dir) / "checkpoints").iterdir())


CODE = """
import resource

class Full(propeller.Hook):
    '''From the first checkpoint on no file can grow beyond a limit.'''
    name = "full"
    def checkpoint_saved(self, state, path):
        limit = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def main():
    config = propeller.RunConfig.from_dict(json.loads(sys.argv[2]))
    learner = propeller.Learner(toy.Bags, config, {"dropout": 0.3})
    learner.train(toy.make_train_data(), hooks=[Full()])

cli.run(main)
"""


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_is_full(
    toy, run_config, train_data, tmp_path, start_child, file, weights_of, assert_same_bits
):
    """A real one in a real process: the system refuses to let the file grow (EFBIG)."""
    config = run_config(max_steps=6, save_steps=2)
    straight = dataclasses.replace(config, model_dir=str(tmp_path / "straight"))
    undisturbed = propeller.Learner(toy, straight, HPARAMS)
    undisturbed.train(train_data)
    limit = (folder_of(straight, 2) / file).stat().st_size - 1
    child = start_child(CODE, config, limit)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1, said
    error = said.splitlines()[-1]
    assert error.startswith(f"error: Could not save {folder_of(config, 4)}: ")
    assert "File too large" in error and error.endswith("Earlier checkpoints are untouched.")
    assert "Traceback" not in said
    assert names_in(config) == ["step_00000002"], "and nothing half-written beside it"
    latest = Checkpointer(config.model_dir, 3).load_latest()
    assert latest is not None and latest.state.step == 2
    learner = propeller.Learner(toy, config, HPARAMS)
    assert learner.train(train_data).step == 6
    assert_same_bits(weights_of(learner.model), weights_of(undisturbed.model))


@pytest.fixture
def saved(toy, run_config, train_data):
    """A run with one checkpoint, of step 2, and that checkpoint."""
    config = run_config(max_steps=4, save_steps=2)
    propeller.Learner(toy, dataclasses.replace(config, run_steps=2), HPARAMS).train(train_data)
    return config, load_checkpoint(folder_of(config, 2))


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*args, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("place", "failure", "said"),
    [
        ("os.fsync", full, "No space left on device"),
        ("safetensors.paddle.save_file", full, "No space left on device"),
        ("propeller.manifest.write", full, "No space left on device"),
        ("pathlib.Path.rename", read_only, "Read-only file system"),
        ("os.mkdir", read_only, "Read-only file system"),
    ],
)
def test_a_save_that_fails_anywhere(saved, toy, train_data, monkeypatch, place, failure, said):
    """Where the save of a later step breaks off, or that of the same step once more."""
    config, checkpoint = saved
    for step in (2, 4):
        state = dataclasses.replace(checkpoint.state, step=step)
        with monkeypatch.context() as patch:
            patch.setattr(place, failure)
            with pytest.raises(CheckpointError) as caught:
                Checkpointer(config.model_dir, 3).save(dataclasses.replace(checkpoint, state=state))
        assert str(folder_of(config, step)) in str(caught.value) and said in str(caught.value)
        assert names_in(config) == ["step_00000002"]
        assert load_checkpoint(folder_of(config, 2)).state == checkpoint.state
    assert propeller.Learner(toy, config, HPARAMS).train(train_data).step == 4


def test_the_same_step_once_more_takes_the_place(saved):
    config, checkpoint = saved
    (folder_of(config, 2) / "left.txt").write_text("of the first")
    checkpoints = Checkpointer(config.model_dir, 3)
    checkpoints.save(dataclasses.replace(checkpoint, state=dataclasses.replace(checkpoint.state, tokens=7)))
    assert names_in(config) == ["step_00000002"]
    assert not (folder_of(config, 2) / "left.txt").exists()
    assert checkpoints.load(2).state.tokens == 7


class Killed(BaseException):
    """As by kill -9: nothing of what would be tidied up happens any more."""


def kill_at(patch, number):
    """From the `number`-th rename or removal on nothing reaches the disk."""
    calls = itertools.count()

    def cut(real):
        def call(*args, **options):
            if next(calls) >= number:
                raise Killed
            return real(*args, **options)

        return call

    for owner, name in ((Path, "rename"), (os, "unlink"), (os, "rmdir")):
        patch.setattr(owner, name, cut(getattr(owner, name)))


def test_killed_anywhere_in_a_save_of_the_same_step(saved, monkeypatch):
    """One of the two is loaded, also where there is no other checkpoint; what was left goes with the next."""
    config, first = saved
    second = dataclasses.replace(first, state=dataclasses.replace(first.state, tokens=7))
    found, left = [], set()
    for number in itertools.count():
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                Checkpointer(config.model_dir, 3).save(second)
                break
            except Killed:
                left.update(name for name in names_in(config) if not name.startswith("."))
        latest = Checkpointer(config.model_dir, 3).load_latest()
        assert latest is not None
        found.append(latest.state)
        Checkpointer(config.model_dir, 3).save(first)
        assert names_in(config) == ["step_00000002"]
        assert load_checkpoint(folder_of(config, 2)).state == first.state
    assert found == [first.state, *[second.state] * (number - 1)] and number > 5
    assert left == {"step_00000002", "step_00000002.new"}


def test_a_file_where_the_folder_of_checkpoints_should_be(toy, run_config, train_data):
    config = run_config(max_steps=2)
    Path(config.model_dir).mkdir()
    (Path(config.model_dir) / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Could not save .*checkpoints/step_00000002: .*File exists"):
        propeller.Learner(toy, config).train(train_data)
    assert (Path(config.model_dir) / "checkpoints").read_text() == "in the way"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(saved, toy, train_data):
    config, _ = saved
    checkpoints = folder_of(config, 2).parent
    checkpoints.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Could not save .*step_00000004: .*Permission denied"):
            propeller.Learner(toy, config, HPARAMS).train(train_data)
    finally:
        checkpoints.chmod(0o700)
    assert names_in(config) == ["step_00000002"]
    assert propeller.Learner(toy, config, HPARAMS).train(train_data).step == 4


def test_weights_that_are_not_finite_are_not_saved_when_an_evaluation_fails(
    toy, run_config, train_data, dev_data
):
    """Else the run could never go on: it would take up these, and fail again."""

    class Broken(toy):
        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            if self.mode is RunMode.TRAIN and self.run_config.max_steps == 4:
                square_root = (self.out.bias * 0).sum().sqrt()  # 0, and its gradient is infinite
                total = total + square_root * 1e-30
            return total, weight

    config = run_config(max_steps=2, eval_steps=100)
    propeller.Learner(Broken, config).train(train_data)
    config = dataclasses.replace(config, max_steps=4, eval_steps=3, save_steps=100)
    with pytest.raises(NonFiniteLossError, match="After step 3 these weights are not finite"):
        learner = propeller.Learner(Broken, config)
        learner.train(train_data, eval_datasets={"dev": dev_data.map(no_labels)})
    assert names_in(config) == ["step_00000002"]


def no_labels(batch):
    raise ValueError("this set cannot be read")
