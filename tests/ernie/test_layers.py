"""The layers that have a route of their own on a CPU, beside Paddle's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from ernie.layers import LayerNorm, Linear, gelu, merge_heads, split_heads
from propeller.paddle.runtime import paddle

F = paddle.nn.functional
EPSILON = 1e-12


@pytest.fixture(autouse=True)
def _seeded():
    paddle.seed(7)


def run(function, arrays, kind="float32"):
    """The output of a function and the gradient of each input, of a weighted sum of all outputs."""
    inputs = [paddle.to_tensor(array, kind, stop_gradient=False) for array in arrays]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, paddle.Tensor) else list(outputs)
    rng = np.random.default_rng(1)
    weights = [paddle.to_tensor(rng.standard_normal(output.shape), kind) for output in outputs]
    gradients = paddle.grad(outputs, inputs, weights)
    return [tensor.numpy() for tensor in (*outputs, *gradients)]


def check(own, reference, arrays):
    exact = run(reference, arrays, "float64")
    for ours, expected in zip(run(own, arrays), exact, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [[33, 20], [4, 7, 20]])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_layer_norm_has_paddles_gradients(shape, shift):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape) + shift
    weight, bias, factor = rng.standard_normal(20), rng.standard_normal(20), rng.standard_normal(shape)
    results = []
    for layer, kind in ((LayerNorm(20, EPSILON), "float32"), (paddle.nn.LayerNorm(20, EPSILON), "float64")):
        layer.to(dtype=kind)
        layer.set_state_dict({"weight": weight.astype(kind), "bias": bias.astype(kind)})
        data = paddle.to_tensor(x, kind, stop_gradient=False)
        output = layer(data)
        (output * paddle.to_tensor(factor, kind)).sum().backward()
        results.append([output, data.grad, layer.weight.grad, layer.bias.grad])
    for own, exact in zip(*results, strict=True):
        np.testing.assert_allclose(own.numpy(), exact.numpy(), rtol=1e-5, atol=2e-5)


def test_a_row_without_spread_stays_a_number():
    layer, x = LayerNorm(6, EPSILON), paddle.full([2, 6], 3.0)
    x.stop_gradient = False
    layer(x).sum().backward()
    assert np.isfinite(x.grad.numpy()).all()


def test_a_frozen_layer_norm_passes_the_gradient_on():
    layer, x = LayerNorm(6, EPSILON), paddle.randn([2, 6])
    layer.weight.stop_gradient = True
    x.stop_gradient = False
    (layer(x) ** 2).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None
    assert layer.weight.grad is None


def test_gelu_and_its_gradient():
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e30, -50.0, 0.0, 50.0, 1e30]])
    check(gelu, F.gelu, [x])


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_gelu_is_the_same_with_and_without_gradient(needs_gradient):
    x = paddle.randn([50, 20])
    expected = F.gelu(x).numpy()
    x.stop_gradient = not needs_gradient
    np.testing.assert_allclose(gelu(x).numpy(), expected, rtol=1e-6, atol=1e-6)


def plain_split(x):
    parts = (x[:, :, start : start + 24] for start in (0, 24, 48))
    return [part.reshape([0, 0, 4, 6]).transpose([0, 2, 1, 3]) for part in parts]


def test_heads_are_split_as_by_transposing():
    x = np.random.default_rng(0).standard_normal([2, 5, 72])
    check(lambda x: split_heads(x, 3, 4), plain_split, [x])
    assert all(part.is_contiguous() for part in split_heads(paddle.to_tensor(x), 3, 4))


def test_heads_are_merged_as_by_transposing():
    x = np.random.default_rng(0).standard_normal([2, 4, 5, 6])
    check(merge_heads, lambda x: x.transpose([0, 2, 1, 3]).reshape([2, 5, 24]), [x])
    assert merge_heads(paddle.to_tensor(x)).is_contiguous()


def test_merging_undoes_splitting():
    x = paddle.randn([2, 5, 24])
    (heads,) = split_heads(x, 1, 4)
    assert heads.shape == [2, 4, 5, 6]
    np.testing.assert_array_equal(merge_heads(heads).numpy(), x.numpy())


@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"]], ids=["none", "weight", "bias"])
def test_linear_adds_its_bias_whatever_is_frozen(frozen):
    layer, x = Linear(5, 4, 0.5), paddle.randn([2, 3, 5])
    x.stop_gradient = False
    layer.bias.set_value(paddle.randn([4]))
    for name in frozen:
        getattr(layer, name).stop_gradient = True
    expected = x.numpy() @ layer.weight.numpy() + layer.bias.numpy()
    output = layer(x)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-6)
    output.sum().backward()
    for name in ("weight", "bias"):
        assert (getattr(layer, name).grad is None) == (name in frozen)
