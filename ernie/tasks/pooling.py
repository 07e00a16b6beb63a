"""How token vectors become embeddings: what is asked for, over what a pretrained folder says, over defaults.

sentence-transformers keeps its part of a model beside the encoder:

    modules.json                       which modules follow one another, and where each one's files lie
    1_Pooling/config.json              how the token vectors become one
    sentence_bert_config.json          the longest input in tokens, and whether text is lower-cased
    config_sentence_transformers.json  prompts, and how its embeddings are to be compared

No Paddle here.

Source: the files of sentence-transformers 2 to 6 and what it makes of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie.config import ErnieConfig
from propeller.errors import ConfigError, did_you_mean

POOLINGS = ("cls", "mean", "max", "none", "pooler")
"""The first token's vector, the tokens' mean or maximum, all of them, or BERT's tanh layer over the first."""

PROMPTS = ("query", "passage")
"""What a text may be sent as, for models that want another text before each."""

# Special tokens and one of text.
MIN_SEQLEN = 3

_OLD_MODE = re.compile(r"pooling_mode_(cls|mean|max|mean_sqrt_len|weightedmean|lasttoken)(_tokens?)?")
# What sentence-transformers takes for its `encode_document`, the first that there is.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """What is asked of an encoder; None leaves it to the pretrained folder.

    Attributes:
        encode_layer: `pooler`, or `layer1` to the model's last; `layer-1` is the last one, too.
        pooling: one of `POOLINGS`.
        normalize: whether embeddings are brought to length 1.
        dimensions: how many of an embedding's first numbers are kept; then it is normalised.
        max_seqlen: the longest input in tokens, special ones included.
        query_prefix, passage_prefix: what stands before a text that is sent as a query or a passage.
    """

    encode_layer: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    max_seqlen: int | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None

    def given(self) -> dict[str, Any]:
        """What is not left open, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """How texts become embeddings, with nothing left open. A bundle's `bundle.json` holds it.

    Attributes:
        encode_layer: `pooler`, or `layerN` counted from 1.
        pooling: one of `POOLINGS`.
        normalize: whether embeddings have length 1.
        dimensions: numbers of an embedding.
        max_seqlen: the longest input in tokens, special ones included; longer ones are cut.
        query_prefix, passage_prefix: what stands before a text that is sent as a query or a passage.
        default_prefix: what stands before a text that is sent as neither.
        similarity: how the model's makers compare embeddings (`cosine`, `dot`), where they say.
    """

    encode_layer: str
    pooling: str
    normalize: bool
    dimensions: int
    max_seqlen: int
    query_prefix: str = ""
    passage_prefix: str = ""
    default_prefix: str = ""
    similarity: str | None = None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> EmbeddingSettings:
        """Reads what a bundle holds, which may be more than this.

        Raises:
            KeyError: something is missing.
        """
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """What a pretrained folder says about embeddings.

    Attributes:
        encoder: where configuration, weights and tokenizer lie: the folder, or one in it.
        pooling: `cls`, `mean` or `max`; None where it does not say.
        normalize: whether embeddings are brought to length 1.
        max_seqlen: the longest input in tokens; None where it does not say.
        lower_case: whether text is lower-cased before the tokenizer, whatever that does.
        prompts: texts to stand before others, by name.
        default_prompt: the name of the one that stands before a text for which none is named.
        pools_prompt: whether a prompt's tokens are pooled with the text's.
        similarity: how embeddings are to be compared.
        problem: why what the folder asks for cannot be done; None if it can.
    """

    encoder: Path
    pooling: str | None = None
    normalize: bool = False
    max_seqlen: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    pools_prompt: bool = True
    similarity: str | None = None
    problem: str | None = None


def read_folder(folder: str | Path) -> FolderSettings:
    """Reads sentence-transformers' files of a folder; one without any says nothing, which is fine.

    Raises:
        ConfigError: a file is not JSON, or not what it should be.
    """
    folder = Path(folder)
    found: dict[str, Any] = {"encoder": folder}
    modules = _json(folder / "modules.json", list) or []
    try:
        kinds = [(str(module["type"]).rpartition(".")[2], folder / module["path"]) for module in modules]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'modules.json'} is not a list of modules ({error!r}).") from error
    if kinds:
        found |= _read_modules(kinds)
    more = _json(folder / "config_sentence_transformers.json", dict) or {}
    found["prompts"] = {
        str(name): _typed(text, str, f"the prompt {name!r} of {folder}")
        for name, text in (more.get("prompts") or {}).items()
    }
    found["default_prompt"] = more.get("default_prompt_name")
    found["similarity"] = more.get("similarity_fn_name")
    return FolderSettings(**found, **_read_text_settings(found["encoder"]))


def _read_modules(kinds: list[tuple[str, Path]]) -> dict[str, Any]:
    """Transformer, Pooling, and Normalize if it is there; `problem` says what else there is."""
    found: dict[str, Any] = {}
    kinds = [(kind, path) for kind, path in kinds if kind != "Dropout"]  # it does nothing in prediction
    order = [kind for kind, _ in kinds]
    if order[:1] == ["Transformer"]:
        found["encoder"] = kinds[0][1]
    if order not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return found | {
            "problem": f"its modules.json asks for {', '.join(order) or 'Dropout alone'}, but only "
            "Transformer, Pooling and Normalize, in this order, can be done"
        }
    found["normalize"] = order[-1] == "Normalize"
    if found["normalize"]:
        target = (_json(kinds[-1][1] / "config.json", dict) or {}).get("module_input_name")
        if target not in (None, "sentence_embedding"):
            return found | {"problem": f"its Normalize module works on {target!r}, not on the embedding"}
    path = kinds[1][1] / "config.json"
    config = _json(path, dict)
    if config is None:
        raise ConfigError(f"{path} is missing, but modules.json names its folder.")
    found["pools_prompt"] = config.get("include_prompt") is not False
    modes = _pooling_modes(config)
    if len(modes) == 1 and modes[0] in ("cls", "mean", "max"):
        return found | {"pooling": modes[0]}
    return found | {"problem": f"its pooling is {' and '.join(modes)}; one of cls, mean and max can be done"}


def _pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """The modes that are switched on, in either form of the file; `mean` where it names none."""
    mode = config.get("pooling_mode")
    if mode is not None:
        return [str(name) for name in mode] if isinstance(mode, list) else [str(mode)]
    matches = {key: _OLD_MODE.fullmatch(key) for key in config}
    named = {key: match[1] if match else key for key, match in matches.items()}
    switched = [name for key, name in named.items() if key.startswith("pooling_mode_") and config[key]]
    return switched or ["mean"]


def _read_text_settings(encoder: Path) -> dict[str, Any]:
    """Longest input and lower-casing, from sentence-transformers' file, else from the tokenizer's."""
    names = sorted(path.name for path in encoder.glob("sentence_*_config.json"))
    first = min(names, key=lambda name: name != "sentence_bert_config.json", default=None)
    config = _json(encoder / first, dict) or {} if first else {}
    longest = config.get("max_seq_length")
    if longest is None:
        first = "tokenizer_config.json"
        longest = (_json(encoder / first, dict) or {}).get("model_max_length")
    if longest is not None and (not isinstance(longest, int | float) or longest < MIN_SEQLEN):
        raise ConfigError(
            f"{encoder / str(first)} limits inputs to {longest!r} tokens; expected a number of at least "
            f"{MIN_SEQLEN}."
        )
    return {
        "max_seqlen": None if longest is None else int(longest),
        "lower_case": config.get("do_lower_case") is True,
    }


def resolve(options: EncoderOptions, folder: FolderSettings, config: ErnieConfig) -> EmbeddingSettings:
    """Puts together what is asked for, what the folder says and what the model has.

    Without a word from either, the embedding is the pooler's; of a layer that is asked for without a
    pooling it is the mean.

    Raises:
        ConfigError: something is asked for that the model does not have, that contradicts itself or that
            cannot be done.
    """
    encode_layer, pooling = _layer_and_pooling(options, folder, config.num_hidden_layers)
    positions = config.max_position_embeddings
    longest = min(folder.max_seqlen or positions, positions)
    prompts = _prompts(options, folder)
    passage = next((name for name in _PASSAGE_PROMPTS if name in prompts), "")
    return EmbeddingSettings(
        encode_layer=encode_layer,
        pooling=pooling,
        normalize=folder.normalize if options.normalize is None else options.normalize,
        dimensions=_within("dimensions", options.dimensions, config.hidden_size, 1, config.hidden_size),
        max_seqlen=_within("max_seqlen", options.max_seqlen, longest, MIN_SEQLEN, positions),
        query_prefix=prompts.get("query", ""),
        passage_prefix=prompts.get(passage, ""),
        default_prefix=prompts[folder.default_prompt] if folder.default_prompt is not None else "",
        similarity=folder.similarity,
    )


def _layer_and_pooling(options: EncoderOptions, folder: FolderSettings, depth: int) -> tuple[str, str]:
    layer, pooling = options.encode_layer, options.pooling
    if pooling is not None and pooling not in POOLINGS:
        near = did_you_mean(pooling, POOLINGS)
        raise ConfigError(f"pooling {pooling!r} is unknown.{near} There are: {', '.join(POOLINGS)}.")
    if layer == "pooler":
        if pooling not in (None, "pooler"):
            raise ConfigError(
                f"encode_layer 'pooler' is one vector already, so that there is nothing to take the "
                f"{pooling} of. Leave out one of the two, or name a layer, such as layer{depth}."
            )
        return "pooler", "pooler"
    number = depth if layer is None else _layer_number(layer, depth)
    if pooling is None:
        if folder.problem is not None:
            raise ConfigError(
                f"{folder.encoder} makes embeddings in a way that this encoder cannot: {folder.problem}. "
                "With --pooling cls, mean or max you get those of the transformer alone, which are others."
            )
        pooling = folder.pooling or ("pooler" if layer is None else "mean")
    if pooling == "pooler":
        if number != depth:
            raise ConfigError(
                f"pooling 'pooler' stands upon layer{depth}, the last one, not upon {layer}. Take pooling "
                "cls, mean or max for a layer further down."
            )
        return "pooler", "pooler"
    return f"layer{number}", pooling


def _layer_number(layer: str, depth: int) -> int:
    match = re.fullmatch(r"layer(-?\d+)", layer)
    number = int(match[1]) if match else 0
    number = depth + 1 + number if number < 0 else number
    if not 1 <= number <= depth:
        raise ConfigError(
            f"encode_layer {layer!r} is not there. The model has pooler and layer1 to layer{depth} "
            "(layer-1 is the last one, too)."
        )
    return number


def _prompts(options: EncoderOptions, folder: FolderSettings) -> dict[str, str]:
    """The folder's prompts with the given ones in their places."""
    prompts = dict(folder.prompts)
    if options.query_prefix is not None:
        prompts["query"] = options.query_prefix
    if options.passage_prefix is not None:
        name = next((name for name in _PASSAGE_PROMPTS if name in prompts), _PASSAGE_PROMPTS[0])
        prompts[name] = options.passage_prefix
    if folder.default_prompt is not None and folder.default_prompt not in prompts:
        raise ConfigError(
            f"{folder.encoder} has the default prompt {folder.default_prompt!r}, but its prompts are: "
            f"{', '.join(prompts) or 'none'}."
        )
    if not folder.pools_prompt and any(prompts.values()):
        raise ConfigError(
            f"{folder.encoder} leaves its prompts out of the pooling (include_prompt is false), which this "
            "encoder cannot do."
        )
    return prompts


def _within(name: str, given: int | None, default: int, least: int, most: int) -> int:
    if given is None:
        return default
    if type(given) is not int or not least <= given <= most:
        raise ConfigError(
            f"{name} must be a whole number from {least} to {most} for this model, got {given!r}."
        )
    return given


def _json(path: Path, kind: type) -> Any:
    """The content of a JSON file; None if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return _typed(content, kind, str(path))


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{what} is a {type(value).__name__}; expected a {kind.__name__}.")
    return value
