"""Summaries: collected on the steps that are logged, written for whatever is installed."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.paddle import summary
from propeller.paddle.runtime import paddle


@pytest.fixture
def written():
    """What the stand-in writers got: (writer, kind, name, value, step), and `close`."""
    return []


@pytest.fixture
def install(monkeypatch, written):
    """Puts stand-ins for VisualDL and tensorboardX, which are not installed here, into their place."""

    class LogWriter:
        def __init__(self, logdir):
            written.append(("visualdl", "open", logdir))

        def add_scalar(self, tag, value, step):
            written.append(("visualdl", "scalar", tag, value, step))

        def add_histogram(self, tag, values, step):
            written.append(("visualdl", "histogram", tag, list(values), step))

        def close(self):
            written.append(("visualdl", "close"))

    class SummaryWriter:
        def __init__(self, logdir):
            written.append(("tensorboardX", "open", logdir))

        def add_scalar(self, tag, value, step):
            written.append(("tensorboardX", "scalar", tag, value, step))

        def add_histogram(self, tag, values, step):
            written.append(("tensorboardX", "histogram", tag, list(values), step))

        def close(self):
            written.append(("tensorboardX", "close"))

    def put(*names):
        for name in ("visualdl", "tensorboardX"):
            module = types.ModuleType(name)
            module.LogWriter, module.SummaryWriter = LogWriter, SummaryWriter
            monkeypatch.setitem(sys.modules, name, module if name in names else None)

    return put


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(("visualdl", "tensorboardX"), "visualdl"), (("tensorboardX",), "tensorboardX"), ((), None)],
)
def test_the_first_writer_that_is_installed(install, written, tmp_path, names, chosen):
    install(*names)
    writer = summary.open_writer(tmp_path)
    if chosen is None:
        assert writer is None and written == []
        return
    summary.start_collecting()
    summary.scalar("a", paddle.to_tensor([0.5]))
    summary.histogram("b", paddle.to_tensor([[1.0, 2.0], [3.0, 4.0]]))
    summary.write_collected(writer, 7)
    writer.close()
    assert written == [
        (chosen, "open", str(tmp_path)),
        (chosen, "scalar", "a", 0.5, 7),
        (chosen, "histogram", "b", [1.0, 2.0, 3.0, 4.0], 7),
        (chosen, "close"),
    ]


def test_nothing_is_kept_on_other_steps(install, written, tmp_path):
    install("visualdl")
    writer = summary.open_writer(tmp_path)
    summary.scalar("before", 1.0)
    summary.start_collecting()
    summary.scalar("during", np.float32(2.0))
    summary.write_collected(writer, 1)
    summary.scalar("after", object())  # costs nothing: it is not even looked at
    summary.write_collected(writer, 2)
    assert [entry[2:] for entry in written[1:]] == [("during", 2.0, 1)]


def test_a_run_writes_the_model_s_own_values_and_the_metrics(
    install, written, toy, run_config, train_data, dev_data
):
    install("visualdl")
    config = run_config(max_steps=4, log_steps=2, eval_steps=4)
    propeller.train_and_eval(toy, {}, config, train_data, {"dev": dev_data})
    assert written[0] == ("visualdl", "open", f"{config.model_dir}/summary")
    assert written[-1] == ("visualdl", "close")
    assert [(name, step) for _, kind, name, _, step in written[1:-1]] == [
        *[(name, 2) for name in ("loss_sum", "train/loss", "train/learning_rate")],
        *[(name, 4) for name in ("loss_sum", "train/loss", "train/learning_rate")],
        *[(f"dev/{name}", 4) for name in ("loss", "acc", "n")],
    ]
    values = {(name, step): value for _, _, name, value, step in written[1:-1]}
    assert values["loss_sum", 2] == pytest.approx(16 * values["train/loss", 2], rel=1e-5)


def test_a_crash_ends_the_collecting(install, written, toy, run_config, train_data, recorder):
    install("visualdl")

    def crash(event, state):
        if event == "step_begin" and state.step == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        propeller.Learner(toy, run_config(log_steps=2)).train(train_data, hooks=[recorder(act=crash)])
    assert written[-1] == ("visualdl", "close")
    summary.scalar("later", object())  # nobody collects any more
