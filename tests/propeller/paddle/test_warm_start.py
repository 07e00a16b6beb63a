"""First weights from elsewhere: what is loaded, new, left over, refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import safetensors.numpy
import safetensors.paddle

import propeller.paddle as propeller
from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.warm_start import warm_start
from propeller.types import HParams, RunConfig, RunMode, WarmStartSetting

SHAPES = {
    "table.weight": (50, 16),
    "norm.weight": (16,),
    "norm.bias": (16,),
    "out.weight": (16, 2),
    "out.bias": (2,),
}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def model(toy):
    return toy(HParams(), RunMode.TRAIN, RunConfig())


def test_from_a_file_a_folder_and_a_function(model, tensors, tmp_path, weights_of, assert_same_bits):
    untrained = weights_of(model)
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, file)
    for source in (file, str(file), tmp_path, lambda: tensors):
        model.set_state_dict(untrained)
        assert not np.array_equal(weights_of(model)["out.bias"], tensors["out.bias"])
        warm_start(model, WarmStartSetting(source))
        assert_same_bits(weights_of(model), tensors)


def test_from_half_precision(model, tensors, weights_of, assert_same_bits, tmp_path):
    rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in tensors.items()}
    warm_start(model, WarmStartSetting(lambda: {n: array.astype(np.float16) for n, array in tensors.items()}))
    assert_same_bits(weights_of(model), rounded)
    file = tmp_path / "bf16.safetensors"
    safetensors.paddle.save_file(
        {name: paddle.to_tensor(array).astype("bfloat16") for name, array in tensors.items()}, str(file)
    )
    warm_start(model, WarmStartSetting(file))
    for name, array in weights_of(model).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, tensors[name], rtol=2**-8)


def test_from_another_run(toy, run_config, train_data, weights_of, tmp_path, assert_same_bits):
    """A checkpoint folder is a source like any other: weights only, the steps begin at 0."""
    first = propeller.Learner(toy, run_config("first", max_steps=3))
    first.train(train_data)
    setting = WarmStartSetting(tmp_path / "first/checkpoints/step_00000003")
    second = propeller.Learner(toy, run_config("second", max_steps=2, seed=9), {}, setting)
    seen = []

    class Watch(propeller.Hook):
        name = "watch"

        def train_begin(self, run_config, state, last_step):
            seen.append((state.step, weights_of(second.model)))

    second.train(train_data, hooks=[Watch()])
    assert seen[0][0] == 0
    assert_same_bits(seen[0][1], weights_of(first.model))


def test_a_resume_wins_and_does_not_even_ask(toy, run_config, train_data, tensors):
    calls = []

    def source():
        calls.append(1)
        return tensors

    config = run_config(max_steps=4, run_steps=2)
    for expected in (1, 1):
        learner = propeller.Learner(toy, config, {}, WarmStartSetting(source))
        learner.train(train_data)
        assert len(calls) == expected
    straight = propeller.Learner(
        toy, dataclasses.replace(config, model_dir=config.model_dir + "_2", run_steps=None), {},
        WarmStartSetting(source),
    )  # fmt: skip
    straight.train(train_data)
    for name, tensor in straight.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), learner.model.state_dict()[name].numpy())


def test_mapping_predicate_and_new(model, tensors, weights_of, caplog):
    before = weights_of(model)
    source = {
        "bert/embeddings": tensors["table.weight"],
        "norm.weight": tensors["norm.weight"],
        "norm.bias": tensors["norm.bias"],
        "out.weight": np.zeros((16, 5), np.float32),
        "pooler": np.zeros(3, np.float32),
    }
    setting = WarmStartSetting(
        lambda: source,
        predicate=lambda name: name != "norm.bias",
        mapping={"table.weight": "bert/embeddings"},
        new=("out.*",),
    )
    with caplog.at_level("INFO", logger="propeller"):
        warm_start(model, setting)
    after = weights_of(model)
    for name, expected in (
        ("table.weight", tensors["table.weight"]),
        ("norm.weight", tensors["norm.weight"]),
        ("norm.bias", before["norm.bias"]),
        ("out.weight", before["out.weight"]),
        ("out.bias", before["out.bias"]),
    ):
        np.testing.assert_array_equal(after[name], expected, err_msg=name)
    assert caplog.messages == [
        "warm start: 2 tensors loaded: table.weight, norm.weight; new: out.weight, out.bias; "
        "left over: norm.bias, out.weight, pooler"
    ]


def test_of_many_names_the_log_tells_the_first(model, tensors, caplog):
    extra = {f"mlm.{number}": np.zeros(1, np.float32) for number in range(10, 25)}
    with caplog.at_level("DEBUG", logger="propeller"):
        warm_start(model, WarmStartSetting(lambda: {**tensors, **extra}))
    short, whole = caplog.records
    assert short.levelname == "INFO" and short.getMessage().endswith(
        "; left over: mlm.10, mlm.11, mlm.12, mlm.13, mlm.14 and 10 more, all named at log level DEBUG"
    )
    assert whole.levelname == "DEBUG" and all(name in whole.getMessage() for name in [*tensors, *extra])


def test_new_is_loaded_where_it_fits(model, tensors, weights_of, assert_same_bits):
    """`new` allows a difference, it does not ask for one."""
    warm_start(model, WarmStartSetting(lambda: tensors, new=("out.*",)))
    assert_same_bits(weights_of(model), tensors)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"out.bias": None, "norm.bias": None},
            {},
            r"failed: missing: norm\.bias; missing: out\.bias\. Is the source a model of",
        ),
        (
            {"out.weight": np.zeros((16, 3), np.float32)},
            {},
            r"out\.weight: \[16, 3\] where the model has \[16, 2\]",
        ),
        ({"out.bias": np.zeros((2, 1), np.float32)}, {"new": ("head.*",)}, r"out\.bias: \[2, 1\] where"),
        ({}, {"mapping": {"out.bias": "head"}}, "missing: head"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_loaded(
    model, tensors, weights_of, assert_same_bits, changes, options, message
):
    before = weights_of(model)
    source = {name: array for name, array in {**tensors, **changes}.items() if array is not None}
    with pytest.raises(CheckpointError, match=message):
        warm_start(model, WarmStartSetting(lambda: source, **options))
    assert_same_bits(weights_of(model), before)


def test_a_mapping_of_what_is_not_there(model, tensors):
    with pytest.raises(ConfigError, match=r"maps parameters the model does not have: hed\.bias"):
        warm_start(model, WarmStartSetting(lambda: tensors, mapping={"hed.bias": "out.bias"}))


def test_sources_that_cannot_be_read(model, tmp_path):
    (tmp_path / "text").write_text("no tensors here")
    for source in (tmp_path / "absent", tmp_path, tmp_path / "text"):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            warm_start(model, WarmStartSetting(source))
