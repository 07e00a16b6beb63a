"""AdamW, its schedule, exclusions and clipping, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from propeller.errors import ConfigError
from propeller.paddle import optimization
from propeller.paddle.optimization import warmup_decay
from propeller.paddle.runtime import paddle


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


def numpy_adamw(weights, gradients_of, rates, weight_decay, max_grad_norm):
    """Algorithm 2 of Loshchilov & Hutter, in float64, with clipping of the global norm."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    for step, rate in enumerate(rates, start=1):
        gradients = gradients_of(step)
        norm = math.sqrt(sum(float((array**2).sum()) for array in gradients.values()))
        scale = 1.0 if max_grad_norm is None else max_grad_norm / max(norm, max_grad_norm)
        for name, gradient in gradients.items():
            gradient = gradient * scale
            if name == "linear.weight":
                weights[name] -= rate * weight_decay * weights[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            weights[name] -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return weights


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 100.0])
def test_equals_plain_adamw(model, max_grad_norm):
    rng = np.random.default_rng(0)
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    steps = [
        {name: rng.normal(size=p.shape).astype(np.float32) for name, p in trained.items()} for _ in range(5)
    ]
    assert math.sqrt(sum(float((array**2).sum()) for array in steps[0].values())) > 1.0, "must be clipped"
    start = {name: p.numpy().copy() for name, p in trained.items()}
    frozen = model.frozen.weight.numpy().copy()
    optimizer = adamw(model, warmup_proportion=0.3, weight_decay=0.1, max_grad_norm=max_grad_norm)
    rates = []
    for gradients in steps:
        rates.append(optimizer.get_lr())
        loss = sum((p * paddle.to_tensor(gradients[name])).sum() for name, p in trained.items())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        optimizer._learning_rate.step()
    np.testing.assert_allclose(rates, 0.1 * np.array([0, 1 / 3, 2 / 3, 1, 6 / 7]), rtol=1e-6)
    expected = numpy_adamw(start, lambda step: steps[step - 1], rates, 0.1, max_grad_norm)
    for name, parameter in trained.items():
        np.testing.assert_allclose(parameter.numpy(), expected[name], atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(model.frozen.weight.numpy(), frozen)


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
