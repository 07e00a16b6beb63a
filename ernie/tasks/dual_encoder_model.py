"""The network of a dual encoder: one ERNIE or BERT encoder for queries and passages alike.

Shapes: B groups of a batch, N rows of a group, R rows, Q queries, P passages, S sequence length,
D dimensions.
"""

from __future__ import annotations

import dataclasses
import types

from ernie.config import ErnieConfig
from ernie.tasks.dual_encoder import QUERY, RIGHT, DualEncoderProcessor, RetrievalLoss
from ernie.tasks.encoder import EncoderModel
from ernie.tasks.models import TaskModel
from ernie.tasks.ranking_model import encode_groups, real_rows
from propeller.paddle import losses
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode


class DualEncoderModel(TaskModel):
    """An encoder that learns to bring queries and their right passages together.

    It learns from groups, `input_ids` `[B, N, S]`: a query with its passages. All other passages of the batch
    count as wrong ones, but for those that are right for a query of the same text, and those of the same text
    as a right one. With several ranks or micro-batches each tells its right passages from those that it has
    itself, which are fewer.
    """

    processor: DualEncoderProcessor

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: DualEncoderProcessor,
    ):
        self.settings = processor.embedding
        if self.settings.encode_layer != "pooler":
            depth = int(self.settings.encode_layer.removeprefix("layer"))
            config = dataclasses.replace(config, num_hidden_layers=depth)
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.axis_limits = {"seq_len": self.settings.max_seqlen}
        self.objective = RetrievalLoss.of(hparams)

    def forward(self, features: Tensors) -> Tensors:
        """Returns `embeddings`, float32 `[R, D]`; of groups those of their real rows."""
        input_ids = features["input_ids"]
        if input_ids.ndim == 2 and self.mode is not RunMode.EVAL:
            return {"embeddings": self._embed(input_ids, features["token_type_ids"])}
        pad_id = self.encoder.config.pad_token_id
        token_type_ids = features["token_type_ids"]
        return {"embeddings": encode_groups(self._embed, input_ids, token_type_ids, pad_id=pad_id)}

    def _embed(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        # By the very function of the encoder that is served, which reads `encoder` and `settings` alone.
        # Bound, or the export would not trace into it.
        embed = types.MethodType(EncoderModel.forward, self)
        outputs: Tensors = embed({"input_ids": input_ids, "token_type_ids": token_type_ids})
        return outputs["embeddings"]

    def loss(self, predictions: Tensors, labels: Tensors) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Summed over the right passages; the weight is their number. See `losses.contrastive`."""
        rows = real_rows(labels)
        queries, passages = (
            paddle.nonzero(chosen).reshape([-1])
            for chosen in (rows["label"] == QUERY, rows["label"] != QUERY)
        )
        asked = {name: paddle.gather(values, queries) for name, values in rows.items()}
        told = {name: paddle.gather(values, passages) for name, values in rows.items()}
        own, right = _relations(asked, told)
        embeddings = predictions["embeddings"].astype("float32")
        similarity = self.objective.scale * paddle.matmul(
            paddle.gather(embeddings, queries), paddle.gather(embeddings, passages), transpose_y=True
        )  # [Q, P]
        total, weight = losses.contrastive(similarity, own, ~right)
        if self.objective.symmetric:
            other, _ = losses.contrastive(similarity.t(), own.t(), ~right.t())
            total = (total + other) / 2
        return total, weight


def _relations(asked: Tensors, told: Tensors) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Which passages are a query's own right ones, and which are right for it at all: bool `[Q, P]` each."""
    is_right = told["label"] == RIGHT
    own = (asked["group"].unsqueeze(1) == told["group"]) & is_right
    named = (asked["query"].unsqueeze(1) == told["query"]) & is_right
    same = told["text"].unsqueeze(1) == told["text"]  # [P, P]
    right = paddle.matmul(named.astype("float32"), same.astype("float32")) > 0
    return own, right
