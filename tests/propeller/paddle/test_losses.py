"""Terms of losses, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from propeller.paddle import losses
from propeller.paddle.runtime import paddle


def tensors(shape=(5, 3), scale=3.0):
    rng = np.random.default_rng(0)
    arrays = [(scale * rng.normal(size=shape)).astype(np.float32) for _ in range(2)]
    return [paddle.to_tensor(array, stop_gradient=False) for array in arrays]


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_r_drop_is_the_mean_of_both_divergences(shape):
    first, second = tensors(shape)
    p, q = (softmax(tensor.numpy().astype(np.float64), axis=-1) for tensor in (first, second))
    expected = (rel_entr(p, q).sum() + rel_entr(q, p).sum()) / 2
    assert losses.r_drop(first, second).item() == pytest.approx(expected, rel=1e-5)
    assert losses.r_drop(second, first).item() == pytest.approx(expected, rel=1e-5)


def test_r_drop_of_equal_passes_is_nothing():
    first, _ = tensors()
    assert losses.r_drop(first, first + 7.0).item() == pytest.approx(0.0, abs=1e-5), "softmax is the same"
    assert losses.r_drop(first, first, regression=True).item() == 0.0


def test_r_drop_sums_over_the_examples():
    first, second = tensors()
    for regression in (False, True):
        rows = [losses.r_drop(first[i : i + 1], second[i : i + 1], regression=regression) for i in range(5)]
        whole = losses.r_drop(first, second, regression=regression)
        assert sum(row.item() for row in rows) == pytest.approx(whole.item(), rel=1e-5)


def test_r_drop_pulls_both_passes():
    first, second = tensors()
    before = losses.r_drop(first, second)
    before.backward()
    for tensor in (first, second):
        assert np.abs(tensor.grad.numpy()).max() > 0
        np.testing.assert_allclose(tensor.grad.numpy().sum(-1), 0, atol=1e-5)
    moved = losses.r_drop(first - 0.01 * first.grad, second - 0.01 * second.grad)
    assert moved.item() < before.item()


@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_r_drop_stays_finite_where_probabilities_vanish(size):
    first, second = (paddle.to_tensor(row, stop_gradient=False) for row in ([[size, 0.0]], [[0.0, size]]))
    total = losses.r_drop(first, second)
    total.backward()
    assert 50.0 <= total.item() <= size, "Paddle's softmax on a CPU bounds log probabilities by -64"
    assert np.isfinite(first.grad.numpy()).all() and np.isfinite(second.grad.numpy()).all()


def test_r_drop_for_a_regression_is_the_squared_difference():
    first, second = tensors((4, 1))
    expected = ((first.numpy().astype(np.float64) - second.numpy()) ** 2).sum()
    assert losses.r_drop(first, second, regression=True).item() == pytest.approx(expected, rel=1e-5)
