"""The Paddle models of the tasks: encoder, head, loss, optimizer."""

from __future__ import annotations

from typing import Any

from ernie.config import ErnieConfig
from ernie.modeling import ClassificationHead, ErnieModel
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.training import Training
from propeller.bundle import ArraySpec
from propeller.metrics import Metric
from propeller.paddle import optimization
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Model, Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional


class ClassificationModel(Model):
    """ERNIE with a linear layer over the pooled output; cross entropy, or squared error for one label.

    Args:
        hparams: see `Training`.
        mode, run_config: see `Model`.
        config: the encoder.
        processor: gives the number of labels and the metrics.
    """

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: ClassificationProcessor,
    ):
        super().__init__(hparams, mode, run_config)
        self.inputs = (
            ArraySpec("input_ids", "int64", ("batch", "seq_len"), pad_value=config.pad_token_id),
            ArraySpec("token_type_ids", "int64", ("batch", "seq_len")),
        )
        self.axis_limits = {"seq_len": config.max_position_embeddings}
        self.encoder = ErnieModel(config)
        self.head = ClassificationHead(config, processor.num_outputs)
        self._processor = processor

    def forward(self, features: Tensors) -> Tensors:
        """Returns `logits`, float32 `[batch, labels]`."""
        encoded = self.encoder(features["input_ids"], features["token_type_ids"])
        return {"logits": self.head(encoded.pooled)}

    def loss(self, predictions: Tensors, labels: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        """Summed over the examples; the weight is their number."""
        logits = predictions["logits"]
        if self._processor.labels is None:
            total = F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        else:
            total = F.cross_entropy(logits, labels, reduction="sum")
        return total, len(labels)

    def optimizer(self) -> paddle.optimizer.Optimizer:
        training = Training.of(self.hparams)
        return optimization.adamw(
            self,
            learning_rate=training.learning_rate,
            max_steps=self.run_config.max_steps,
            warmup_proportion=training.warmup_proportion,
            schedule=training.lr_schedule,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
        )

    def metrics(self) -> dict[str, Metric]:
        return self._processor.metrics()
