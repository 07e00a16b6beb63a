"""Precisions: who may use which, and the loss scale of fp16, on a CPU without the casts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train import precision as module
from propeller.paddle.train.precision import Precision


@pytest.fixture
def fp16():
    """float16 without the check of the device."""
    return module._Fp16()


@pytest.fixture
def layer():
    paddle.seed(1)
    return paddle.nn.Linear(4, 3)


def gradients(layer, factor=1.0, precision=None):
    """Gradients of a loss, as they are, or scaled and unscaled; and whether they are finite."""
    layer.clear_gradients()
    inputs = paddle.to_tensor(np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4))
    loss = (layer(inputs).tanh().square().mean()) * factor
    finite = None
    if precision is None:
        loss.backward()
    else:
        precision.scaled(loss).backward()
        finite = precision.unscale(layer.parameters())
    return {name: parameter.grad.numpy().copy() for name, parameter in layer.named_parameters()}, finite


def test_fp32_does_nothing(layer):
    precision = Precision.of("fp32", "cpu")
    assert (precision.name, precision.may_overflow) == ("fp32", False)
    loss = layer(paddle.ones([1, 4])).sum()
    assert precision.scaled(loss) is loss
    with precision.autocast():
        assert layer(paddle.ones([1, 4])).dtype == paddle.float32
    assert precision.unscale(layer.parameters()) is True
    precision.update(True)
    precision.update(False)  # a step that is skipped for another reason
    assert precision.state() == {}
    precision.load({})


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_cpu_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError) as caught:
        Precision.of(name, "cpu")
    assert f"precision {name} needs a GPU" in str(caught.value)
    assert "automatic casts do nothing" in str(caught.value) and "--bf16" in str(caught.value)


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"Unknown precision 'pf16'. Did you mean 'fp16'\?"):
        Precision.of("pf16", "gpu:0")


def test_what_the_device_can(monkeypatch):
    asked = []

    def supports(name, answer):
        monkeypatch.setattr(
            paddle.amp, f"is_{name}_supported", lambda device: asked.append((name, device)) or answer
        )

    supports("float16", True)
    supports("bfloat16", True)
    assert type(Precision.of("fp16", "gpu:1")) is module._Fp16
    assert Precision.of("fp16", "xpu").may_overflow
    brain = Precision.of("bf16", "gpu:1")
    assert (brain.name, brain.may_overflow, brain.state()) == ("bf16", False, {})
    assert asked == [("float16", "gpu:1"), ("float16", "xpu"), ("bfloat16", "gpu:1")]
    supports("float16", False)
    supports("bfloat16", False)
    with pytest.raises(ConfigError, match="gpu:0 cannot train in bf16.*Take fp16 or fp32"):
        Precision.of("bf16", "gpu:0")
    with pytest.raises(ConfigError, match="gpu:0 cannot train in fp16.*Take fp32"):
        Precision.of("fp16", "gpu:0")


def test_autocast_is_paddles(layer, fp16):
    """On a CPU Paddle itself says that its casts do nothing there: so it was really asked."""
    for precision in (fp16, Precision("bf16")):
        with pytest.warns(UserWarning, match="it makes no effect"), precision.autocast():
            assert layer(paddle.ones([1, 4])).dtype == paddle.float32


def test_gradients_are_the_same_to_the_bit(layer, fp16, assert_same_bits):
    plain, _ = gradients(layer)
    scaled, finite = gradients(layer, precision=fp16)
    assert finite is True and fp16.scale == 2.0**15
    assert_same_bits(plain, scaled)


def test_small_gradients_survive_float16(layer, fp16):
    """What the scale is for: 1e-8 is zero in float16, and 3e-4 after the scale is not."""
    value = paddle.to_tensor([1e-8])
    assert value.astype("float16").item() == 0.0
    scaled = fp16.scaled(value).astype("float16").astype("float32") / fp16.scale
    assert scaled.item() == pytest.approx(1e-8, rel=1e-3)


def test_a_half_loss_is_scaled_in_float32(fp16):
    loss = paddle.to_tensor([3.0]).astype("float16")
    assert fp16.scaled(loss).dtype == paddle.float32
    assert fp16.scaled(loss).item() == 3.0 * 2**15, "beyond float16"


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_value_in_any_gradient_is_found(layer, fp16, bad):
    for name, parameter in layer.named_parameters():
        gradients(layer, precision=fp16)
        assert fp16.unscale(layer.parameters()), name
        spoilt = parameter.grad.numpy()
        spoilt.flat[-1] = bad
        parameter.grad.copy_(paddle.to_tensor(spoilt), True)
        assert fp16.unscale(layer.parameters()) is False, name


def test_missing_gradients(layer, fp16):
    assert fp16.unscale(layer.parameters()) is True
    (fp16.scaled(layer.bias.sum())).backward()
    assert layer.weight.grad is None
    assert fp16.unscale(layer.parameters()) is True
    np.testing.assert_array_equal(layer.bias.grad.numpy(), np.ones(3))


def test_parameters_of_another_type(fp16):
    parameter = paddle.create_parameter([2], "float64")
    parameter.sum().backward()
    with pytest.raises(ConfigError, match="needs float32 parameters; the gradients here are float64"):
        fp16.unscale([parameter])


def test_scale_falls_and_grows(fp16):
    fp16.update(False)
    assert fp16.scale == 2.0**14
    for _ in range(module.GROWTH_STEPS - 1):
        fp16.update(True)
    assert fp16.scale == 2.0**14
    fp16.update(True)
    assert fp16.scale == 2.0**15
    for _ in range(module.GROWTH_STEPS - 1):
        fp16.update(True)
    fp16.update(False)  # one bad step begins the count anew
    for _ in range(module.GROWTH_STEPS - 1):
        fp16.update(True)
    assert fp16.scale == 2.0**14


def test_the_end_of_the_scale(fp16, caplog):
    caplog.set_level("INFO", logger="propeller")
    for _ in range(15):
        fp16.update(False)
    assert fp16.scale == 1.0
    assert "step skipped, loss scale now 1" in caplog.messages[-1]
    with pytest.raises(FloatingPointError, match="the loss scale of fp16 fell to 1"):
        fp16.update(False)


def train(layer, precision, factors):
    optimizer = paddle.optimizer.Adam(0.1, parameters=layer.parameters())
    for factor in factors:
        _, finite = gradients(layer, factor, precision)
        if finite or finite is None:
            optimizer.step()
        if precision is not None:
            precision.update(finite)
        optimizer.clear_grad()
    return {name: parameter.numpy().copy() for name, parameter in layer.named_parameters()}


def test_steps_that_overflow_leave_no_trace(layer, fp16, assert_same_bits):
    """Training with them ends where training without them and without a scale does."""
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    skipping = train(layer, fp16, [1.0, 1e36, 2.0, 1e36, 3.0])
    assert fp16.scale == 2.0**13
    layer.set_state_dict(start)
    assert_same_bits(skipping, train(layer, None, [1.0, 2.0, 3.0]))
    assert all((array != start[name].numpy()).any() for name, array in skipping.items())


def test_state_goes_through_json(fp16):
    fp16.update(False)
    for _ in range(7):
        fp16.update(True)
    state = json.loads(json.dumps(fp16.state()))
    assert state == {"scale": 2.0**14, "good_steps": 7}
    other = module._Fp16()
    other.load(state)
    assert other.state() == state
    for _ in range(module.GROWTH_STEPS - 7):
        other.update(True)
    assert other.scale == 2.0**15


def test_state_of_another_precision_changes_nothing(fp16):
    fp16.load(Precision("fp32").state())
    assert fp16.scale == module.INITIAL_SCALE
    fp32 = Precision.of("fp32", "cpu")
    fp32.load(fp16.state())
    assert fp32.state() == {}


@pytest.mark.parametrize(
    "state",
    [
        {"scale": 8.0},
        {"scale": None, "good_steps": 0},
        {"scale": "NaN", "good_steps": 0},
        {"scale": 0.5, "good_steps": 0},
        {"scale": 8.0, "good_steps": -1},
    ],
)
def test_a_damaged_state(fp16, state):
    with pytest.raises(CheckpointError, match="The saved loss scale"):
        fp16.load(state)
    assert fp16.state() == {"scale": module.INITIAL_SCALE, "good_steps": 0}
