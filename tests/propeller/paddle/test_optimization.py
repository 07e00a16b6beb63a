"""AdamW, its schedule, exclusions, clipping and multipliers, against plain numpy; frozen parameters."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from propeller.errors import ConfigError
from propeller.paddle import optimization
from propeller.paddle.optimization import warmup_decay
from propeller.paddle.runtime import paddle
from propeller.paddle.train.checkpoint import optimizer_tensors, set_optimizer_tensors


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("linear", 0, {0: 1.0, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0.0, 11: 0.0}),
        ("linear", 4, {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 7: 0.5, 10: 0.0, 99: 0.0}),
        ("cosine", 2, {1: 0.5, 2: 1.0, 4: 0.5 + 0.25 * math.sqrt(2), 6: 0.5, 10: 0.0, 99: 0.0}),
        ("constant", 4, {0: 0.0, 2: 0.5, 4: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", 10, {0: 0.0, 9: 0.9, 10: 1.0}),
    ],
)
def test_schedules(schedule, warmup_steps, expected):
    factor = warmup_decay(schedule, max_steps=10, warmup_steps=warmup_steps)
    assert {step: factor(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_constant_needs_no_end():
    factor = warmup_decay("constant", max_steps=None, warmup_steps=0)
    assert [factor(step) for step in (0, 10**6)] == [1.0, 1.0]


class Small(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.linear = paddle.nn.Linear(3, 2)
        self.layer_norm = paddle.nn.LayerNorm(2)
        self.frozen = paddle.nn.Linear(2, 2)
        self.frozen.weight.stop_gradient = True

    def forward(self, x):
        return self.frozen(self.layer_norm(self.linear(x)))


@pytest.fixture
def model():
    paddle.seed(7)
    model = Small()
    for parameter in model.parameters():  # none is 0, so that decay would show
        parameter.set_value(parameter.numpy() + np.float32(0.5))
    return model


def adamw(model, **changes):
    values = {"learning_rate": 0.1, "max_steps": 10, "max_grad_norm": None}
    return optimization.adamw(model, **{**values, **changes})


def zero_gradient_step(model, optimizer):
    before = {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}
    loss = sum((parameter * 0.0).sum() for parameter in model.parameters())
    loss.backward()
    optimizer.step()
    return {name: parameter.numpy() / before[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "decayed"),
    [
        ({"weight_decay": 0.2}, {"linear.weight"}),
        ({"weight_decay": 0.2, "no_decay": ["LINEAR.*", "linear.*"]},
         {"layer_norm.weight", "layer_norm.bias", "frozen.bias"}),
        ({"weight_decay": 0.0}, set()),
    ],
    ids=["bert", "own-patterns", "none"],
)  # fmt: skip
def test_weight_decay_leaves_out_biases_and_norms(model, options, decayed):
    ratios = zero_gradient_step(model, adamw(model, **options))
    for name, ratio in ratios.items():
        np.testing.assert_allclose(ratio, 0.98 if name in decayed else 1.0, rtol=1e-6, err_msg=name)


def numpy_adamw(weights, gradients_of, rates, weight_decay, max_grad_norm, scale_of):
    """Algorithm 2 of Loshchilov & Hutter, in float64, with clipping of the global norm.

    `scale_of` gives each parameter's multiplier of the learning rate.
    """
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    for step, rate in enumerate(rates, start=1):
        gradients = gradients_of(step)
        norm = math.sqrt(sum(float((array**2).sum()) for array in gradients.values()))
        scale = 1.0 if max_grad_norm is None else max_grad_norm / max(norm, max_grad_norm)
        for name, gradient in gradients.items():
            gradient = gradient * scale
            own_rate = rate * scale_of(name)
            if name == "linear.weight":
                weights[name] -= own_rate * weight_decay * weights[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            weights[name] -= own_rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return weights


def gradients_for(model, steps):
    rng = np.random.default_rng(0)
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    return [
        {name: rng.normal(size=p.shape).astype(np.float32) for name, p in trained.items()}
        for _ in range(steps)
    ]


def step_with(model, optimizer, gradients):
    """Makes one step with given gradients; returns the learning rate of it."""
    rate = optimizer.get_lr()
    parameters = dict(model.named_parameters())
    sum((parameters[name] * paddle.to_tensor(array)).sum() for name, array in gradients.items()).backward()
    optimizer.step()
    optimizer.clear_grad()
    optimizer._learning_rate.step()
    return rate


SCALES = {"linear.weight": 0.25, "linear.bias": 0.25, "layer_norm.weight": 0.5, "layer_norm.bias": 0.75}


def scale(name):
    return SCALES.get(name, 1.0)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 100.0])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_equals_plain_adamw(model, max_grad_norm, scaled):
    steps = gradients_for(model, 5)
    assert math.sqrt(sum(float((array**2).sum()) for array in steps[0].values())) > 1.0, "must be clipped"
    start = {name: p.numpy().copy() for name, p in model.named_parameters()}
    options = {"warmup_proportion": 0.3, "weight_decay": 0.1, "max_grad_norm": max_grad_norm}
    optimizer = adamw(model, learning_rate_scale=scale if scaled else None, **options)
    rates = [step_with(model, optimizer, gradients) for gradients in steps]
    np.testing.assert_allclose(rates, 0.1 * np.array([0, 1 / 3, 2 / 3, 1, 6 / 7]), rtol=1e-6)
    expected = numpy_adamw(
        {name: start[name] for name in steps[0]},
        lambda step: steps[step - 1],
        rates,
        0.1,
        max_grad_norm,
        scale if scaled else lambda name: 1.0,
    )
    for name, parameter in model.named_parameters():
        if name == "frozen.weight":
            np.testing.assert_array_equal(parameter.numpy(), start[name])
        else:
            np.testing.assert_allclose(parameter.numpy(), expected[name], atol=1e-6, err_msg=name)


def test_multipliers_are_set_not_multiplied(model):
    for _ in range(2):
        adamw(model, learning_rate_scale=scale)
    adamw(model)
    found = {name: parameter.optimize_attr["learning_rate"] for name, parameter in model.named_parameters()}
    assert found == {**dict.fromkeys(found, 1.0), **SCALES}


def test_a_run_with_multipliers_resumes_to_the_bit():
    def begun():
        paddle.seed(7)
        model = Small()
        return model, adamw(model, learning_rate_scale=scale, max_grad_norm=1.0, weight_decay=0.1)

    model, optimizer = begun()
    steps = gradients_for(model, 6)
    for gradients in steps[:3]:
        step_with(model, optimizer, gradients)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    assert {name.partition("|")[0] for name in saved} == steps[0].keys()
    resumed, resumed_optimizer = begun()
    resumed.set_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    set_optimizer_tensors(resumed_optimizer, resumed, saved)
    for _ in range(3):
        resumed_optimizer._learning_rate.step()
    for name, tensor in optimizer_tensors(resumed_optimizer, resumed).items():
        np.testing.assert_array_equal(tensor.numpy(), saved[name].numpy(), err_msg=name)
    for gradients in steps[3:]:
        assert step_with(model, optimizer, gradients) == step_with(resumed, resumed_optimizer, gradients)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_multipliers_out_of_range(model, value):
    message = rf"learning rate of layer_norm.bias is scaled by {value}; .*above 0. .*freeze it"
    with pytest.raises(ConfigError, match=message):
        adamw(model, learning_rate_scale=lambda name: value if name == "layer_norm.bias" else 0.5)
    assert model.linear.weight.optimize_attr["learning_rate"] == 1.0, "nothing is set halfway"


def test_the_multiplier_of_a_frozen_parameter_is_not_asked_for(model):
    asked = []
    adamw(model, learning_rate_scale=lambda name: asked.append(name) or 1.0)
    assert asked == [name for name, p in model.named_parameters() if not p.stop_gradient]
    assert "frozen.weight" not in asked


def test_frozen_parameters_stay(model, caplog):
    start = {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, "propeller"):
        names = optimization.freeze(model, ["linear.*", "*.bias"])
    assert names == ["linear.weight", "linear.bias", "layer_norm.bias", "frozen.bias"]
    assert caplog.messages == ["frozen: 4 of 6 parameters, 66.7 % of the weights"]
    optimizer = adamw(model, weight_decay=0.5, no_decay=[])
    model(paddle.ones([2, 3])).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.numpy() == start[name]).all() == (name != "layer_norm.weight"), name
    assert model.linear.weight.grad is None


def test_nothing_to_freeze(model, caplog):
    with caplog.at_level(logging.INFO, "propeller"):
        assert optimization.freeze(model, []) == []
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["linaer.*"], r"No parameter matches 'linaer\.\*', .*Did you mean 'linear\.\*'"),
        (["linear.*", "layer_norm.wieght"], r"'layer_norm.wieght'.*Did you mean 'layer_norm.weight'"),
        (["Linear.*"], r"No parameter matches 'Linear\.\*'"),
        (["qqq"], "'qqq', which was to be frozen. The model's parameters begin with frozen, layer_norm, lin"),
        (["*"], r"All parameters are frozen by \*: nothing is left to train"),
        (["linear.*", "layer_norm.*", "frozen.bias"], "All parameters are frozen by linear.*, layer_norm"),
    ],
)
def test_patterns_that_freeze_nothing_or_all(model, patterns, message):
    with pytest.raises(ConfigError, match=message):
        optimization.freeze(model, patterns)
    frozen = [name for name, parameter in model.named_parameters() if parameter.stop_gradient]
    assert frozen == ["frozen.weight"], "as before"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": "linea"},
            "Unknown schedule 'linea'. Did you mean 'linear'. Known: linear, cosine, const",
        ),
        ({"max_steps": None}, "The linear schedule is laid out over max_steps, which is not set"),
        (
            {"max_steps": None, "schedule": "constant", "warmup_proportion": 0.1},
            "share of max_steps, which is not",
        ),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"warmup_proportion": 1.1}, "warmup_proportion must be between 0 and 1, got 1.1"),
        ({"warmup_proportion": -0.1}, "warmup_proportion must be between 0 and 1"),
        ({"weight_decay": -0.01}, "weight_decay must not be negative, got -0.01"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, or None not to clip, got 0.0"),
    ],
)
def test_values_out_of_range(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        adamw(model, **changes)
