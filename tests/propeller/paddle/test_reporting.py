"""Log lines, `metrics.jsonl`, the progress bar, learning curves."""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import sys
from pathlib import Path

import pytest

import propeller.paddle as propeller
from propeller.paddle.train import reporting
from propeller.paddle.train.hooks import StepResult
from propeller.paddle.train.reporting import LoggingHook, draw_curves, read_metrics
from propeller.types import RunState


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


def test_the_last_step_is_logged_before_its_evaluation(toy, run_config, train_data, dev_data, caplog):
    caplog.set_level(logging.INFO, logger="propeller")
    config = run_config(max_steps=5, log_steps=4)
    propeller.Learner(toy, config).train(train_data, eval_datasets={"dev": dev_data})
    told = [text.split(",")[0].split(":")[0] for text in caplog.messages if text.startswith(("step", "[dev"))]
    assert told == ["step", "step", "[dev evaluation] loss"]


def test_log_lines_give_speed_and_time_left(run_config, clock, caplog, metrics_of):
    caplog.set_level(logging.INFO, logger="propeller")
    config = run_config(log_steps=4, max_steps=8)
    Path(config.model_dir).mkdir()
    hook = LoggingHook()
    hook.train_begin(config, RunState(), 8)
    for step in range(1, 9):
        clock[0] += 0.25  # waiting for data, from the second step on, counts
        hook.step_begin(RunState(step=step - 1))
        clock[0] += 0.25
        hook.step_end(RunState(step=step, epoch=step // 4), StepResult(float(step), 0.1 / step, 10, 70))
        if step in (2, 6):
            clock[0] += 100.0  # an evaluation or a checkpoint does not
        if step == 2:
            hook.eval_end(RunState(step=step), {"dev": {"loss": 1.5, "n": 3}})
        if step == 6:
            hook.checkpoint_saved(RunState(step=step), Path())
    # Steps 1, 3 and 7 begin after a pause: 0.25 s each, the others have waited: 0.5 s each.
    assert caplog.messages[0] == (
        "step: 4/8, epoch: 1, loss: 2.500000, lr: 0.025, 26.7 examples/s, 187 tokens/s, left: 2 s"
    )
    assert re.search(
        r"step: 8/8, epoch: 2, loss: 6\.500000, lr: 0\.0125, 22\.9 .*left: 0 s", caplog.messages[1]
    )
    train = metrics_of(config, "train")[0]
    assert (train["loss"], train["learning_rate"], train["epoch"]) == (2.5, 0.025, 1)
    assert train["examples_per_s"] == pytest.approx(40 / 1.5)
    assert train["tokens_per_s"] == pytest.approx(280 / 1.5)
    assert metrics_of(config, "eval")[0] == {
        "event": "eval",
        "step": 2,
        "dataset": "dev",
        "loss": 1.5,
        "n": 3,
    }


def test_without_an_end_there_is_no_time_left(run_config, caplog):
    caplog.set_level(logging.INFO, logger="propeller")
    config = run_config(log_steps=1, max_steps=None)
    Path(config.model_dir).mkdir()
    hook = LoggingHook()
    hook.train_begin(config, RunState(), None)
    hook.step_begin(RunState())
    hook.step_end(RunState(step=1), StepResult(1.0, 0.1, 1, 1))
    assert caplog.messages[0].startswith("step: 1, epoch: 0, ") and "left" not in caplog.messages[0]


def test_evaluation_lines(toy, run_config, train_data, dev_data, caplog):
    with caplog.at_level(logging.INFO, logger="propeller"):
        propeller.train_and_eval(toy, {}, run_config(max_steps=3), train_data, {"dev": dev_data})
    line = next(message for message in caplog.messages if message.startswith("[dev"))
    assert re.fullmatch(
        r"\[dev evaluation\] loss: 0\.\d{6}, acc: [01]\.\d{6}, n: 100, elapsed: \d+\.\d s, step: 3", line
    )


def test_a_resume_drops_the_lines_of_steps_that_come_again(run_config, metrics_of):
    config = run_config()
    file = Path(config.model_dir) / "metrics.jsonl"
    file.parent.mkdir()
    lines = [{"event": "train", "step": step, "loss": step / 10, "note": "é"} for step in (10, 20, 30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra', "utf-8")
    assert read_metrics(file) == lines, "the line that a crash cut short is left out"
    LoggingHook().train_begin(config, RunState(step=20), 60)
    assert metrics_of(config) == lines[:2]
    LoggingHook().train_begin(config, RunState(), 60)
    assert metrics_of(config) == []
    assert read_metrics(file.with_name("absent")) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_only(toy, run_config, train_data, monkeypatch, capsys):
    propeller.Learner(toy, run_config("plain", max_steps=3)).train(train_data)
    assert "\r" not in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    propeller.Learner(toy, run_config("bar", max_steps=3, run_steps=1)).train(train_data)
    propeller.Learner(toy, run_config("bar", max_steps=3)).train(train_data)
    first, second = terminal.getvalue().rsplit("\n", 2)[:2]
    assert re.search(r"1/1 .*loss=\d\.\d{4}, lr=0\.01", first)
    assert "| 1/3 [" in second, "after a resume it goes on where it was"
    assert re.search(r"3/3 .*loss=\d\.\d{4}, lr=0\.0033", second)


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_curves(tmp_path):
    lines = [
        *[{"event": "train", "step": step, "loss": 1.0 / step, "learning_rate": 0.1} for step in range(1, 9)],
        *[
            {"event": "eval", "step": step, "dataset": "dev", "loss": 0.5, "acc": 0.5, "n": 3}
            for step in (4, 8)
        ],
        {"event": "eval", "step": 8, "dataset": "test", "acc": 0.25, "table": [[1]], "auc": "NaN", "n": 3},
    ]
    draw_curves(lines, tmp_path / "curves.png")
    assert size_of(tmp_path / "curves.png") == (600, 600), "two plots: loss and acc, three inches each"
    draw_curves(lines[-1:], tmp_path / "one.png")
    assert size_of(tmp_path / "one.png") == (600, 300)


def test_nothing_finite_to_draw(tmp_path):
    draw_curves(
        [{"event": "eval", "step": 1, "dataset": "dev", "loss": "NaN", "n": 3}], tmp_path / "none.png"
    )
    assert not (tmp_path / "none.png").exists()


def test_a_run_draws_its_curves_where_matplotlib_is(toy, run_config, train_data, monkeypatch):
    config = run_config(max_steps=2, log_steps=1)
    propeller.Learner(toy, config).train(train_data)
    assert size_of(Path(config.model_dir) / "curves.png") == (600, 300)
    find_spec = reporting.importlib.util.find_spec
    monkeypatch.setattr(
        reporting.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    config = run_config("without", max_steps=2, log_steps=1)
    propeller.Learner(toy, config).train(train_data)
    assert not (Path(config.model_dir) / "curves.png").exists()
