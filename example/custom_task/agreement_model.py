"""The network of the task: a linear layer over the pooled output, as a share."""

from __future__ import annotations

from ernie.config import ErnieConfig
from ernie.tasks.models import TaskModel
from ernie.tasks.processor import TextProcessor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode


class AgreementModel(TaskModel):
    """ERNIE or BERT, and what is new under `head`."""

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: TextProcessor,
    ):
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.head = paddle.nn.Linear(config.hidden_size, 1)

    def forward(self, features: Tensors) -> Tensors:
        """Returns `share`, float32 `[batch]`."""
        pooled = self.encoder(features["input_ids"], features["token_type_ids"]).pooled
        return {"share": paddle.nn.functional.sigmoid(self.head(pooled).squeeze(-1))}

    def loss(self, predictions: Tensors, labels: paddle.Tensor) -> tuple[paddle.Tensor, int]:
        """The sum over the examples, and what to divide it by."""
        return paddle.nn.functional.mse_loss(predictions["share"], labels, reduction="sum"), len(labels)
