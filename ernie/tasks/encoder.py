"""The network behind embeddings: an ERNIE or BERT encoder up to a layer, and its pooling.

Shapes: B batch, S sequence length, H hidden size, D dimensions of an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ernie.config import ErnieConfig
from ernie.modeling import ErnieModel
from ernie.pretrained import load_pretrained_state, match_weights
from ernie.tasks.models import encoder_inputs
from ernie.tasks.pooling import EmbeddingSettings
from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Model, Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional

# Stands in for padding under a maximum. No activation comes near it, and bfloat16 and float16 can hold it.
_LOWEST = -1e4


class EncoderModel(Model):
    """An encoder whose outputs are embeddings. It predicts and is exported; it has no loss.

    A token counts if it is not behind the last one that is no padding. So an embedding depends neither on
    how far its row is filled up nor on the rows beside it, and a text may hold the padding token itself.

    Args:
        config: the whole encoder; only the layers that `settings` need are made.
        settings: how embeddings are made.
    """

    def __init__(self, config: ErnieConfig, settings: EmbeddingSettings):
        super().__init__(HParams(), RunMode.PREDICT, RunConfig())
        depth = config.num_hidden_layers
        if settings.encode_layer != "pooler":
            depth = int(settings.encode_layer.removeprefix("layer"))
        config = dataclasses.replace(config, num_hidden_layers=depth)
        self.inputs = encoder_inputs(config)
        self.axis_limits = {"seq_len": settings.max_seqlen}
        self.encoder = ErnieModel(config)
        self.settings = settings
        self.eval()

    def forward(self, features: Tensors) -> Tensors:
        """Encodes a batch.

        Returns:
            `embeddings`, float32 `[B, D]`. With pooling `none` float32 `[B, S, D]`, zero from the end of a
            row on, and `lengths`, int64 `[B]`: where that is.
        """
        input_ids = features["input_ids"]
        pad_id, settings = self.encoder.config.pad_token_id, self.settings
        positions = paddle.arange(input_ids.shape[1], dtype="int64").unsqueeze(0)
        real = (input_ids != pad_id).astype("int64")
        lengths = (real * (positions + 1)).amax(axis=1, keepdim=True).clip(min=1)  # [B, 1]
        mask = (positions < lengths).astype("float32")  # [B, S]
        output = self.encoder(input_ids, features["token_type_ids"], attention_mask=mask)
        if settings.pooling == "pooler":
            vectors = output.pooled
        else:
            vectors = _pooled(output.sequence, mask, lengths.astype("float32"), settings.pooling)
        if settings.dimensions < self.encoder.config.hidden_size:
            vectors = vectors[..., : settings.dimensions]
        if settings.normalize:
            vectors = F.normalize(vectors, axis=-1, epsilon=1e-12)
        if settings.pooling == "none":
            return {"embeddings": vectors, "lengths": lengths.squeeze(1)}
        return {"embeddings": vectors}

    def loss(self, predictions: Any, labels: Any) -> NoReturn:
        """Raises `ConfigError`: there is nothing to learn from."""
        raise ConfigError("An EncoderModel has no loss; train the encoder in a task's model.")

    def optimizer(self) -> NoReturn:
        """Raises `ConfigError`: there is nothing to learn from."""
        raise ConfigError("An EncoderModel has no optimizer; train the encoder in a task's model.")


def _pooled(
    sequence: paddle.Tensor, mask: paddle.Tensor, lengths: paddle.Tensor, pooling: str
) -> paddle.Tensor:
    """`[B, S, H]` with a mask `[B, S]` of `lengths` `[B, 1]` ones -> `[B, H]`, or `[B, S, H]` for `none`."""
    if pooling == "cls":
        return sequence[:, 0]
    if pooling == "mean":
        # As a matrix product: Paddle's kernel for products that broadcast is slow.
        return paddle.matmul(mask.unsqueeze(1), sequence).squeeze(1) / lengths
    mask = mask.unsqueeze(2)
    if pooling == "max":
        return (sequence * mask + (1 - mask) * _LOWEST).amax(axis=1)
    return sequence * mask


def load_encoder(folder: str | Path, settings: EmbeddingSettings) -> EncoderModel:
    """Makes the encoder of a pretrained folder, with its weights.

    Args:
        folder: where configuration and weights lie; see `load_pretrained_state`.
        settings: how embeddings are made. Only the pooler's need the pooler's weights, which many folders
            do not have.

    Raises:
        CheckpointError: weights that are needed are missing or do not fit, or cannot be read.
        ConfigError: the configuration cannot be used, or the pooler is needed and not there.
    """
    config, state = load_pretrained_state(folder)
    model = EncoderModel(config, settings)
    if settings.pooling == "pooler" and "pooler.weight" not in state:
        raise ConfigError(
            f"{folder} has no weights of a pooler, which is what is taken where neither the folder nor a "
            "flag says how to pool. Name another: --pooling mean, cls or max."
        )
    _set_weights(model.encoder, state, new=() if settings.pooling == "pooler" else ("pooler.*",))
    return model


def _set_weights(encoder: ErnieModel, state: Mapping[str, Any], new: tuple[str, ...]) -> None:
    parameters = encoder.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in match_weights(shapes, state, new=new):
        parameters[name].set_value(state[name])
