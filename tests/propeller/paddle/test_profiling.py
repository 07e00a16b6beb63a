"""The profiler: what counts where, the table, and a trace that Chrome's viewer can read."""

from __future__ import annotations

import json
import math

import pytest

from propeller.paddle.runtime import paddle
from propeller.paddle.train import profiling
from propeller.paddle.train.profiling import Profiler

MS = 1_000_000


class Clock:
    """Nanoseconds that pass only when told."""

    def __init__(self):
        self.now = 5_000_000_000_000_000  # as after two months without a restart

    def __call__(self):
        return self.now

    def pass_ms(self, milliseconds):
        self.now += round(milliseconds * MS)


@pytest.fixture
def clock():
    return Clock()


def spend(profiler, clock, name, milliseconds):
    with profiler.span(name):
        clock.pass_ms(milliseconds)


def make_step(profiler, clock, factor=1.0):
    """100 ms: data 2, forward 30, loss 3, backward 40 with communication 10 in it, optimizer 12, hooks 1."""
    spend(profiler, clock, "data", 2 * factor)
    spend(profiler, clock, "forward", 30 * factor)
    spend(profiler, clock, "loss", 3 * factor)
    with profiler.span("backward"):
        clock.pass_ms(25 * factor)
        spend(profiler, clock, "communication", 10 * factor)
        clock.pass_ms(15 * factor)
    clock.pass_ms(2 * factor)
    spend(profiler, clock, "optimizer", 12 * factor)
    spend(profiler, clock, "hooks", 1 * factor)
    profiler.step_done()


def rows(profiler):
    """First words of the table's lines -> their figures."""
    found = {}
    for line in profiler.table().splitlines():
        if line[:1].islower():
            found[line[:18].strip()] = line[18:].split()
    return found


def test_table(clock):
    profiler = Profiler(True, clock=clock)
    for factor in (50, 20, 1, 1, 1, 1):
        make_step(profiler, clock, factor)
    assert profiler.table() == "\n".join([
        "span                   total s   ms a step       share",
        "data                     0.008       2.000        2.0%",
        "forward                  0.120      30.000       30.0%",
        "loss                     0.012       3.000        3.0%",
        "backward                 0.160      40.000       40.0%",
        "communication            0.040      10.000       10.0%",
        "optimizer                0.048      12.000       12.0%",
        "hooks                    0.004       1.000        1.0%",
        "between spans            0.008       2.000        2.0%",
        "step                     0.400     100.000      100.0%",
        "outside the model: 5.0% of a step",
        "",
        "rank 0 on cpu: 4 steps, without the first 2, which warm up.",
    ])  # fmt: skip
    assert profiler.outside_model == pytest.approx(0.05)


def test_what_is_outside_of_steps(clock):
    """It is in no step's time, wherever it lies; spans of the step within it are not looked at."""
    profiler = Profiler(True, warmup_steps=1, clock=clock)
    make_step(profiler, clock)
    spend(profiler, clock, "checkpoint", 500)
    make_step(profiler, clock)
    with profiler.span("evaluation"):
        clock.pass_ms(100)
        spend(profiler, clock, "to_device", 50)
        spend(profiler, clock, "export", 400)
        clock.pass_ms(50)
    with profiler.span("hooks"):
        clock.pass_ms(1)
        spend(profiler, clock, "checkpoint", 300)
    make_step(profiler, clock)
    shown = rows(profiler)
    assert shown["evaluation"] == ["0.200", "200.000", "1"]
    assert shown["export"] == ["0.400", "400.000", "1"]
    assert shown["checkpoint"] == ["0.800", "400.000", "2"]
    assert "to_device" not in shown
    assert shown["hooks"] == ["0.003", "1.500", "1.5%"]
    assert shown["step"] == ["0.201", "100.500", "100.0%"]


def test_steps_that_do_not_count(clock):
    profiler = Profiler(True, warmup_steps=0, clock=clock)
    assert math.isnan(profiler.outside_model)
    assert profiler.table() == "rank 0 on cpu: 0 steps, without the first 0, which warm up."
    clock.pass_ms(1000)  # setting up, before the first span
    make_step(profiler, clock)
    before = profiler.table()
    assert rows(profiler)["step"] == ["0.100", "100.000", "100.0%"]
    with pytest.raises(KeyError), profiler.span("forward"):
        clock.pass_ms(7)
        raise KeyError
    spend(profiler, clock, "data", 9)  # the wait that ended with the data
    assert profiler.table() == before
    spend(profiler, clock, "forward", 4)  # the spans closed in spite of the error
    profiler.step_done()
    assert rows(profiler)["forward"][0] == "0.041"


def test_names_of_a_step_strategy(clock):
    profiler = Profiler(True, warmup_steps=0, clock=clock)
    with profiler.span("attack"):
        clock.pass_ms(5)
        spend(profiler, clock, "forward", 10)
    profiler.step_done()
    assert [*rows(profiler)][1:5] == ["forward", "attack", "between spans", "step"]
    assert rows(profiler)["attack"] == ["0.005", "5.000", "33.3%"]


def test_off_is_one_shared_context(tmp_path, clock):
    profiler = Profiler(False, device="gpu:0", clock=clock)
    assert profiler.span("forward") is profiler.span("evaluation")
    with profiler.span("evaluation"), profiler.span("evaluation"):
        profiler.step_done()
    profiler.write(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_waits_for_a_device_that_runs_asynchronously(clock, monkeypatch):
    waited = []

    def synchronize():
        waited.append(clock.now)
        clock.pass_ms(20)

    monkeypatch.setattr(paddle.device, "synchronize", synchronize)
    profiler = Profiler(True, device="gpu:1", rank=3, warmup_steps=0, clock=clock)
    spend(profiler, clock, "forward", 1)
    profiler.step_done()
    assert len(waited) == 1
    assert rows(profiler)["forward"] == ["0.021", "21.000", "100.0%"]
    assert "rank 3 on gpu:1: 1 steps" in profiler.table()
    assert "Each span ends when gpu:1 has done its work" in profiler.table()
    assert profiler.trace()["otherData"]["synchronized"] is True
    cpu = Profiler(True, clock=clock)
    spend(cpu, clock, "forward", 1)
    assert len(waited) == 1


def check_trace(trace):
    """Holds a trace against the published format: keys and types, order, nesting. Returns its spans."""
    assert trace.keys() <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    spans = []
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] in ("X", "M")
        if event["ph"] == "M":
            assert event["name"] == "process_name" and isinstance(event["args"]["name"], str)
        else:
            assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
            assert event["ts"] > 0 and event["dur"] >= 0
            spans.append(event)
    starts = [event["ts"] for event in spans]
    assert starts == sorted(starts)
    open_ends = []
    for event in spans:  # of two spans on a row, one lies within the other or after it
        end = event["ts"] + event["dur"]
        while open_ends and open_ends[-1] <= event["ts"] + 0.002:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1] + 0.002, event
        open_ends.append(end)
    return spans


def test_trace(tmp_path, clock):
    profiler = Profiler(True, rank=1, warmup_steps=1, clock=clock)
    make_step(profiler, clock)
    begun = clock.now
    make_step(profiler, clock)
    with profiler.span("evaluation"):
        clock.pass_ms(1)
        spend(profiler, clock, "export", 1)
    make_step(profiler, clock)
    profiler.write(tmp_path / "profile")
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["profile.txt", "trace.json"]
    assert (tmp_path / "profile/profile.txt").read_text("utf-8") == profiler.table() + "\n"
    trace = json.loads((tmp_path / "profile/trace.json").read_text("utf-8"))
    spans = check_trace(trace)
    assert trace["traceEvents"][0] == {
        "name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "rank 1 (cpu)"}
    }  # fmt: skip
    step = ["step", "data", "forward", "loss", "backward", "communication", "optimizer", "hooks"]
    assert [event["name"] for event in spans] == [*step, "step", "evaluation", "export", *step[1:]]
    assert {event["pid"] for event in spans} == {1}
    backward = spans[4]
    assert (backward["ts"] * 1000, backward["dur"]) == (begun + 35 * MS, 50_000.0)
    assert [event["args"] for event in spans if event["name"] == "step"] == [{"step": 2}, {"step": 3}]
    assert trace["otherData"]["traced_steps"] == 2


def test_trace_is_bounded(clock):
    profiler = Profiler(True, clock=clock)
    for _ in range(profiling.TRACED_STEPS + 30):
        spend(profiler, clock, "forward", 1)
        profiler.step_done()
    spend(profiler, clock, "evaluation", 1)
    trace = profiler.trace()
    spans = check_trace(trace)
    assert len(spans) == 2 * profiling.TRACED_STEPS
    assert [event["args"]["step"] for event in spans if event["name"] == "step"] == [*range(3, 203)]
    assert trace["otherData"] == {
        "warmup_steps_left_out": 2,
        "traced_steps": 200,
        "traced_steps_at_most": 200,
        "synchronized": False,
    }
    assert rows(profiler)["step"][0] == "0.228", "the table goes on"


def test_real_clock():
    profiler = Profiler(True, warmup_steps=0)
    for _ in range(3):
        with profiler.span("forward"), profiler.span("loss"):
            sum(range(1000))
        profiler.step_done()
    check_trace(profiler.trace())
    assert 0 < profiler.outside_model < 1


def test_a_folder_that_cannot_be_written(tmp_path, clock, caplog):
    (tmp_path / "file").write_text("in the way")
    Profiler(True, clock=clock).write(tmp_path / "file")
    assert f"no profile in {tmp_path / 'file'}" in caplog.text
