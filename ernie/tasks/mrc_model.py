"""The Paddle model of reading comprehension: where an answer begins and ends.

Shapes: B batch, S sequence length.
"""

from __future__ import annotations

from ernie.config import ErnieConfig
from ernie.layers import Linear
from ernie.tasks.models import TaskModel
from ernie.tasks.mrc import IGNORED, MrcProcessor
from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Tensors
from propeller.types import HParams, RunConfig, RunMode

F = paddle.nn.functional

# The logits of padding. Softmax turns it into an exact zero, and float16 has it.
_PADDING_LOGIT = -1e4


class MrcModel(TaskModel):
    """ERNIE with a linear layer over each token, which gives the logits of start and end.

    Source: Devlin et al. 2019 (BERT), section 4.2. The same weights give the losses of Transformers'
        `BertForQuestionAnswering`, unless a batch is padded: there padding counts in the softmax, with
        whatever its logits are; here it never does, so that no example depends on its neighbours.

    Raises:
        ConfigError: the encoder does not tell two texts apart.
    """

    def __init__(
        self,
        hparams: HParams,
        mode: RunMode,
        run_config: RunConfig,
        *,
        config: ErnieConfig,
        processor: MrcProcessor,
    ):
        if config.type_vocab_size < 2:
            raise ConfigError(
                f"The encoder has type_vocab_size {config.type_vocab_size}; reading comprehension needs 2, "
                "one for the question and one for the text."
            )
        super().__init__(hparams, mode, run_config, config=config, processor=processor)
        self.head = Linear(config.hidden_size, 2, config.initializer_range)

    def forward(self, features: Tensors) -> Tensors:
        """Gives the logits of each token, and which tokens an answer can be made of.

        Returns:
            `start_logits` and `end_logits`, float32 `[B, S]`, and `in_context`, int64 `[B, S]`: 1 for the
            tokens of the text without its `[SEP]`, else 0.
        """
        input_ids, token_type_ids = features["input_ids"], features["token_type_ids"]
        logits = self.head(self.encoder(input_ids, token_type_ids).sequence).astype("float32")  # [B, S, 2]
        # A text may say "[PAD]", and then that is a token like others.
        is_padding = (input_ids == self.encoder.config.pad_token_id) & (token_type_ids == 0)
        kept = 1 - is_padding.unsqueeze(-1).astype("float32")
        # Not `where`: it warns when a model is exported.
        start_logits, end_logits = (logits * kept + (1 - kept) * _PADDING_LOGIT).unbind(-1)
        # What another token of the second text follows: all of it but the last, its [SEP].
        follows = paddle.concat([token_type_ids[:, 1:], token_type_ids[:, :1] * 0], axis=1)
        return {
            "start_logits": start_logits,
            "end_logits": end_logits,
            "in_context": token_type_ids * follows,
        }

    def loss(self, predictions: Tensors, labels: Tensors) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The mean of both cross entropies, summed over the windows that count; the weight is how many."""
        starts, ends = labels["start_position"], labels["end_position"]
        total = F.cross_entropy(
            predictions["start_logits"], starts, ignore_index=IGNORED, reduction="sum"
        ) + F.cross_entropy(predictions["end_logits"], ends, ignore_index=IGNORED, reduction="sum")
        return total / 2, (starts != IGNORED).sum()
