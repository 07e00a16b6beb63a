"""The Paddle models of the tasks: encoder, head, loss, optimizer."""

from __future__ import annotations

from typing import ClassVar

from ernie.config import ErnieConfig
from ernie.modeling import ErnieModel
from ernie.tasks.processor import TextProcessor
from ernie.tasks.training import Training, layer_rates
from propeller.bundle import ArraySpec
from propeller.errors import ConfigError
from propeller.metrics import Metric
from propeller.paddle import optimization
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Model
from propeller.types import HParams, RunConfig, RunMode

# What of an encoder may change while a run goes on.
_PASSING = ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")


def encoder_inputs(config: ErnieConfig) -> tuple[ArraySpec, ...]:
    """What an encoder takes: int64 `[batch, seq_len]` each, with the ids that its tables have."""
    axes = ("batch", "seq_len")
    return (
        ArraySpec("input_ids", "int64", axes, config.pad_token_id, max_value=config.vocab_size - 1),
        ArraySpec("token_type_ids", "int64", axes, max_value=config.type_vocab_size - 1),
    )


class TaskModel(Model):
    """ERNIE under a head: what the models of all tasks share.

    A task's model sets `head`, under which all its own parameters are, and defines `forward` and `loss`.

    Args:
        hparams: see `Training`; they are checked when the model is made.
        mode, run_config: see `Model`.
        config: the encoder.
        processor: gives the labels' names, the metrics, and what must stay as it is in a resume.

    Raises:
        ConfigError: a hyper-parameter that cannot be used.
    """

    takes_r_drop: ClassVar[bool] = False
    """Whether `forward` runs a training batch twice where R-Drop is asked for."""

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: TextProcessor,
    ):
        super().__init__(hparams, mode, run_config)
        self.training_settings = training = Training.of(hparams)
        if training.r_drop and not self.takes_r_drop:
            raise ConfigError(f"r_drop is {training.r_drop}, but the task {processor.name!r} has no R-Drop.")
        if training.r_drop and not (config.hidden_dropout_prob or config.attention_probs_dropout_prob):
            raise ConfigError(
                f"r_drop is {training.r_drop}, but there is no dropout, so that both passes would be "
                "the same. Set hidden_dropout_prob or attention_probs_dropout_prob above 0, or r_drop to 0."
            )
        self.inputs = encoder_inputs(config)
        self.axis_limits = {"seq_len": config.max_position_embeddings}
        self.label_names = processor.label_names
        settings = {key: value for key, value in config.to_dict().items() if key not in _PASSING}
        self.identity = {**settings, **processor.identity}
        self.processor = processor
        self.encoder = ErnieModel(config)
        self.encoder.recompute = training.recompute

    def optimizer(self) -> paddle.optimizer.Optimizer:
        training = self.training_settings
        optimization.freeze(self, training.freeze)
        return optimization.adamw(
            self,
            learning_rate=training.learning_rate,
            max_steps=self.run_config.max_steps,
            warmup_proportion=training.warmup_proportion,
            schedule=training.lr_schedule,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            learning_rate_scale=layer_rates(training.layer_decay, self.encoder.config.num_hidden_layers),
        )

    def metrics(self) -> dict[str, Metric]:
        return self.processor.metrics()
