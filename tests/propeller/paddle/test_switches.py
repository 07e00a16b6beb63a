"""Switches of the run configuration: check_numerics, profile, precision."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.errors import ConfigError, NonFiniteLossError
from propeller.paddle.runtime import paddle
from propeller.types import RunMode


def is_checked():
    """Whether Paddle looks at the result of every operation."""
    return paddle.get_flags("FLAGS_check_nan_inf")["FLAGS_check_nan_inf"]


@pytest.fixture
def log_of_zero(toy):
    """The toy model, with the logarithm of zero from the third step on."""

    class LogOfZero(toy):
        steps = 0

        def loss(self, predictions, labels):
            total, weight = super().loss(predictions, labels)
            self.steps += 1
            factor = paddle.to_tensor(0.0 if self.steps == 3 else 1.0)
            return total + factor.log().abs(), weight

    return LogOfZero


def test_the_operation_that_made_it_is_named(log_of_zero, run_config, train_data, recorder):
    hook = recorder()
    config = run_config(check_numerics=True)
    with pytest.raises(
        NonFiniteLossError, match=r"^There are NAN or INF .*op=log,.* at step 3 "
    ) as caught:
        propeller.Learner(log_of_zero, config).train(train_data, hooks=[hook])
    assert "\n" not in str(caught.value)
    assert hook.steps_of("step_end") == [1, 2]
    assert not is_checked(), "it is off again, also after an error"


def test_it_is_on_for_the_steps_alone(toy, run_config, train_data, dev_data):
    """In an evaluation or an export it would fail within oneDNN's kernels."""
    seen = set()

    class Watched(toy):
        def forward(self, features):
            seen.add((self.mode, is_checked()))
            return super().forward(features)

    sets = {"eval_datasets": {"dev": dev_data}}
    propeller.Learner(Watched, run_config(max_steps=2, check_numerics=True)).train(train_data, **sets)
    assert seen == {(RunMode.TRAIN, True), (RunMode.EVAL, False)}
    assert not is_checked()
    seen.clear()
    propeller.Learner(Watched, run_config("plain", max_steps=1)).train(train_data, **sets)
    assert seen == {(RunMode.TRAIN, False), (RunMode.EVAL, False)}


@pytest.mark.parametrize("switch", ["check_numerics", "profile"])
def test_it_changes_no_result(toy, run_config, train_data, weights_of, assert_same_bits, switch):
    weights = []
    for on in (False, True):
        config = run_config(str(on), max_steps=4, **{switch: on})
        learner = propeller.Learner(toy, config, {"dropout": 0.3})
        learner.train(train_data)
        weights.append(weights_of(learner.model))
    assert_same_bits(*weights)


def test_other_errors_stay_what_they_are(toy, run_config, train_data, recorder):
    def act(event, state):
        if event == "step_end":
            raise RuntimeError("of a hook")

    with pytest.raises(RuntimeError, match="of a hook"):
        config = run_config(check_numerics=True)
        propeller.Learner(toy, config).train(train_data, hooks=[recorder(act=act)])
    assert not is_checked()


def test_without_the_switch_the_loss_is_looked_at(log_of_zero, run_config, train_data):
    with pytest.raises(
        NonFiniteLossError, match=r"The loss is inf at step 3 .*check_numerics in the run configuration names"
    ):
        propeller.Learner(log_of_zero, run_config()).train(train_data)


def table_of(text):
    """Share of a step by span, from the profile's table."""
    found = re.findall(r"^(\w[\w ]*?) +[\d.]+ +[\d.]+ +([\d.]+)%$", text, re.MULTILINE)
    return {name: float(share) for name, share in found}


def test_a_profile_is_written_and_logged(toy, run_config, train_data, dev_data, caplog):
    config = run_config(max_steps=12, profile=True)
    caplog.set_level("INFO", logger="propeller")
    learner = propeller.Learner(toy, config)
    learner.train(
        train_data,
        eval_datasets={"dev": dev_data},
        exporters=[propeller.BestExporter(Path(config.model_dir) / "best", metric="acc")],
    )
    folder = Path(config.model_dir) / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["profile.txt", "trace.json"]
    text = (folder / "profile.txt").read_text("utf-8")
    assert text.strip() in caplog.text and str(folder) in caplog.text
    shares = table_of(text)
    spans = ["data", "to_device", "forward", "loss", "backward", "communication", "optimizer", "hooks"]
    assert list(shares) == [*spans, "between spans", "step"]
    assert shares.pop("step") == 100.0
    assert sum(shares.values()) == pytest.approx(100.0, abs=0.5), "each is rounded"
    assert min(shares.values()) >= 0.0 and shares["forward"] > 0 and shares["backward"] > 0
    assert "10 steps, without the first 2" in text
    outside = dict(re.findall(r"^(evaluation|checkpoint|export) .* (\d+)$", text, re.MULTILINE))
    assert outside == {"evaluation": "1", "checkpoint": "1", "export": "1"}
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    assert [event["args"]["step"] for event in events if event["name"] == "step"] == [*range(3, 13)]
    assert {"data", "forward", "backward", "optimizer", "evaluation", "checkpoint"} <= {
        e["name"] for e in events
    }


def test_micro_batches_are_profiled_as_one_step(toy, run_config, train_data):
    config = run_config(max_steps=5, profile=True, micro_batches=4)
    propeller.Learner(toy, config).train(train_data)
    trace = json.loads((Path(config.model_dir) / "profile/trace.json").read_text("utf-8"))
    names = [event["name"] for event in trace["traceEvents"]]
    assert names.count("step") == 3
    assert names.count("backward") == 4 * 3 and names.count("optimizer") == 2 * 3


def test_no_profile_by_default(toy, run_config, train_data, caplog):
    config = run_config(max_steps=4)
    caplog.set_level("INFO", logger="propeller")
    propeller.Learner(toy, config).train(train_data)
    assert not (Path(config.model_dir) / "profile").exists()
    assert "profile, also in" not in caplog.text


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_refused_on_a_cpu(
    toy, run_config, train_data, precision, weights_of, assert_same_bits
):
    config = run_config(device="cpu", precision=precision)
    learner = propeller.Learner(toy, config)
    before = weights_of(learner.model)
    reason = rf"precision {precision} needs a GPU or another accelerator, .* device is cpu.*casts do nothing"
    for begin in (learner.train, learner.find_learning_rate):
        with pytest.raises(ConfigError, match=reason):
            begin(train_data)
    assert not Path(config.model_dir).exists(), "before anything is written"
    assert_same_bits(weights_of(learner.model), before)


def test_a_refused_precision_sets_nothing_aside(toy, run_config, train_data):
    propeller.Learner(toy, run_config(max_steps=2)).train(train_data)
    half = propeller.Learner(toy, run_config(max_steps=2, device="cpu", precision="bf16"))
    with pytest.raises(ConfigError, match="precision bf16"):
        half.train(train_data, restart=True)
    folder = Path(half.run_config.model_dir)
    assert [path.name for path in folder.parent.glob("run*")] == ["run"]
    assert np.isfinite(propeller.Learner(toy, run_config(max_steps=2)).evaluate(train_data.take(2))["loss"])
