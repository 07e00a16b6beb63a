from __future__ import annotations

import json

import pytest

from ernie.config import ErnieConfig
from propeller.errors import ConfigError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_defaults_are_those_of_ernie():
    config = ErnieConfig(**SIZES)
    assert config.intermediate_size == 128
    assert config.layer_norm_eps == 1e-5
    assert (config.type_vocab_size, config.pad_token_id, config.use_task_id) == (2, 0, False)


def test_to_dict_and_back_through_json():
    config = ErnieConfig(**SIZES, intermediate_size=48, hidden_act="relu", use_task_id=True, task_id=2)
    assert ErnieConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("more", "eps"),
    [
        ({}, 1e-5),
        ({"sent_type_vocab_size": None, "use_task_id": False}, 1e-5),
        ({"intermediate_size": 128}, 1e-12),
        ({"intermediate_size": 128, "sent_type_vocab_size": 4}, 1e-5),
        ({"model_type": "bert"}, 1e-12),
        ({"model_type": "ernie", "use_task_id": True}, 1e-12),
        ({"model_type": "bert", "layer_norm_eps": 1e-6}, 1e-6),
    ],
)
def test_layer_norm_eps_where_the_file_does_not_say(more, eps):
    assert ErnieConfig.from_dict({**SIZES, **more}).layer_norm_eps == eps


@pytest.mark.parametrize(
    ("more", "types"),
    [
        ({}, 2),
        ({"sent_type_vocab_size": None, "type_vocab_size": 3}, 3),
        ({"sent_type_vocab_size": 4}, 4),
        ({"sent_type_vocab_size": 4, "type_vocab_size": 2}, 4),
    ],
)
def test_sentence_types_go_by_two_names(more, types):
    assert ErnieConfig.from_dict({**SIZES, **more}).type_vocab_size == types


def test_numbers_as_json_writes_them():
    config = ErnieConfig.from_dict({**SIZES, "hidden_size": 32.0, "use_task_id": 1, "hidden_dropout_prob": 0})
    assert (config.hidden_size, config.use_task_id, config.hidden_dropout_prob) == (32, True, 0.0)
    assert isinstance(config.hidden_size, int)


def test_other_keys_are_ignored_only_when_told_to():
    joined = {**SIZES, "learning_rate": 5e-5, "num_label": 2, "vocab_file": "vocab.txt", "batch_size": 32}
    assert ErnieConfig.from_dict(joined, ignore_others=True) == ErnieConfig(**SIZES)
    with pytest.raises(ConfigError, match="learning_rate"):
        ErnieConfig.from_dict(joined)


@pytest.mark.parametrize("ignore_others", [True, False])
@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("hiden_size", "hidden_size"),
        ("num_attention_head", "num_attention_heads"),
        ("hidden_acts", "hidden_act"),
    ],
)
def test_a_slip_is_an_error_that_names_the_key(slip, meant, ignore_others):
    with pytest.raises(ConfigError, match=f"{slip}.*Did you mean '{meant}'"):
        ErnieConfig.from_dict({**SIZES, slip: 1}, ignore_others=ignore_others)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 30}, "heads must divide"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": "100"}, "vocab_size must be a number, got '100'"),
        ({"vocab_size": True}, "vocab_size must be a number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number"),
        ({"initializer_range": 0}, "initializer_range must be above 0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be a probability"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob must be a probability"),
        ({"hidden_act": "geluu"}, "hidden_act 'geluu' is unknown. Did you mean 'gelu'"),
        ({"pad_token_id": 100}, "pad_token_id 100 is outside"),
        ({"use_task_id": "no"}, "use_task_id must be true or false"),
        ({"use_task_id": True, "task_id": 3}, "task_id 3 needs"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"is_decoder": True}, "is_decoder is set"),
    ],
)
def test_what_cannot_work_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        ErnieConfig.from_dict({**SIZES, **changed})


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="lacks vocab_size, num_attention_heads"):
        ErnieConfig.from_dict({**SIZES, "vocab_size": None, "num_attention_heads": None})


def test_a_task_id_without_the_table_is_no_error():
    assert ErnieConfig.from_dict({**SIZES, "use_task_id": False, "task_id": 16}).task_id == 16


FOREIGN = ("pooler_fc_size", "pooler_num_attention_heads", "pooler_type", "bos_token_id", "sep_token_id")


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_that_only_look_like_the_models(key):
    assert ErnieConfig.from_dict({**SIZES, key: 1}, ignore_others=True) == ErnieConfig(**SIZES)
    with pytest.raises(ConfigError, match=f"'{key}' is no key"):
        ErnieConfig.from_dict({**SIZES, key: 1})


def test_files_of_other_programs(tmp_path):
    bert = {**SIZES, "intermediate_size": 64, "directionality": "bidi", "pooler_num_attention_heads": 12}
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(bert))
    assert ErnieConfig.from_file(path) == ErnieConfig(**SIZES, intermediate_size=64, layer_norm_eps=1e-12)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"hidden_size": 32}', '{"hiden_size": 32}'])
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "ernie_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="ernie_config.json"):
        ErnieConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.json"):
        ErnieConfig.from_file(tmp_path / "nowhere.json")


def test_published_files(real_data):
    ernie = ErnieConfig.from_file(real_data / "pretrain_demo/ernie/ernie_config.json")
    assert (ernie.hidden_act, ernie.layer_norm_eps, ernie.intermediate_size) == ("relu", 1e-5, 3072)
    bert = ErnieConfig.from_file(real_data / "pretrain_demo/bert/bert_config.json")
    assert (bert.hidden_act, bert.layer_norm_eps, bert.vocab_size) == ("gelu", 1e-12, 21128)
