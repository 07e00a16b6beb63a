"""25 steps and 35 more are 60, to the bit: with averages, micro-batches, FGM and a loss scale."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.paddle.train import precision as precisions
from propeller.paddle.train.adversarial import Fgm
from propeller.paddle.train.checkpoint import load_checkpoint
from propeller.paddle.train.step import plain_step

HPARAMS = {"dropout": 0.3}
TRAINED = ("table.weight", "norm.weight", "norm.bias", "out.weight", "out.bias")


def folder_of(config, step):
    return Path(config.model_dir) / "checkpoints" / f"step_{step:08d}"


@pytest.fixture
def run(toy, train_data, dev_data):
    """`run(config, strategy)` trains with evaluations; returns the learner."""

    def train(config, strategy=plain_step, **options):
        learner = propeller.Learner(toy, config, HPARAMS)
        learner.train(train_data, eval_datasets={"dev": dev_data}, step_strategy=strategy, **options)
        return learner

    return train


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({"ema_decay": 0.9}, plain_step),
        ({}, Fgm("table.*", 0.5)),
        ({"ema_decay": 0.9, "micro_batches": 3}, Fgm("table.*", 0.5)),
    ],
    ids=["ema", "fgm", "all"],
)
def test_resume_is_exact(run, run_config, metrics_of, settings, strategy):
    straight, resumed = (run_config(name, **settings) for name in ("straight", "resumed"))
    whole = run(straight, strategy)
    run(dataclasses.replace(resumed, run_steps=25), strategy)
    parts = run(resumed, strategy)
    files = sorted(path.name for path in folder_of(straight, 60).iterdir())
    assert ("average.safetensors" in files) == ("ema_decay" in settings)
    for file in files:
        one, two = (folder_of(config, 60) / file for config in (straight, resumed))
        assert one.read_bytes() == two.read_bytes(), file
    evaluations = [
        [line for line in metrics_of(config, "eval") if line["step"] != 25] for config in (straight, resumed)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3
    for name, tensor in whole.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), parts.model.state_dict()[name].numpy(), err_msg=name)


def test_resume_with_a_loss_scale(run, run_config, monkeypatch, recorder):
    """float16's scale on a CPU, without the casts; one step overflows before the resume."""
    monkeypatch.setattr(precisions._Fp16, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(precisions.Precision, "of", staticmethod(lambda name, device: precisions._Fp16()))
    straight, resumed = run_config("straight", max_steps=6), run_config("resumed", max_steps=6)

    def overflowing(step, calls):
        calls.append(1)
        loss = step.backward()
        if len(calls) == 2:
            gradient = step.parameters["out.bias"].grad
            gradient.copy_(gradient * np.inf, True)
        step.update()
        return loss

    run(straight, functools.partial(overflowing, calls=[]))
    run(dataclasses.replace(resumed, run_steps=3), functools.partial(overflowing, calls=[]))
    assert load_checkpoint(folder_of(resumed, 3)).scaler == {"scale": 2.0**14, "good_steps": 1}
    run(resumed)
    assert load_checkpoint(folder_of(resumed, 6)).scaler == {"scale": 2.0**14, "good_steps": 4}
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, two = (folder_of(config, 6) / file for config in (straight, resumed))
        assert one.read_bytes() == two.read_bytes(), file


def test_the_live_model_ends_with_the_averages(
    run, run_config, toy, dev_data, metrics_of, weights_of, assert_same_bits
):
    """What was evaluated and exported; the checkpoint keeps both, for the resume."""
    config = run_config(ema_decay=0.9)
    learner = run(config)
    checkpoint = load_checkpoint(folder_of(config, 60))
    averages = {name: tensor.numpy() for name, tensor in checkpoint.average.items()}
    assert sorted(averages) == sorted(TRAINED) and checkpoint.average_updates == 60
    assert_same_bits(weights_of(learner.model), averages)
    assert any((array != checkpoint.model[name].numpy()).any() for name, array in averages.items())
    logged = metrics_of(config, "eval")[-1]
    for result in (
        learner.evaluate(dev_data),
        learner.evaluate(dev_data, ckpt=-1),
        propeller.Learner(toy, config, HPARAMS).evaluate(dev_data),
        propeller.Learner(toy, config, HPARAMS).evaluate(dev_data, ckpt=60),
    ):
        assert result == {name: logged[name] for name in ("loss", "acc", "n")}
    without = propeller.Learner(toy, dataclasses.replace(config, ema_decay=None), HPARAMS)
    assert without.evaluate(dev_data)["loss"] != logged["loss"], "the weights as they are"


def test_training_does_not_see_the_averages(run, run_config, assert_same_bits):
    """With them and without, evaluated often or never: the same weights are trained."""
    weights = []
    for name, settings in (
        ("without", {}),
        ("with", {"ema_decay": 0.9}),
        ("often", {"ema_decay": 0.9, "eval_steps": 7}),
    ):
        config = run_config(name, max_steps=20, **settings)
        run(config)
        tensors = load_checkpoint(folder_of(config, 20)).model
        weights.append({key: tensor.numpy() for key, tensor in tensors.items()})
    assert_same_bits(weights[0], weights[1])
    assert_same_bits(weights[0], weights[2])


def test_a_learner_with_averages_trains_on(run, run_config, toy, train_data, dev_data):
    """From the trained weights, though the live model held the averages in between."""
    straight, resumed = (run_config(name, max_steps=20, ema_decay=0.9) for name in ("straight", "resumed"))
    run(straight)
    learner = propeller.Learner(toy, dataclasses.replace(resumed, run_steps=10), HPARAMS)
    for _ in range(2):
        learner.train(train_data, eval_datasets={"dev": dev_data})
    for file in ("model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"):
        one, two = (folder_of(config, 20) / file for config in (straight, resumed))
        assert one.read_bytes() == two.read_bytes(), file


def test_the_averages_are_switched_on_and_off(run, run_config, caplog, weights_of, assert_same_bits):
    """On: they begin with the weights of that step. Off: the weights count, and the averages are dropped."""
    config = run_config(max_steps=30, eval_steps=10, save_steps=10)
    run(dataclasses.replace(config, run_steps=10))
    caplog.set_level("WARNING", logger="propeller")
    run(dataclasses.replace(config, ema_decay=0.9, run_steps=10))
    assert "run_config.ema_decay: None -> 0.9" in caplog.text
    begun, after = (load_checkpoint(folder_of(config, step)) for step in (10, 20))
    assert (begun.average, begun.average_updates, after.average_updates) == ({}, 0, 10)
    for name in TRAINED:
        latest, first, average = (
            tensors[name].numpy() for tensors in (after.model, begun.model, after.average)
        )
        assert np.abs(average - latest).max() < np.abs(first - latest).max(), name
    caplog.clear()
    learner = run(config)
    assert "run_config.ema_decay: 0.9 -> None" in caplog.text
    last = load_checkpoint(folder_of(config, 30))
    assert (last.average, last.average_updates) == ({}, 0)
    assert_same_bits(weights_of(learner.model), {name: tensor.numpy() for name, tensor in last.model.items()})
