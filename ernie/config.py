"""The shape of an ERNIE or BERT encoder. No Paddle here: tokenising clients read it too."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propeller.errors import NEAR_MISS, ConfigError, did_you_mean

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
"""`gelu` is the exact one (erf); `gelu_new` and `gelu_pytorch_tanh` are its tanh approximation."""

ERNIE_LAYER_NORM_EPS = 1e-5
BERT_LAYER_NORM_EPS = 1e-12

# What marks a mapping without `layer_norm_eps` as ERNIE's rather than BERT's.
_ERNIE_KEYS = frozenset({"sent_type_vocab_size", "task_type_vocab_size", "use_task_id", "task_id"})


@dataclasses.dataclass(frozen=True)
class ErnieConfig:
    """Sizes and settings of an `ErnieModel`.

    Checks itself: every value that cannot work is a `ConfigError` when the object is made.

    Args:
        vocab_size: rows of the word table.
        hidden_size: width H of the model.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads N; divides `hidden_size`.
        max_position_embeddings: rows of the position table, the longest input in tokens.
        intermediate_size: width of the feed-forward layer; None makes it 4 x `hidden_size`.
        type_vocab_size: sentence types. ERNIE's files call it `sent_type_vocab_size`.
        hidden_act: one of `ACTIVATIONS`.
        hidden_dropout_prob: dropout after the embeddings and after each sub-layer, in [0, 1).
        attention_probs_dropout_prob: dropout on the attention weights, in [0, 1).
        initializer_range: standard deviation of the truncated normal for new weights.
        layer_norm_eps: epsilon of every layer norm.
        pad_token_id: the id that the attention ignores when no mask is given.
        use_task_id: whether ERNIE 2.0's task-type embedding is added.
        task_type_vocab_size: task types; counts only with `use_task_id`.
        task_id: the task type of a batch that names none; counts only with `use_task_id`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    intermediate_size: int = None  # type: ignore[assignment]  # __post_init__ makes it 4 x hidden_size
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = ERNIE_LAYER_NORM_EPS
    pad_token_id: int = 0
    use_task_id: bool = False
    task_type_vocab_size: int = 3
    task_id: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "intermediate_size" and value is None:
                value = 4 * self.hidden_size
            object.__setattr__(self, field.name, _checked(field.name, value))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} cannot be split over num_attention_heads "
                f"{self.num_attention_heads}: the heads must divide it."
            )
        if self.pad_token_id >= self.vocab_size:
            raise ConfigError(
                f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size} words."
            )
        if self.use_task_id and self.task_id >= self.task_type_vocab_size:
            raise ConfigError(
                f"task_id {self.task_id} needs a task_type_vocab_size above it, "
                f"not {self.task_type_vocab_size}."
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, ignore_others: bool = False) -> ErnieConfig:
        """Reads the keys of ERNIE's, BERT's and Transformers' configuration files.

        A key that is None counts as absent, so `sent_type_vocab_size: None` leaves the word to
        `type_vocab_size`; a value there wins over it. Where `layer_norm_eps` is absent it is 1e-12
        (BERT, and Transformers' default) if `model_type` says that Transformers wrote the mapping, or
        if it has an `intermediate_size` and none of ERNIE's own keys (`sent_type_vocab_size`,
        `task_type_vocab_size`, `use_task_id`, `task_id`), as the files of BERT do; else 1e-5 (ERNIE).

        Args:
            mapping: from a file, or several `--hparam` joined.
            ignore_others: leave alone the keys that are none of the model's, such as a learning rate.
                Misspelt keys of the model are errors all the same.

        Raises:
            ConfigError: an unknown or misspelt key, a missing one, a value that cannot work, or an
                architecture that this encoder is not.
        """
        _check_keys(mapping, ignore_others)
        _check_architecture(mapping)
        given = {key: value for key, value in mapping.items() if value is not None}
        values = {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}
        if "sent_type_vocab_size" in given:
            values["type_vocab_size"] = given["sent_type_vocab_size"]
        if "layer_norm_eps" not in values:
            values["layer_norm_eps"] = _default_layer_norm_eps(mapping)
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(
                f"The model configuration lacks {', '.join(missing)}; it has: "
                f"{', '.join(sorted(given)) or 'no key'}."
            )
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> ErnieConfig:
        """Reads `ernie_config.json`, `bert_config.json` or a Transformers `config.json`.

        Keys that are none of the model's are left alone, since other programs write theirs there.

        Raises:
            ConfigError: the file cannot be read, is no JSON object, or does not describe an encoder
                that this project has.
        """
        path = Path(path)
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a JSON model configuration: {error}") from error
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path} holds a {type(mapping).__name__}, not an object of settings.")
        try:
            return cls.from_dict(mapping, ignore_others=True)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, ready for JSON; `from_dict` gives the same configuration back."""
        return dataclasses.asdict(self)


CONFIG_KEYS = frozenset({field.name for field in dataclasses.fields(ErnieConfig)}) | {
    "sent_type_vocab_size",
    "model_type",
    "position_embedding_type",
    "is_decoder",
    "add_cross_attention",
}
"""Every key that `ErnieConfig.from_dict` reads."""


def _check_keys(mapping: Mapping[str, Any], ignore_others: bool) -> None:
    for key in mapping:
        if key in CONFIG_KEYS:
            continue
        near = did_you_mean(str(key), CONFIG_KEYS, NEAR_MISS)
        if near:
            raise ConfigError(f"{key!r} is no key of the model configuration.{near}")
        if not ignore_others:
            raise ConfigError(
                f"{key!r} is no key of the model configuration.{did_you_mean(str(key), CONFIG_KEYS)} "
                f"Known are: {', '.join(sorted(CONFIG_KEYS))}."
            )


def _check_architecture(mapping: Mapping[str, Any]) -> None:
    """Refuses what would load and then compute something else."""
    model_type = mapping.get("model_type")
    if model_type not in (None, "bert", "ernie"):
        raise ConfigError(f"model_type is {model_type!r}; this encoder reads 'bert' and 'ernie'.")
    positions = mapping.get("position_embedding_type")
    if positions not in (None, "absolute"):
        raise ConfigError(f"position_embedding_type is {positions!r}; this encoder has 'absolute' positions.")
    for key in ("is_decoder", "add_cross_attention"):
        if mapping.get(key):
            raise ConfigError(f"{key} is set, but this is an encoder that looks both ways.")


def _default_layer_norm_eps(mapping: Mapping[str, Any]) -> float:
    if mapping.get("model_type") is not None:
        return BERT_LAYER_NORM_EPS
    if mapping.get("intermediate_size") is not None and not _ERNIE_KEYS & mapping.keys():
        return BERT_LAYER_NORM_EPS
    return ERNIE_LAYER_NORM_EPS


_COUNTS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "intermediate_size",
        "type_vocab_size",
        "task_type_vocab_size",
    }
)
_PROBABILITIES = frozenset({"hidden_dropout_prob", "attention_probs_dropout_prob"})
_IDS = frozenset({"pad_token_id", "task_id"})


def _checked(name: str, value: Any) -> Any:
    """Returns `value` as the type of its field: JSON's 1.0 passes for a count, 1 for a switch."""
    if name == "hidden_act":
        if value not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {value!r} is unknown.{did_you_mean(str(value), ACTIVATIONS)} "
                f"Known are: {', '.join(ACTIVATIONS)}."
            )
        return value
    if name == "use_task_id":
        if value not in (0, 1):
            raise ConfigError(f"use_task_id must be true or false, got {value!r}.")
        return bool(value)
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise ConfigError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if name in _COUNTS | _IDS:
        least = 0 if name in _IDS else 1
        if value != int(value) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        return int(value)
    if name in _PROBABILITIES and not 0 <= value < 1:
        raise ConfigError(f"{name} must be a probability in [0, 1), got {value!r}.")
    if name not in _PROBABILITIES and value <= 0:
        raise ConfigError(f"{name} must be above 0, got {value!r}.")
    return float(value)
