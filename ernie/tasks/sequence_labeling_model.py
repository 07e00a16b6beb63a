"""The Paddle model of sequence labelling: a linear layer over every token, and a CRF over that if asked for.

Shapes: B rows, S tokens, L labels; U units of the row that has most of them.
"""

from __future__ import annotations

from typing import Any

from ernie.config import ErnieConfig
from ernie.crf import CrfSettings
from ernie.layers import Dropout, Linear
from ernie.tasks.models import TaskModel, encoder_inputs
from ernie.tasks.sequence_labeling import NO_LABEL, SequenceLabelingProcessor
from propeller.bundle import ArraySpec
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional


class TokenHead(paddle.nn.Layer):
    """Dropout and a linear layer over each token.

    Args:
        config: the encoder's.
        num_labels: columns of the output.
    """

    def __init__(self, config: ErnieConfig, num_labels: int):
        super().__init__()
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, num_labels, config.initializer_range)

    def forward(self, sequence: paddle.Tensor) -> paddle.Tensor:
        """`[B, S, H]` -> logits, float32 `[B, S, L]`."""
        return self.classifier(self.dropout(sequence)).astype("float32")


class CrfHead(TokenHead):
    """The same with the tables of a linear-chain CRF; see `ernie.crf`.

    They begin at zero, where the CRF gives each label the probability that it has without one.

    Attributes:
        transitions: `[L, L]`, from and to.
        start, end: `[L]`.
    """

    def __init__(self, config: ErnieConfig, num_labels: int):
        super().__init__(config, num_labels)
        zero = paddle.nn.initializer.Constant(0.0)
        self.transitions = self.create_parameter([num_labels, num_labels], default_initializer=zero)
        self.start = self.create_parameter([num_labels], default_initializer=zero)
        self.end = self.create_parameter([num_labels], default_initializer=zero)

    def tables(self) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """Transitions, start and end."""
        return self.transitions, self.start, self.end

    def loss(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """The negative log-likelihood of the rows' paths, summed.

        Args:
            logits: float32 `[B, S, L]`.
            labels: int64 `[B, S]`, -100 where no unit begins: those tokens are skipped.
        """
        is_unit = labels != NO_LABEL
        counts = is_unit.astype("int64").sum(axis=1)
        most = int(counts.amax().item())
        if most == 0:
            return (logits * 0).sum()
        size = labels.shape[1]
        first = paddle.arange(size) + size * (~is_unit).astype("int64")  # units first, in their order
        places = paddle.argsort(first, axis=1)[:, :most]
        inside = paddle.arange(most) < counts.unsqueeze(1)  # [B, U]
        units = paddle.take_along_axis(logits, places.unsqueeze(-1), axis=1)  # [B, U, L]
        path = paddle.where(inside, paddle.take_along_axis(labels, places, axis=1), paddle.zeros_like(places))
        losses = self._log_partition(units, inside) - self._path_scores(units, inside, path)
        return (losses * inside[:, 0].astype(losses.dtype)).sum()

    def _log_partition(self, units: paddle.Tensor, inside: paddle.Tensor) -> paddle.Tensor:
        """Logarithm of the sum over all paths: `[B, U, L]` -> `[B]`."""
        reached = self.start + units[:, 0]  # [B, L], of all paths that end in each label
        for step in range(1, units.shape[1]):
            onwards = paddle.logsumexp(reached.unsqueeze(2) + self.transitions, axis=1) + units[:, step]
            reached = paddle.where(inside[:, step : step + 1], onwards, reached)
        return paddle.logsumexp(reached + self.end, axis=1)

    def _path_scores(self, units: paddle.Tensor, inside: paddle.Tensor, path: paddle.Tensor) -> paddle.Tensor:
        """Scores of the given paths, int64 `[B, U]` -> `[B]`."""
        weights = inside.astype(units.dtype)
        emitted = paddle.take_along_axis(units, path.unsqueeze(-1), axis=2).squeeze(-1)
        score = self.start[path[:, 0]] + (emitted * weights).sum(axis=1)
        steps = path[:, :-1] * units.shape[2] + path[:, 1:]
        score += (paddle.take(self.transitions, steps) * weights[:, 1:]).sum(axis=1)
        last = (inside.astype("int64").sum(axis=1, keepdim=True) - 1).clip(min=0)
        return score + self.end[paddle.take_along_axis(path, last, axis=1).squeeze(1)]


class SequenceLabelingModel(TaskModel):
    """ERNIE with a linear layer over each token; cross entropy of the units, or the likelihood of a CRF.

    Args:
        hparams: see `Training` and `CrfSettings`.
        mode, run_config, config, processor: see `TaskModel`.

    Raises:
        ConfigError: a hyper-parameter that cannot be used.
    """

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: SequenceLabelingProcessor,
    ):
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.crf_settings = CrfSettings.of(hparams)
        self.identity = {**self.identity, "use_crf": self.crf_settings.use_crf}
        self.head: TokenHead
        if self.crf_settings.use_crf:
            self.inputs = (*encoder_inputs(config), ArraySpec("units", "int64", ("batch", "seq_len"), -1))
            self.head = CrfHead(config, len(processor.labels))
        else:
            self.head = TokenHead(config, len(processor.labels))

    def forward(self, features: Tensors) -> Tensors:
        """Gives what `SequenceLabelingProcessor.finish` takes.

        Returns:
            `logits`, float32 `[B, S, L]`; with a CRF, but not in training, also `is_unit`, int64 `[B, S]`: 1
            where a unit begins, and `transitions`, float32 `[B, L + 2, L]`: its tables, the same in each row.
        """
        logits = self.head(self.encoder(features["input_ids"], features["token_type_ids"]).sequence)
        if self.mode is RunMode.TRAIN or not isinstance(self.head, CrfHead):
            return {"logits": logits}
        transitions, start, end = self.head.tables()
        table = paddle.concat([transitions, start.unsqueeze(0), end.unsqueeze(0)])
        return {
            "logits": logits,
            "is_unit": (features["units"] >= 0).astype("int64"),
            "transitions": table.unsqueeze(0).expand([logits.shape[0], -1, -1]),
        }

    def loss(self, predictions: Tensors, labels: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        """Summed over the units; the weight is their number, with a CRF too, so that both have one scale."""
        logits, weight = predictions["logits"], (labels != NO_LABEL).astype("int64").sum()
        if isinstance(self.head, CrfHead):
            return self.head.loss(logits, labels), weight
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum"), weight

    def optimizer(self) -> paddle.optimizer.Optimizer:
        optimizer = super().optimizer()
        if isinstance(self.head, CrfHead):
            scale = self.crf_settings.crf_learning_rate / self.training_settings.learning_rate
            for table in self.head.tables():
                table.optimize_attr["learning_rate"] = scale
        return optimizer
