"""The network of a ranker: an ERNIE or BERT encoder that reads query and candidate together.

Shapes: B groups of a batch, N rows of a group, R rows, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ernie.config import ErnieConfig
from ernie.modeling import ClassificationHead
from ernie.tasks.groups import PADDING
from ernie.tasks.models import TaskModel
from ernie.tasks.ranking import RankingLoss, RankingProcessor
from propeller.paddle import losses
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional

# Rows of groups that go through the encoder together: few enough to be of like length.
_ROWS_TOGETHER = 32


class RankingModel(TaskModel):
    """ERNIE with a linear layer over the pooled output: two logits point-wise, else a score.

    Pair-wise and list-wise it learns from groups, `input_ids` `[B, N, S]`, and is evaluated on rows of whole
    groups; see `ernie.tasks.groups`. Point-wise rows may come in any order.
    """

    processor: RankingProcessor

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: RankingProcessor,
    ):
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.objective = RankingLoss.of(hparams)
        if processor.loss != "pointwise":
            self.label_names = ("label", "group")
        self.head = ClassificationHead(config, processor.num_outputs)

    def forward(self, features: Tensors) -> Tensors:
        """Returns `logits`, float32 `[R, 2]` point-wise, else `[R, 1]`; of groups for their real rows."""
        input_ids, token_type_ids = features["input_ids"], features["token_type_ids"]
        if input_ids.ndim == 2 and self.mode is not RunMode.EVAL:
            return {"logits": self._logits(input_ids, token_type_ids)}
        pad_id = self.encoder.config.pad_token_id
        return {"logits": encode_groups(self._logits, input_ids, token_type_ids, pad_id=pad_id)}

    def _logits(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.encoder(input_ids, token_type_ids).pooled)

    def loss(self, predictions: Tensors, labels: Any) -> tuple[paddle.Tensor, Any]:
        """Summed over rows, pairs or queries, as the loss is; the weight is their number."""
        logits = predictions["logits"]
        if self.processor.loss == "pointwise":
            return F.cross_entropy(logits, (labels > 0).astype("int64"), reduction="sum"), len(labels)
        real = real_rows(labels)
        scores, grades, groups = logits.squeeze(1), real["label"], real["group"]
        if self.processor.loss == "listwise":
            return losses.listwise(scores, grades, groups)
        margin = self.objective.margin if self.objective.pair_loss == "hinge" else None
        return losses.pairwise(scores, grades, groups, margin=margin)


def encode_groups(
    encode: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor],
    input_ids: paddle.Tensor,
    token_type_ids: paddle.Tensor,
    *,
    pad_id: int,
) -> paddle.Tensor:
    """Encodes the rows of groups that are no padding, a few of like length at a time.

    Args:
        encode: `[rows, length]` twice -> `[rows, ...]`.
        input_ids, token_type_ids: int64 `[B, N, S]`; a row that only fills up its group is all `pad_id`. Or
            rows, `[R, S]`.
        pad_id: what rows are filled up with.

    Returns:
        What `encode` gives, for the real rows in their order, group after group: `[R, ...]`.
    """
    flat_ids, flat_types = (ids.reshape([-1, input_ids.shape[-1]]) for ids in (input_ids, token_type_ids))
    places = paddle.arange(1, flat_ids.shape[1] + 1, dtype="int64")
    lengths = ((flat_ids != pad_id).astype("int64") * places).amax(axis=1).numpy()
    order = sorted(lengths.nonzero()[0].tolist(), key=lambda row: (lengths[row], row))
    parts = []
    for start in range(0, len(order), _ROWS_TOGETHER):
        rows = order[start : start + _ROWS_TOGETHER]
        index, longest = paddle.to_tensor(rows), int(lengths[rows[-1]])
        parts.append(encode(flat_ids[index, :longest], flat_types[index, :longest]))
    rank = {row: place for place, row in enumerate(order)}
    back = paddle.to_tensor([rank[row] for row in sorted(order)])
    return paddle.gather(paddle.concat(parts), back)


def real_rows(labels: Tensors) -> Tensors:
    """Labels by name, of rows `[R]` or groups `[B, N]`, for the rows that are no padding: `[R]` each."""
    flat = {name: values.reshape([-1]) for name, values in labels.items()}
    index = paddle.nonzero(flat["label"] != PADDING).reshape([-1])
    return {name: paddle.gather(values, index) for name, values in flat.items()}
