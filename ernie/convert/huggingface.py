"""The names of Transformers' `BertModel` and `ErnieModel`, and their weights in this project's layout.

| here                         | Transformers, after `bert.`, `ernie.` or nothing                        |
|------------------------------|-------------------------------------------------------------------------|
| `embeddings.word`            | `embeddings.word_embeddings`                                            |
| `embeddings.position`        | `embeddings.position_embeddings`                                        |
| `embeddings.token_type`      | `embeddings.token_type_embeddings`                                      |
| `embeddings.task_type`       | `embeddings.task_type_embeddings`                                       |
| `embeddings.norm`            | `embeddings.LayerNorm`                                                  |
| `layers.N.attention.qkv`     | `encoder.layer.N.attention.self.query`, `.key` and `.value` side by side |
| `layers.N.attention.output`  | `encoder.layer.N.attention.output.dense`                                |
| `layers.N.attention.norm`    | `encoder.layer.N.attention.output.LayerNorm`                            |
| `layers.N.ffn.up`            | `encoder.layer.N.intermediate.dense`                                    |
| `layers.N.ffn.down`          | `encoder.layer.N.output.dense`                                          |
| `layers.N.ffn.norm`          | `encoder.layer.N.output.LayerNorm`                                      |
| `pooler`                     | `pooler.dense`                                                          |

Linear weights are `[inputs, outputs]` here and `[outputs, inputs]` there. Old files call a norm's
`weight` and `bias` `gamma` and `beta`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ernie.config import ErnieConfig
from propeller.errors import CheckpointError

_TABLES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.task_type": "embeddings.task_type_embeddings",
}
_LAYER_LINEARS = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "ffn.up": ("intermediate.dense",),
    "ffn.down": ("output.dense",),
}
_LAYER_NORMS = {"attention.norm": "attention.output.LayerNorm", "ffn.norm": "output.LayerNorm"}
_PREFIXES = ("", "bert.", "ernie.")
_ANCHOR = "embeddings.word_embeddings.weight"
# Counters that Transformers stored beside the weights; they hold nothing learnt.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def is_huggingface(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these tensors go by Transformers' BERT or ERNIE names."""
    return any(prefix + _ANCHOR in tensors for prefix in _PREFIXES)


def from_huggingface(tensors: Mapping[str, np.ndarray], config: ErnieConfig) -> dict[str, np.ndarray]:
    """Renames and turns a Transformers encoder into this project's layout.

    Args:
        tensors: the file's, for which `is_huggingface` holds.
        config: the encoder's; it says how many layers to look for.

    Returns:
        The encoder's parameters by their names here, as far as the file has them, and whatever else
        the file holds (heads, for instance) under its name and in its layout there.

    Raises:
        CheckpointError: one layer's query, key and value are not all there, or differ in shape.
    """
    prefix = next(prefix for prefix in _PREFIXES if prefix + _ANCHOR in tensors)
    rest = {_modern(name): tensor for name, tensor in tensors.items()}
    for buffer in _BUFFERS:
        rest.pop(prefix + buffer, None)
    state = {}
    for name, sources in _sources(config).items():
        found = [prefix + source for source in sources if prefix + source in rest]
        if not found:
            continue
        parts = [rest.pop(source) for source in found]
        if len(found) < len(sources) or len({part.shape for part in parts}) > 1:
            shapes = ", ".join(f"{s} {list(p.shape)}" for s, p in zip(found, parts, strict=True))
            raise CheckpointError(
                f"The tensors {', '.join(prefix + source for source in sources)} belong together in one "
                f"shape, but the file has {shapes}."
            )
        if name.endswith(".weight") and not name.startswith("embeddings."):
            parts = [part.T for part in parts]  # a norm's weight is a vector and stays as it is
        state[name] = np.ascontiguousarray(np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0])
    return state | rest


def _modern(name: str) -> str:
    if name.endswith("LayerNorm.gamma"):
        return name[: -len("gamma")] + "weight"
    if name.endswith("LayerNorm.beta"):
        return name[: -len("beta")] + "bias"
    return name


def _sources(config: ErnieConfig) -> dict[str, tuple[str, ...]]:
    """Each parameter here -> the tensors there that it is made of, in order along its last axis."""
    modules: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
    for layer in range(config.num_hidden_layers):
        for name, theirs in _LAYER_LINEARS.items():
            modules[f"layers.{layer}.{name}"] = tuple(f"encoder.layer.{layer}.{part}" for part in theirs)
        for name, norm in _LAYER_NORMS.items():
            modules[f"layers.{layer}.{name}"] = (f"encoder.layer.{layer}.{norm}",)
    modules["pooler"] = ("pooler.dense",)
    sources: dict[str, tuple[str, ...]]
    sources = {f"{name}.weight": (f"{table}.weight",) for name, table in _TABLES.items()}
    for name, theirs in modules.items():
        for part in ("weight", "bias"):
            sources[f"{name}.{part}"] = tuple(f"{module}.{part}" for module in theirs)
    return sources
