"""Hyper-parameters of the training: types, ranges, rates by layer."""

from __future__ import annotations

import math

import pytest

from ernie.tasks.training import Training, layer_rates
from propeller.errors import ConfigError
from propeller.types import HParams


def test_defaults_and_what_is_given():
    assert Training.of(HParams()) == Training()
    given = Training.of(HParams(learning_rate=1, lr_schedule="cosine", max_grad_norm=None, mine=3))
    assert given == Training(learning_rate=1, lr_schedule="cosine", max_grad_norm=None)


def test_by_default_nothing_is_on():
    training = Training()
    assert (training.layer_decay, training.r_drop, training.fgm_epsilon) == (1.0, 0.0, 0.0)
    assert training.freeze == () and training.recompute is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("encoder.*", ("encoder.*",)),
        (["encoder.*", "*bias"], ("encoder.*", "*bias")),
        ((), ()),
        ([], ()),
    ],
)
def test_one_pattern_or_several(given, expected):
    assert Training.of(HParams(freeze=given)).freeze == expected


@pytest.mark.parametrize(("given", "expected"), [(0, False), (1, True), (True, True), (False, False)])
def test_switch(given, expected):
    assert Training.of(HParams(recompute=given)).recompute is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "5e-5"}, "learning_rate must be a number, got '5e-5'"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"weight_decay": True}, "weight_decay must be a number, got True"),
        ({"warmup_proportion": [0.1]}, r"warmup_proportion must be a number, got \[0.1\]"),
        ({"max_grad_norm": "x"}, "max_grad_norm must be a number, got 'x'"),
        ({"lr_schedule": 1}, "lr_schedule must be text, got 1"),
        ({"layer_decay": None}, "layer_decay must be a number, got None"),
        ({"layer_decay": "0.9"}, "layer_decay must be a number, got '0.9'"),
        ({"freeze": 3}, "freeze must be text or a list of texts, got 3"),
        ({"freeze": None}, "freeze must be text or a list of texts, got None"),
        ({"freeze": ["a", 1]}, r"freeze must be text or a list of texts, got \['a', 1\]"),
        ({"r_drop": True}, "r_drop must be a number, got True"),
        ({"recompute": "true"}, "recompute must be true or false, got 'true'"),
        ({"recompute": 2}, "recompute must be true or false, got 2"),
        ({"fgm_epsilon": "1"}, "fgm_epsilon must be a number, got '1'"),
        ({"fgm_pattern": ["*"]}, r"fgm_pattern must be text, got \['\*'\]"),
    ],
)
def test_wrong_types(given, message):
    with pytest.raises(ConfigError, match=message):
        Training.of(HParams(given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_decay": 0}, "layer_decay must be above 0 and at most 1, got 0. .*freeze them"),
        ({"layer_decay": 1.1}, "layer_decay must be above 0 and at most 1, got 1.1"),
        ({"layer_decay": math.nan}, "layer_decay must be above 0 and at most 1, got nan"),
        ({"r_drop": -1}, r"r_drop must be 0 \(off\) or above, got -1"),
        ({"fgm_epsilon": math.inf}, r"fgm_epsilon must be 0 \(off\) or above, got inf"),
    ],
)
def test_out_of_range(given, message):
    with pytest.raises(ConfigError, match=message):
        Training.of(HParams(given))


def test_rates_by_layer():
    rate = layer_rates(0.5, 12)
    expected = {
        "encoder.embeddings.word.weight": 0.5**13,
        "encoder.embeddings.norm.bias": 0.5**13,
        "encoder.layers.0.attention.qkv.weight": 0.5**12,
        "encoder.layers.1.ffn.norm.weight": 0.5**11,
        "encoder.layers.10.ffn.up.bias": 0.5**2,
        "encoder.layers.11.ffn.up.bias": 0.5,
        "encoder.pooler.weight": 1.0,
        "head.classifier.bias": 1.0,
    }
    assert {name: rate(name) for name in expected} == expected
    same = layer_rates(1.0, 12)
    assert {same(name) for name in expected} == {1.0}


def test_rates_of_an_encoder_by_itself():
    rate = layer_rates(0.5, 2)
    assert [rate(name) for name in ("embeddings.word.weight", "layers.0.ffn.up.bias")] == [0.125, 0.25]
