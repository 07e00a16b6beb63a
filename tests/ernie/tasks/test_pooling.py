"""What is asked of an encoder, over what its folder says, over the defaults."""

from __future__ import annotations

import json

import pytest

from ernie.config import ErnieConfig
from ernie.tasks.pooling import EmbeddingSettings, EncoderOptions, read_folder, resolve
from propeller.errors import ConfigError

CONFIG = ErnieConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=20
)


def settings_of(folder, **options):
    return resolve(EncoderOptions(**options), read_folder(folder), CONFIG)


def test_a_folder_that_says_nothing(bert_folder):
    assert settings_of(bert_folder) == EmbeddingSettings(
        encode_layer="pooler", pooling="pooler", normalize=False, dimensions=16, max_seqlen=20
    )


def test_what_the_folder_says(sentence_folder):
    folder = sentence_folder(
        config_sentence_transformers={
            "prompts": {"query": "q: ", "document": "d: "},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        }
    )
    assert settings_of(folder) == EmbeddingSettings(
        encode_layer="layer4",
        pooling="mean",
        normalize=True,
        dimensions=16,
        max_seqlen=12,
        query_prefix="q: ",
        passage_prefix="d: ",
        default_prefix="q: ",
        similarity="dot",
    )


def test_what_is_given_wins(sentence_folder):
    folder = sentence_folder(config_sentence_transformers={"prompts": {"query": "q: ", "passage": "p: "}})
    given = {
        "encode_layer": "layer2",
        "pooling": "cls",
        "normalize": False,
        "dimensions": 5,
        "max_seqlen": 7,
        "query_prefix": "",
        "passage_prefix": "P",
    }
    assert EncoderOptions(**given).given() == given
    assert EmbeddingSettings(**given) == settings_of(folder, **given)


def test_a_given_prompt_is_also_the_default_one(sentence_folder):
    folder = sentence_folder(
        config_sentence_transformers={"prompts": {"corpus": "c"}, "default_prompt_name": "corpus"}
    )
    assert settings_of(folder, passage_prefix="new").default_prefix == "new"


@pytest.mark.parametrize(
    ("given", "layer", "pooling"),
    [
        ({"encode_layer": "pooler"}, "pooler", "pooler"),
        ({"pooling": "pooler"}, "pooler", "pooler"),
        ({"encode_layer": "layer4", "pooling": "pooler"}, "pooler", "pooler"),
        ({"encode_layer": "layer3"}, "layer3", "mean"),
        ({"encode_layer": "layer-1"}, "layer4", "mean"),
        ({"encode_layer": "layer-4", "pooling": "max"}, "layer1", "max"),
        ({"pooling": "none"}, "layer4", "none"),
    ],
)
def test_layer_and_pooling(bert_folder, sentence_folder, given, layer, pooling):
    for folder in (bert_folder, sentence_folder()):
        found = settings_of(folder, **given)
        assert (found.encode_layer, found.pooling) == (layer, pooling)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encode_layer": "layer5"}, "'layer5' is not there. The model has pooler and layer1 to layer4"),
        ({"encode_layer": "layer0"}, "'layer0' is not there"),
        ({"encode_layer": "layer-5"}, "'layer-5' is not there"),
        ({"encode_layer": "last"}, "'last' is not there"),
        ({"pooling": "maen"}, "'maen' is unknown. Did you mean 'mean'"),
        ({"encode_layer": "pooler", "pooling": "mean"}, "nothing to take the mean of"),
        (
            {"encode_layer": "layer2", "pooling": "pooler"},
            "stands upon layer4, the last one, not upon layer2",
        ),
        ({"dimensions": 17}, "dimensions must be a whole number from 1 to 16 for this model, got 17"),
        ({"dimensions": 0}, "dimensions must be"),
        ({"max_seqlen": 21}, "max_seqlen must be a whole number from 3 to 20 for this model, got 21"),
        ({"max_seqlen": 2}, "max_seqlen must be"),
        ({"max_seqlen": True}, "max_seqlen must be"),
    ],
)
def test_what_the_model_does_not_have(bert_folder, given, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        settings_of(bert_folder, **given)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 16}, "mean"),
    ],
)
def test_forms_of_a_pooling_config(sentence_folder, config, pooling):
    assert settings_of(sentence_folder(pooling=config)).pooling == pooling


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "pooling is cls and max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pooling is mean_sqrt_len"),
        ({"pooling_mode": "weightedmean"}, "pooling is weightedmean"),
        ({"pooling_mode_lasttoken": True}, "pooling is lasttoken"),
        ({"pooling_mode_brand_new": True}, "pooling is pooling_mode_brand_new"),
    ],
)
def test_poolings_that_cannot_be_done(sentence_folder, config, message):
    folder = sentence_folder(pooling=config)
    with pytest.raises(ConfigError, match=f"{message}; one of cls, mean and max can be done"):
        settings_of(folder)
    assert settings_of(folder, pooling="cls").pooling == "cls"


@pytest.mark.parametrize(
    "modules", [("Transformer", "Pooling", "Dense"), ("Transformer", "LSTM"), ("CLIPModel",)]
)
def test_modules_that_cannot_be_done(sentence_folder, modules):
    folder = sentence_folder(modules)
    with pytest.raises(ConfigError, match=f"asks for {', '.join(modules)}, but only Transformer, Pooling"):
        settings_of(folder)
    # Asked for all the same: without what followed the pooling.
    found = settings_of(folder, pooling="mean")
    assert (found.pooling, found.normalize) == ("mean", False)


def test_modules_that_do_nothing(sentence_folder):
    with pytest.raises(ConfigError, match="asks for Dropout alone, but only Transformer, Pooling"):
        settings_of(sentence_folder(("Dropout",)))


def test_modules_of_newer_names_and_dropout(sentence_folder):
    folder = sentence_folder(("Transformer", "Pooling", "Dropout"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    found = settings_of(folder)
    assert (found.pooling, found.normalize) == ("mean", False)


def test_normalisation_of_something_else(sentence_folder):
    folder = sentence_folder()
    (folder / "2_Normalize").mkdir()
    (folder / "2_Normalize" / "config.json").write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(ConfigError, match="works on 'token_embeddings', not on the embedding"):
        settings_of(folder)


def test_the_encoder_may_lie_in_a_folder_of_its_own(sentence_folder):
    folder = sentence_folder()
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer").mkdir()
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    found = read_folder(folder)
    assert (found.encoder, found.max_seqlen) == (folder / "0_Transformer", 9)


def test_the_longest_input(bert_folder, sentence_folder):
    assert settings_of(sentence_folder(sentence_bert_config={"max_seq_length": 512})).max_seqlen == 20
    folder = sentence_folder(sentence_bert_config={"do_lower_case": True})
    assert settings_of(folder).max_seqlen == 20
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert settings_of(folder).max_seqlen == 20
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 15}')
    assert settings_of(folder).max_seqlen == 15
    assert read_folder(folder).lower_case and not read_folder(bert_folder).lower_case


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("modules.json", "[", "modules.json cannot be read as JSON"),
        ("modules.json", "{}", "modules.json is a dict; expected a list"),
        ("modules.json", '[{"path": ""}]', "modules.json is not a list of modules"),
        ("1_Pooling/config.json", None, "config.json is missing, but modules.json names its folder"),
        ("sentence_bert_config.json", '{"max_seq_length": "all"}', "limits inputs to 'all' tokens"),
        ("sentence_bert_config.json", '{"max_seq_length": 1}', "limits inputs to 1 tokens"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 1}}', "prompt 'query' of .* is a int"),
        (
            "config_sentence_transformers.json",
            '{"default_prompt_name": "q", "prompts": {"query": ""}}',
            "default prompt 'q', but its prompts are: query",
        ),
    ],
)
def test_broken_files(sentence_folder, file, text, message):
    path = sentence_folder() / file
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        settings_of(path.parent if path.parent.name == "sentence" else path.parent.parent)


def test_prompts_outside_the_pooling(sentence_folder):
    folder = sentence_folder(pooling={"pooling_mode": "mean", "include_prompt": False})
    assert settings_of(folder).pooling == "mean"
    with pytest.raises(ConfigError, match="include_prompt is false"):
        settings_of(folder, query_prefix="q: ")
