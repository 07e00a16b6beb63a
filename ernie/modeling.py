"""The ERNIE 1.0/2.0 and BERT encoder.

A transformer encoder whose layer norms come after each residual sum ("post-norm").

Source: Devlin et al. 2019 (BERT), Sun et al. 2019 (ERNIE 1.0, 2.0); Vaswani et al. 2017, section 3. The
    same weights give the outputs of Transformers' `BertModel` and `ErnieModel`.

Shapes: B batch, S sequence length, H hidden size, N attention heads, D = H / N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ernie.config import ErnieConfig
from ernie.layers import Dropout, LayerNorm, Linear, gelu, merge_heads, split_heads, truncated_normal
from ernie.pretrained import load_pretrained_state, match_weights, save_pretrained_state
from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle

if TYPE_CHECKING:
    from ernie.tokenizing import Tokenizer

F = paddle.nn.functional

# Added to the scores of masked keys. Softmax turns it into an exact zero in float32 and float16, and,
# unlike minus infinity, a row without any key left stays a number.
_MASKED_SCORE = -1e4

_ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: F.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate=True),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": F.tanh,
}


class ErnieOutput(NamedTuple):
    """What an `ErnieModel` returns.

    Attributes:
        sequence: float `[B, S, H]`, the last layer.
        pooled: float `[B, H]`, tanh of a linear layer over the first token.
    """

    sequence: paddle.Tensor
    pooled: paddle.Tensor


class ErnieStates(NamedTuple):
    """What it returns with `output_hidden`.

    Attributes:
        sequence, pooled: as in `ErnieOutput`.
        hidden: the embeddings and the output of each layer, float `[B, S, H]` each.
    """

    sequence: paddle.Tensor
    pooled: paddle.Tensor
    hidden: tuple[paddle.Tensor, ...]


class Embeddings(paddle.nn.Layer):
    """Sum of the word, position, sentence-type and (ERNIE 2.0) task-type tables, normed."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.config = config
        self.word = _table(config, config.vocab_size)
        self.position = _table(config, config.max_position_embeddings)
        self.token_type = _table(config, config.type_vocab_size)
        self.task_type = _table(config, config.task_type_vocab_size) if config.use_task_id else None
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: paddle.Tensor,
        token_type_ids: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        task_type_ids: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Ids `[B, S]` -> `[B, S, H]`."""
        if position_ids is None:
            position_ids = paddle.arange(input_ids.shape[1], dtype="int64").unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = paddle.zeros([1, 1], "int64")
        x = self.word(input_ids) + (self.position(position_ids) + self.token_type(token_type_ids))
        if self.task_type is not None:
            if task_type_ids is None:
                task_type_ids = paddle.full([1, 1], self.config.task_id, "int64")
            x = x + self.task_type(task_type_ids)
        return self.dropout(self.norm(x))


class SelfAttention(paddle.nn.Layer):
    """Multi-head self-attention with its residual sum and norm.

    Query, key and value are one matrix product; its columns are all queries, all keys, all values.
    """

    def __init__(self, config: ErnieConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_size = size // config.num_attention_heads
        self.qkv = Linear(size, 3 * size, config.initializer_range)
        self.probs_dropout = Dropout(config.attention_probs_dropout_prob)
        self.output = Linear(size, size, config.initializer_range)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.norm = LayerNorm(size, config.layer_norm_eps)

    def forward(self, x: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        """Attends over the keys.

        Args:
            x: `[B, S, H]`.
            bias: `[B, 1 or N, 1 or S, S]`, added to the scores.

        Returns:
            `[B, S, H]`.
        """
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)  # [B, N, S, D]
        query = query * (1 / math.sqrt(self.head_size))
        scores = paddle.matmul(query, key, transpose_y=True) + bias  # [B, N, S, S]
        probs = self.probs_dropout(F.softmax(scores))
        context = merge_heads(paddle.matmul(probs, value))  # [B, S, H]
        return self.norm(x + self.dropout(self.output(context)))


class FeedForward(paddle.nn.Layer):
    """Two linear layers with an activation between, their residual sum and norm."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size, config.initializer_range)
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.down = Linear(config.intermediate_size, config.hidden_size, config.initializer_range)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """`[B, S, H]` -> `[B, S, H]`."""
        return self.norm(x + self.dropout(self.down(self.activation(self.up(x)))))


class EncoderLayer(paddle.nn.Layer):
    """One transformer layer: attention, then feed-forward."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.ffn = FeedForward(config)

    def forward(self, x: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        """`[B, S, H]` and the attention's bias -> `[B, S, H]`."""
        return self.ffn(self.attention(x, bias))


class ErnieModel(paddle.nn.Layer):
    """ERNIE or BERT encoder without a head.

    Args:
        config: sizes and settings; see `ErnieConfig`.

    Attributes:
        recompute: in training a layer then holds on to its input alone and computes the rest once more
            in the backward pass: less memory for about a third more time, the same gradients to the bit.
    """

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.embeddings = Embeddings(config)
        self.layers = paddle.nn.LayerList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = Linear(config.hidden_size, config.hidden_size, config.initializer_range)

    def forward(
        self,
        input_ids: paddle.Tensor,
        token_type_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        task_type_ids: paddle.Tensor | None = None,
        output_hidden: bool = False,
    ) -> ErnieOutput | ErnieStates:
        """Encodes a batch. Ids outside their tables are not found out here: Paddle does not check them.

        Args:
            input_ids: int64 `[B, S]`.
            token_type_ids: int64 `[B, S]`, which sentence a token belongs to; None means all 0.
            attention_mask: `[B, S]` of any number type, 1 where a token may be looked at, else 0; None
                means wherever `input_ids` is not `pad_token_id`.
            position_ids: int64 `[B, S]`; None counts from 0.
            task_type_ids: int64 `[B, S]`; None means the configuration's `task_id`. They count only
                with `use_task_id`.
            output_hidden: whether the hidden states are wanted.

        Returns:
            An `ErnieOutput`, with `output_hidden` an `ErnieStates`.

        Raises:
            ConfigError: an input is not `[B, S]`, or longer than the position table (checked in eager
                mode; a static graph does not know its shapes).
        """
        if paddle.in_dynamic_mode():
            self._check_shapes(input_ids, token_type_ids, attention_mask, position_ids, task_type_ids)
        bias = self._attention_bias(input_ids, attention_mask)
        x = self.embeddings(input_ids, token_type_ids, position_ids, task_type_ids)
        hidden = [x]
        for layer in self.layers:
            x = self._run_layer(layer, x, bias)
            if output_hidden:  # otherwise prediction need not hold on to them
                hidden.append(x)
        pooled = F.tanh(self.pooler(x[:, 0]))
        return ErnieStates(x, pooled, tuple(hidden)) if output_hidden else ErnieOutput(x, pooled)

    def _run_layer(self, layer: EncoderLayer, x: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        if not (self.recompute and self.training and paddle.in_dynamic_mode()) or x.stop_gradient:
            return layer(x, bias)
        # The reentrant form runs without gradients at first, in which `Dropout` draws another mask than in
        # its second run, and it passes no gradient to a layer whose input needs none.
        return paddle.distributed.fleet.utils.recompute(layer, x, bias, use_reentrant=False)

    def _check_shapes(self, input_ids: paddle.Tensor, *others: paddle.Tensor | None) -> None:
        shape = list(input_ids.shape)
        if len(shape) != 2:
            raise ConfigError(f"input_ids must be [batch_size, seq_len], got shape {shape}.")
        for other in others:
            if other is not None and list(other.shape) != shape:
                raise ConfigError(
                    f"input_ids has shape {shape}, but an input beside it has {list(other.shape)}; "
                    "token_type_ids, attention_mask, position_ids and task_type_ids must be alike."
                )
        limit = self.config.max_position_embeddings
        if shape[1] > limit:
            raise ConfigError(
                f"The input is {shape[1]} tokens long, but the model has positions for {limit} "
                "(max_position_embeddings): truncate it, for instance by --max_seqlen."
            )

    def _attention_bias(
        self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor | None
    ) -> paddle.Tensor:
        """0 for keys that may be looked at, else `_MASKED_SCORE`: `[B, 1 or N, 1 or S, S]`."""
        if attention_mask is None:
            masked = (input_ids == self.config.pad_token_id).astype(self.pooler.weight.dtype)
        else:
            masked = 1 - attention_mask.astype(self.pooler.weight.dtype)
        bias = (masked * _MASKED_SCORE).unsqueeze([1, 2])
        if paddle.in_dynamic_mode() and bias.place.is_cpu_place():
            # Paddle's CPU kernel adds equal shapes 15 times as fast as it broadcasts these.
            bias = bias.tile([1, self.config.num_attention_heads, input_ids.shape[1], 1])
        return bias

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, new: Iterable[str] = ()) -> ErnieModel:
        """Makes the model that a folder describes, with its weights, in evaluation mode.

        Which tensors of the folder the model has no place for is logged.

        Args:
            folder: see `load_pretrained_state`.
            new: patterns (`fnmatch`) of parameters that keep their new weights where the folder has none,
                or has them in another shape; for instance `"pooler.*"`.

        Raises:
            CheckpointError: a tensor is missing or has another shape and is not named as new, or the
                folder or a file in it cannot be read.
            ConfigError: a pattern of `new` names no parameter, or the folder's configuration cannot be
                used.
        """
        config, state = load_pretrained_state(folder)
        model = cls(config)
        parameters = model.state_dict()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        for name in match_weights(shapes, state, new=new):
            parameters[name].set_value(state[name])
        model.eval()
        return model

    def save_pretrained(self, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
        """Writes the project's own layout, which `from_pretrained` and `load_tokenizer` read.

        Args:
            folder: made if it is not there.
            tokenizer: the model's, saved with its settings; None leaves it out.
        """
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        state = {name: tensor.numpy() for name, tensor in self.state_dict().items()}
        save_pretrained_state(folder, self.config, state)


class ClassificationHead(paddle.nn.Layer):
    """Dropout and a linear layer over the pooled output; one label makes it a regression.

    Args:
        config: the encoder's.
        num_labels: columns of the output, at least 1.
    """

    def __init__(self, config: ErnieConfig, num_labels: int):
        super().__init__()
        if num_labels < 1:
            raise ConfigError(f"num_labels must be at least 1 (1 is a regression), got {num_labels}.")
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, num_labels, config.initializer_range)

    def forward(self, pooled: paddle.Tensor) -> paddle.Tensor:
        """`[B, H]` -> logits `[B, num_labels]`."""
        return self.classifier(self.dropout(pooled))


def _table(config: ErnieConfig, rows: int) -> paddle.nn.Embedding:
    initial = truncated_normal(config.initializer_range)
    return paddle.nn.Embedding(rows, config.hidden_size, weight_attr=initial)
