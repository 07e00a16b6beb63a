"""RunConfig, HParams, RunState: plain values that check themselves."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from propeller.errors import ConfigError
from propeller.types import HParams, RunConfig, RunMode, RunState


def test_run_config_is_frozen_and_changes_by_replace():
    config = RunConfig(max_steps=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_steps = 11
    assert dataclasses.replace(config, max_steps=11).max_steps == 11
    with pytest.raises(ConfigError, match="max_steps must be at least 1"):
        dataclasses.replace(config, max_steps=0)


def test_run_config_takes_what_json_and_people_write():
    config = RunConfig(model_dir=Path("a") / "b", max_steps=1e4)
    assert config.model_dir == str(Path("a") / "b")
    assert config.max_steps == 10_000
    assert type(config.max_steps) is int
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_steps must be int"):
            RunConfig(max_steps=bad)


def test_run_config_round_trips():
    config = RunConfig(model_dir="x", max_steps=3, seed=2**32 - 1, device="cpu")
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"micro_batches": -2}, "micro_batches must be at least 1, got -2"),
        ({"micro_batches": 1.5}, r"micro_batches must be int, got 1\.5 \(float\)"),
        ({"micro_batches": True}, r"micro_batches must be int, got True \(bool\)"),
        ({"micro_batches": None}, r"micro_batches must be int, got None"),
        ({"precision": "half"}, "precision must be one of fp32, fp16, bf16, got 'half'"),
        ({"precision": 16}, r"precision must be str, got 16 \(int\)"),
        ({"ema_decay": 0}, r"ema_decay must lie between 0 and 1, got 0\.0"),
        ({"ema_decay": 1}, r"ema_decay must lie between 0 and 1, got 1\.0"),
        ({"ema_decay": float("nan")}, "ema_decay must lie between 0 and 1, got nan"),
        ({"ema_decay": "0.9"}, r"ema_decay must be float or null, got '0\.9' \(str\)"),
        ({"ema_decay": True}, r"ema_decay must be float or null, got True \(bool\)"),
        ({"check_numerics": "yes"}, r"check_numerics must be bool, got 'yes' \(str\)"),
        ({"check_numerics": 2}, r"check_numerics must be bool, got 2 \(int\)"),
        ({"profile": None}, "profile must be bool, got None"),
        ({"micro_batch": 2}, "Unknown run_config key 'micro_batch'. Did you mean 'micro_batches'"),
        ({"ema": 0.9}, "Unknown run_config key 'ema'.*Known keys: .*ema_decay"),
    ],
    ids=str,
)
def test_methods_that_cannot_be_meant(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_methods_of_training():
    plain = RunConfig()
    assert (plain.micro_batches, plain.precision, plain.ema_decay) == (1, "fp32", None)
    assert (plain.check_numerics, plain.profile) == (False, False)
    config = RunConfig.from_dict(
        {"micro_batches": 4.0, "ema_decay": 0.999, "profile": 1, "check_numerics": 0}
    )
    assert (config.micro_batches, config.ema_decay) == (4, 0.999)
    assert (config.profile, config.check_numerics) == (True, False)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_hparams_are_a_read_only_mapping():
    values = {"batch_size": 32, "nested": {"a": 1}}
    hparams = HParams(values, seed=3)
    values["batch_size"] = 1
    assert hparams.batch_size == hparams["batch_size"] == 32
    assert hparams.get("absent", 5) == 5
    assert "seed" in hparams and "absent" not in hparams
    assert (len(hparams), list(hparams)) == (3, ["batch_size", "nested", "seed"])
    assert {**hparams} == {"batch_size": 32, "nested": {"a": 1}, "seed": 3}
    with pytest.raises(AttributeError, match="read-only; use join"):
        hparams.batch_size = 1
    with pytest.raises(AttributeError):
        del hparams.batch_size
    with pytest.raises(TypeError):
        hparams["batch_size"] = 1
    assert hparams.batch_size == 32


def test_hparams_name_the_near_key():
    hparams = HParams(learning_rate=0.1)
    with pytest.raises(
        AttributeError, match="no hyper-parameter 'learning_rat'. Did you mean 'learning_rate'"
    ):
        _ = hparams.learning_rat
    with pytest.raises(KeyError, match="Did you mean 'learning_rate'"):
        hparams["learning_rat"]
    assert getattr(hparams, "absent", 7) == 7
    assert not hasattr(hparams, "__wrapped__")


def test_join_gives_new_ones_and_the_later_wins():
    first = HParams(a=1, b=1)
    joined = first.join({"b": 2}, HParams(b=3, c=3))
    assert dict(joined) == {"a": 1, "b": 3, "c": 3}
    assert dict(first) == {"a": 1, "b": 1}
    assert isinstance(joined, HParams)


def test_hparams_pickle_copy_and_compare():
    hparams = HParams(a=[1])
    for twin in (pickle.loads(pickle.dumps(hparams)), copy.copy(hparams), copy.deepcopy(hparams)):
        assert isinstance(twin, HParams)
        assert twin == hparams == {"a": [1]}
        assert twin.a == [1]
    assert copy.deepcopy(hparams)["a"] is not hparams["a"]
    assert repr(hparams) == "HParams({'a': [1]})"


def test_check_names_typing_slips_and_lists_what_is_not_used():
    known = ["learning_rate", "weight_decay", "num_label"]
    assert HParams(learning_rate=1, mine=2, also_mine=3).check(known) == ["also_mine", "mine"]
    with pytest.raises(ConfigError, match="'learning_rat'. Did you mean 'learning_rate'"):
        HParams(learning_rat=1).check(known)
    # Also where the right key was given as well: one of the two would be swallowed.
    with pytest.raises(ConfigError, match="'num_labels'. Did you mean 'num_label'"):
        HParams(num_label=2, num_labels=3).check(known)
    # Keys of other programs are only so near.
    assert HParams(bos_token_id=1).check(["pad_token_id"]) == ["bos_token_id"]


def test_run_state_and_mode():
    assert dataclasses.asdict(RunState()) == {
        **{"step": 0, "epoch": 0, "examples": 0, "tokens": 0, "evaluation_due": False}
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunState().step = 3
    assert [mode.value for mode in RunMode] == ["train", "eval", "predict"]
