"""Exact resume, damaged checkpoints, failed saves; runs that are really killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import propeller.paddle as propeller
from propeller.errors import CheckpointError, Interrupted, PropellerError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.checkpoint import Checkpointer, load_checkpoint
from propeller.types import RunState

HPARAMS = {"dropout": 0.3}


def folder_of(config, step):
    return Path(config.model_dir) / "checkpoints" / f"step_{step:08d}"


def steps_of(config):
    return Checkpointer(config.model_dir, 3).steps()


def assert_same_checkpoint(first, second, step):
    """Weights, optimizer, schedule, data position, hooks: everything, byte for byte."""
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, two = (folder_of(config, step) / file for config in (first, second))
        assert one.read_bytes() == two.read_bytes(), file


@pytest.fixture
def full_run(toy, train_data, dev_data):
    """Trains with all that an exact resume has to bring back."""

    def run(config, model=toy, **changes):
        hook = propeller.EarlyStopping("loss", patience=50, min_delta=0.3)
        learner = propeller.Learner(model, dataclasses.replace(config, **changes), HPARAMS)
        learner.train(
            train_data.buffered(4),
            eval_datasets={"dev": dev_data},
            hooks=[hook],
            exporters=[propeller.BestExporter(Path(config.model_dir) / "best", metric="acc")],
        )
        return learner

    return run


def test_resume_is_exact_to_the_bit(full_run, run_config):
    straight, resumed = (run_config(name, eval_steps=5) for name in ("straight", "resumed"))
    full_run(straight)
    full_run(resumed, run_steps=25)
    saved = json.loads((folder_of(resumed, 25) / "state.json").read_text("utf-8"))
    assert saved["run"]["step"] == 25 and saved["position"] is not None
    assert saved["hooks"]["early_stopping::loss"]["bad_evaluations"] > 0, "else patience is not tested"
    full_run(resumed)
    assert_same_checkpoint(straight, resumed, 60)
    best = [(Path(config.model_dir) / "best/weights/best.json").read_text() for config in (straight, resumed)]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: paddle.optimizer.SGD(0.1, parameters=model.parameters()),
        lambda model: paddle.optimizer.Momentum(0.1, parameters=model.parameters()),
        lambda model: paddle.optimizer.Lamb(0.1, parameters=model.parameters()),
        lambda model: paddle.optimizer.AdamW(
            paddle.optimizer.lr.NoamDecay(16, 5), parameters=model.out.parameters()
        ),
    ],
    ids=["sgd", "momentum", "lamb", "schedule-and-some-parameters"],
)
def test_resume_with_other_optimizers(toy, run_config, train_data, optimizer):
    class Other(toy):
        def optimizer(self):
            return optimizer(self)

    straight, resumed = run_config("straight", max_steps=6), run_config("resumed", max_steps=6)
    propeller.Learner(Other, straight, HPARAMS).train(train_data)
    for run_steps in (2, None):
        config = dataclasses.replace(resumed, run_steps=run_steps)
        propeller.Learner(Other, config, HPARAMS).train(train_data)
    assert_same_checkpoint(straight, resumed, 6)


def test_resume_with_parameters_that_get_no_gradient(toy, run_config, train_data):
    """As a pooler that the task does not use, a frozen layer, and one that is used later on."""

    class Partly(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.unused = paddle.nn.Linear(3, 3)
            self.late = paddle.nn.Linear(16, 16)
            self.norm.weight.stop_gradient = True

        def forward(self, features):
            predictions = super().forward(features)
            if self.hparams.late:
                predictions["logits"] += self.late(self.table.weight).mean()
            return predictions

    config = run_config(max_steps=None, run_steps=2)
    propeller.Learner(Partly, config, {"late": False}).train(train_data)
    learner = propeller.Learner(Partly, config, {"late": True})
    assert learner.train(train_data).step == 4
    names = set(load_checkpoint(folder_of(config, 4)).optimizer)
    assert "late.weight|moment1" in names and "out.bias|beta1_pow_acc" in names
    assert not any(name.startswith(("unused", "norm.weight")) for name in names)


def test_one_learner_trains_on(toy, run_config, train_data):
    straight, resumed = run_config("straight", max_steps=6), run_config("resumed", max_steps=6, run_steps=3)
    propeller.Learner(toy, straight, HPARAMS).train(train_data)
    learner = propeller.Learner(toy, resumed, HPARAMS)
    assert [learner.train(train_data).step for _ in range(2)] == [3, 6]
    assert_same_checkpoint(straight, resumed, 6)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": (cut, "model.safetensors"),
    "flipped": (flip, "optimizer.safetensors"),
    "flipped-state": (flip, "state.json"),
    "missing": (Path.unlink, "state.json"),
    "no-manifest": (Path.unlink, "manifest.json"),
    "cut-manifest": (cut, "manifest.json"),
}


@pytest.fixture
def three_checkpoints(toy, run_config, train_data, recorder):
    config = run_config(max_steps=6, save_steps=2)
    propeller.Learner(toy, config, HPARAMS).train(train_data, hooks=[recorder()])
    assert steps_of(config) == [2, 4, 6]
    return config


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    three_checkpoints, toy, train_data, dev_data, recorder, caplog
):
    config = three_checkpoints
    good = folder_of(config, 6).with_name("good")
    shutil.copytree(folder_of(config, 6), good)
    for damage, file in DAMAGES.values():
        damage(folder_of(config, 6) / file)
        caplog.clear()
        learner, hook = propeller.Learner(toy, config, HPARAMS), recorder()
        assert learner.evaluate(dev_data, ckpt=-1)["n"] == 100
        learner.train(train_data, hooks=[hook])
        assert hook.events[0] == ("train_begin", 4, 6)
        assert f"step_00000006/{file}" in caplog.text
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert (folder_of(config, 6) / name).read_bytes() == (good / name).read_bytes()
        load_checkpoint(folder_of(config, 6))


def test_all_damaged_is_an_error_and_nothing_is_lost(three_checkpoints, toy, train_data):
    for step in (2, 4, 6):
        flip(folder_of(three_checkpoints, step) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"No checkpoint can be loaded.*step_00000006/.*step_00000002/"):
        propeller.Learner(toy, three_checkpoints).train(train_data)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        Checkpointer(three_checkpoints.model_dir, 3).load(4)
    assert steps_of(three_checkpoints) == [2, 4, 6]


def test_damaged_ones_do_not_count_among_those_kept(three_checkpoints, toy, train_data):
    for step in (4, 6):
        cut(folder_of(three_checkpoints, step) / "state.json")
    config = dataclasses.replace(three_checkpoints, save_steps=1, run_steps=1, max_ckpt=1)
    propeller.Learner(toy, config, HPARAMS).train(train_data)
    assert steps_of(config) == [2, 3, 4, 6], "two whole ones, whatever lies beside them"
    latest = Checkpointer(config.model_dir, 1).load_latest()
    assert latest is not None and latest.state.step == 3


@pytest.mark.parametrize(("max_ckpt", "kept"), [(1, [5, 6]), (2, [5, 6]), (4, [3, 4, 5, 6])])
def test_the_newest_are_kept(toy, run_config, train_data, max_ckpt, kept):
    config = run_config(max_steps=6, save_steps=1, max_ckpt=max_ckpt)
    propeller.Learner(toy, config).train(train_data)
    assert steps_of(config) == kept


def test_another_model_shape_is_a_clear_error(three_checkpoints, toy, train_data, dev_data):
    message = (
        r"step_00000006 do not fit the model \(was its configuration changed\?\): "
        r"out\.weight: \[16, 2\] where the model has \[16, 3\]; out\.bias: \[2\] where the model has \[3\]"
    )
    other = propeller.Learner(toy, three_checkpoints, {"num_label": 3})
    with pytest.raises(CheckpointError, match=message):
        other.train(train_data)
    with pytest.raises(CheckpointError, match=message):
        other.evaluate(dev_data, ckpt=-1)

    class Renamed(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.head = self.out
            del self.out

    with pytest.raises(CheckpointError, match=r"missing: head\.weight;.*left over: out\.weight"):
        propeller.Learner(Renamed, three_checkpoints).train(train_data)

    class Sgd(toy):
        def optimizer(self):
            return paddle.optimizer.SGD(0.1, parameters=self.parameters())

    with pytest.raises(CheckpointError, match=r"optimizer state does not fit .* such as norm\.bias\|beta1"):
        propeller.Learner(Sgd, three_checkpoints).train(train_data)


def test_a_failed_save_keeps_the_old_ones(three_checkpoints, toy, train_data, monkeypatch):
    """A file where the folder should be, and a disk that fills up halfway."""
    config = dataclasses.replace(three_checkpoints, max_steps=8, max_ckpt=1)
    folder_of(config, 8).write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Could not save .*step_00000008: .*Earlier .* untouched"):
        propeller.Learner(toy, config).train(train_data)
    folder_of(config, 8).unlink()
    assert steps_of(config) == [2, 4, 6]

    def no_space(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)  # where a full disk is often first noticed
        with pytest.raises(CheckpointError, match="step_00000008: .*No space left on device"):
            Checkpointer(config.model_dir, 1).save(
                dataclasses.replace(load_checkpoint(folder_of(config, 6)), state=RunState(step=8))
            )
    names = sorted(path.name for path in folder_of(config, 6).parent.iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006"], "no half-written folder either"
    assert propeller.Learner(toy, config, HPARAMS).train(train_data).step == 8


def test_what_a_killed_save_left_is_cleared_away(three_checkpoints, toy, train_data):
    left = folder_of(three_checkpoints, 6).with_name(".step_00000005.x1y2z3")
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(10))
    config = dataclasses.replace(three_checkpoints, max_steps=7)
    assert propeller.Learner(toy, config, HPARAMS).train(train_data).step == 7
    assert not left.exists()
    assert steps_of(config) == [4, 6, 7]


CODE = """
import contextlib

class Wait(propeller.Hook):
    name = "wait"
    def step_end(self, state, result):
        if state.step == int(sys.argv[3]):
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print("holding", flush=True)
                sys.stdin.readline()

def main():
    config = propeller.RunConfig.from_dict(json.loads(sys.argv[2]))
    propeller.train_and_eval(
        toy.Bags, {"dropout": 0.3}, config, toy.make_train_data().buffered(4), {"dev": toy.make_dev_data()},
        train_hooks=[propeller.EarlyStopping("loss", patience=50, min_delta=0.3), Wait()],
        exporters=[propeller.BestExporter(Path(config.model_dir) / "best", metric="acc")],
    )

cli.run(main)
"""


@pytest.fixture
def start(start_child):
    """Starts a training process and returns it when it has made `wait_at` steps and holds there."""

    def run(config, wait_at):
        process = start_child(CODE, config, wait_at)
        if process.stdout.readline() != "holding\n":
            pytest.fail(f"the training process ended early: {process.communicate()[1]}")
        return process

    return run


def test_killed_again_and_again_it_ends_with_the_same_bits(full_run, run_config, start):
    """SIGTERM, SIGHUP, Ctrl-C and kill -9 to real processes; what is left goes on here."""
    straight = run_config("straight", eval_steps=5, log_steps=1)
    killed = run_config("killed", eval_steps=5, log_steps=1)
    full_run(straight)

    child = start(killed, wait_at=10)  # an evaluation is due at this very step
    with pytest.raises(PropellerError, match=rf"in use by process {child.pid}\."):
        full_run(killed)
    child.send_signal(signal.SIGTERM)
    errors = child.communicate("\n", timeout=60)[1]
    assert child.returncode == 143, errors
    assert errors.rstrip().endswith(
        "Stopped by SIGTERM at step 10; the checkpoint is saved. The same command goes on from there."
    )
    assert steps_of(killed) == [10]

    for number, step in ((signal.SIGHUP, 14), (signal.SIGINT, 17)):
        child = start(killed, wait_at=step)
        child.send_signal(number)
        errors = child.communicate("\n", timeout=60)[1]
        assert child.returncode == 128 + number, errors
        assert f"Stopped by {number.name} at step {step}" in errors and "Traceback" not in errors
    assert steps_of(killed) == [10, 14, 17]

    child = start(killed, wait_at=27)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert steps_of(killed) == [14, 17, 20]

    full_run(killed)
    assert_same_checkpoint(straight, killed, 60)
    steps = [
        [
            (line["event"], line["step"], line["loss"])
            for line in map(json.loads, (Path(config.model_dir) / "metrics.jsonl").read_text().splitlines())
        ]
        for config in (straight, killed)
    ]
    assert steps[0] == steps[1], "each step and evaluation stands there once"


@pytest.mark.skipif(os.name == "nt", reason="there are no terminals of this kind")
def test_a_terminal_that_goes_away_leaves_a_checkpoint(run_config, start_child):
    """As when the connection is lost: SIGHUP comes, and nothing can be said any more."""
    config = run_config(log_steps=1)
    ours, theirs = os.openpty()
    take_it = "import os\nos.open(os.ttyname(0), os.O_RDWR)  # the terminal of this session, from now on\n"
    child = start_child(
        take_it + CODE, config, 3, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while b"holding" not in said:
        said += os.read(ours, 1 << 16)  # fails where the child has ended
    os.close(ours)
    assert child.wait(60) == 128 + signal.SIGHUP
    assert steps_of(config) == [3]


def test_handlers_are_put_back(toy, run_config, train_data, recorder):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    during = []

    def act(event, state):
        during.append(signal.getsignal(signal.SIGTERM))

    propeller.Learner(toy, run_config(max_steps=1)).train(train_data, hooks=[recorder(act=act)])
    assert [signal.getsignal(number) for number in numbers] == before
    assert any(handler is not before[1] for handler in during)


def test_the_second_ctrl_c_ends_at_once(toy, run_config, train_data, recorder):
    def act(event, state):
        if event == "step_end":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one must not wait for the step's end")

    config = run_config()
    with pytest.raises(KeyboardInterrupt):
        propeller.Learner(toy, config).train(train_data, hooks=[recorder(act=act)])
    assert steps_of(config) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sighup_may_come_twice(toy, run_config, train_data, recorder):
    """From the shell, and from the system when that has ended."""

    def act(event, state):
        if event == "step_end":
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)

    config = run_config()
    with pytest.raises(Interrupted, match="Stopped by SIGHUP at step 1"):
        propeller.Learner(toy, config).train(train_data, hooks=[recorder(act=act)])
    assert steps_of(config) == [1]


def test_a_signal_that_is_ignored_stays_so(toy, run_config, train_data, recorder, monkeypatch):
    """Ctrl-C is not for what a script has started in the background."""

    def act(event, state):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        state = propeller.Learner(toy, run_config(max_steps=2)).train(train_data, hooks=[recorder(act=act)])
        assert state.step == 2 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
