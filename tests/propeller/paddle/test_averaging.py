"""The average of the weights: against numpy, over a save, and in and out of the live model."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.paddle

from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.averaging import WeightAverage

# Paddle's word on every forward of a batch norm.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track global mean")


class Net(paddle.nn.Layer):
    """Parameters that are trained, one of them without an axis, a frozen one, and buffers."""

    def __init__(self):
        super().__init__()
        self.first = paddle.nn.Linear(5, 7)
        self.norm = paddle.nn.BatchNorm1D(7)
        self.out = paddle.nn.Linear(7, 3)
        self.first.bias.stop_gradient = True
        self.shift = self.create_parameter([], default_initializer=paddle.nn.initializer.Constant(0.5))

    def forward(self, inputs):
        return self.out(self.norm(self.first(inputs))) + self.shift


TRAINED = ["shift", "first.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"]


@pytest.fixture
def net():
    paddle.seed(3)
    return Net()


@pytest.fixture
def learn(net):
    """`learn(n, averages)` makes n steps and updates the averages after each."""
    optimizer = paddle.optimizer.Adam(0.05, parameters=net.parameters())
    rng = np.random.default_rng(0)

    def run(steps, *averages, seen=lambda: None):
        for _ in range(steps):
            net(paddle.to_tensor(rng.standard_normal((8, 5), np.float32))).square().sum().backward()
            optimizer.step()
            optimizer.clear_grad()
            for average in averages:
                average.update()
            seen()

    return run


def arrays(tensors):
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("decay", [0.6, 0.999])
def test_equals_numpy(net, learn, weights_of, decay):
    average = WeightAverage(net, decay)
    expected = {name: array.astype(np.float64) for name, array in weights_of(net).items() if name in TRAINED}
    count = 0

    def seen():
        nonlocal count
        kept = min(decay, (1 + count) / (10 + count))
        count += 1
        for name, weight in weights_of(net).items():
            if name in TRAINED:
                expected[name] = kept * expected[name] + (1 - kept) * weight
        for name, tensor in average.tensors().items():
            np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=2e-6, atol=2e-7, err_msg=name)

    learn(30, average, seen=seen)
    assert average.num_updates == count == 30
    assert [*average.tensors()] == TRAINED
    weights = weights_of(net)
    assert np.abs(weights["first.weight"] - expected["first.weight"]).max() > 0.01, "else nothing shows"


def test_first_updates_follow_quickly(net):
    """As TensorFlow's: the first of all keeps a tenth."""
    average = WeightAverage(net, 0.9999)
    net.shift.set_value(paddle.to_tensor(1.5))
    average.update()
    assert average.tensors()["shift"].item() == pytest.approx(0.1 * 0.5 + 0.9 * 1.5)


def test_applied_and_back_bit_for_bit(net, learn, weights_of, assert_same_bits):
    average = WeightAverage(net, 0.9)
    learn(5, average)
    net.out.bias.set_value(paddle.to_tensor([np.nan, -0.0, np.inf], "float32"))
    identities = {name: id(parameter) for name, parameter in net.named_parameters()}
    trained, averages = weights_of(net), arrays(average.tensors())
    with average.applied():
        assert_same_bits(weights_of(net), {**trained, **averages})
        assert not net.out.weight.stop_gradient and net.out.weight.is_leaf
        with average.applied():  # an export within an evaluation
            pass
        assert_same_bits(weights_of(net), {**trained, **averages})
    back = weights_of(net)
    assert {name: array.tobytes() for name, array in back.items()} == {
        name: array.tobytes() for name, array in trained.items()
    }
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == identities
    assert_same_bits(arrays(average.tensors()), averages)
    with pytest.raises(KeyboardInterrupt), average.applied(), paddle.no_grad():
        net.out.weight.zero_()  # whatever happens to them in there
        raise KeyboardInterrupt
    assert weights_of(net)["out.weight"].tobytes() == trained["out.weight"].tobytes()
    assert_same_bits(arrays(average.tensors()), averages)


def test_training_goes_on_as_if_nothing_had_been(net, learn, weights_of, assert_same_bits):
    """The optimizer goes on with the parameters, and with its own state, after the averages were in."""
    states = []
    for applied in (False, True):
        paddle.seed(3)
        other = Net()
        optimizer = paddle.optimizer.Adam(0.05, parameters=other.parameters())
        average = WeightAverage(other, 0.9)
        for step in range(6):
            other(paddle.full([4, 5], step / 7)).square().sum().backward()
            optimizer.step()
            optimizer.clear_grad()
            average.update()
            if applied:
                other.eval()
                with average.applied(), paddle.no_grad():
                    other(paddle.ones([2, 5]))
                other.train()
        states.append({**weights_of(other), **{f"{k}|avg": v for k, v in arrays(average.tensors()).items()}})
    assert_same_bits(*states)


def test_exact_after_save_and_load(net, learn, tmp_path, weights_of, assert_same_bits):
    average = WeightAverage(net, 0.99)
    learn(12, average)
    safetensors.paddle.save_file(average.tensors(), str(tmp_path / "average.safetensors"))
    other = WeightAverage(net, 0.99)
    other.load(safetensors.paddle.load_file(str(tmp_path / "average.safetensors")), average.num_updates)
    assert other.num_updates == 12
    learn(9, average, other)
    assert_same_bits(arrays(average.tensors()), arrays(other.tensors()))
    assert any((weights_of(net)[name] != array).any() for name, array in arrays(other.tensors()).items())


def test_what_does_not_fit_is_listed_and_nothing_loaded(net, learn, assert_same_bits):
    average = WeightAverage(net, 0.9)
    before = arrays(average.tensors())
    good = {name: tensor + 1.0 for name, tensor in average.tensors().items()}
    bad = {**good, "out.weight": paddle.ones([7, 4]), "out.bias": good["out.bias"].astype("float64")}
    bad["head.weight"] = bad.pop("shift")
    with pytest.raises(CheckpointError) as caught:
        average.load(bad, 3)
    message = str(caught.value)
    assert "were others frozen then?" in message
    for problem in (
        "missing: shift",
        "left over: head.weight",
        "out.weight: [7, 4] float32 where the model has [7, 3] float32",
        "out.bias: [3] float64 where the model has [3] float32",
    ):
        assert problem in message
    with pytest.raises(CheckpointError, match="num_updates: -1"):
        average.load(good, -1)
    assert average.num_updates == 0
    assert_same_bits(arrays(average.tensors()), before)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_decay_out_of_range(net, decay):
    with pytest.raises(ConfigError, match="ema_decay must be between 0 and 1"):
        WeightAverage(net, decay)


def test_nothing_is_trained(net):
    for parameter in net.parameters():
        parameter.stop_gradient = True
    with pytest.raises(ConfigError, match="no parameter that is trained"):
        WeightAverage(net, 0.9)
