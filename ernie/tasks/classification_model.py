"""The classification model: a linear layer over the encoder's pooled output, and its losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie.config import ErnieConfig
from ernie.modeling import ClassificationHead
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.models import TaskModel
from propeller.errors import ConfigError
from propeller.paddle import losses
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional


class ClassificationModel(TaskModel):
    """ERNIE with a linear layer over the pooled output.

    Its loss is the cross entropy; the squared error for a regression; where an example may have any number of
    labels, the sum of their binary cross entropies over the number of labels.

    Args:
        hparams, mode, run_config, config, processor: see `TaskModel`. Besides its hyper-parameters
            `class_weights`, numbers by label id as `classification_labels.class_weights` gives them: what the
            loss of an example of each label weighs, and with it the example; where there may be any number,
            what that of each label weighs where the example has it.

    Raises:
        ConfigError: a hyper-parameter that cannot be used.
    """

    takes_r_drop = True
    processor: ClassificationProcessor

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: ClassificationProcessor,
    ):
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.head = ClassificationHead(config, processor.num_outputs)
        self._weights = _label_weights(hparams.get("class_weights"), processor)

    def forward(self, features: Tensors) -> Tensors:
        """Returns `logits`, float32 `[batch, labels]`, and in training with R-Drop `second_logits`."""
        input_ids, token_type_ids = features["input_ids"], features["token_type_ids"]
        if self.mode is not RunMode.TRAIN or not self.training_settings.r_drop:
            return {"logits": self._logits(input_ids, token_type_ids)}
        # Both passes as one batch of twice the rows: dropout differs from row to row.
        twice = (paddle.concat([ids, ids]) for ids in (input_ids, token_type_ids))
        logits, rows = self._logits(*twice), len(input_ids)
        return {"logits": logits[:rows], "second_logits": logits[rows:]}

    def _logits(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.encoder(input_ids, token_type_ids).pooled)

    def loss(self, predictions: Tensors, labels: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        """Summed over the examples; the weight is their number, or the sum of their class weights.

        With R-Drop it is `(NLL1 + NLL2 + alpha * KL) / 2`, where the indices are those of the two passes and
        KL is `losses.r_drop`: half of the paper's objective, so that alpha is the paper's and the sum
        has the size of a plain loss. Where code has `(NLL1 + NLL2) / 2 + alpha * KL`, such as PaddleNLP's
        `rdrop_coef`, its alpha is half of this one.
        """
        logits = predictions["logits"]
        weights = self._example_weights(labels)
        total = self._example_losses(logits, labels)
        weight = len(labels) if weights is None else weights.sum()
        if "second_logits" in predictions:
            second = predictions["second_logits"]
            # As if each example had the mean weight, so that alpha means the same with class weights.
            apart = self._apart(logits, second) * (weight / len(labels))
            total = (total + self._example_losses(second, labels) + self.training_settings.r_drop * apart) / 2
        return total, weight

    def _example_weights(self, labels: paddle.Tensor) -> paddle.Tensor | None:
        """Float32 `[batch]`; None where all are 1."""
        if self._weights is None or self.processor.multi_label:
            return None
        return self._weights[labels]

    def _example_losses(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """Their sum."""
        if self.processor.labels is None:
            return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        if self.processor.multi_label:
            total = F.binary_cross_entropy_with_logits(
                logits, labels, pos_weight=self._weights, reduction="sum"
            )
            return total / self.processor.num_outputs
        return F.cross_entropy(logits, labels, weight=self._weights, reduction="sum")

    def _apart(self, first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
        """How far both passes are apart, in the terms of the loss."""
        if not self.processor.multi_label:
            return losses.r_drop(first, second, regression=self.processor.labels is None)
        # Each label is a choice of two, to have it or not.
        pairs = (paddle.stack([paddle.zeros_like(logits), logits], axis=-1) for logits in (first, second))
        return losses.r_drop(*pairs) / self.processor.num_outputs


def _label_weights(given: Any, processor: ClassificationProcessor) -> paddle.Tensor | None:
    """Float32 `[labels]`."""
    if given is None:
        return None
    numbers = isinstance(given, list | tuple) and all(type(item) in (int, float) for item in given)
    if processor.labels is None or not numbers or len(given) != processor.num_outputs:
        raise ConfigError(
            f"class_weights must be a number for each of the {len(processor.labels or ())} labels, got "
            f"{given!r:.200}."
        )
    return paddle.to_tensor(np.asarray(given, np.float32))
