"""How the models of the tasks are trained, as hyper-parameters name it; no Paddle."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

from propeller.errors import ConfigError
from propeller.types import HParamsGroup

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Training(HParamsGroup):
    """How the models here are trained, as hyper-parameters name it.

    Parameters go by their structured names: `encoder.embeddings.word.weight`, `encoder.layers.0.*`,
    `encoder.pooler.*`, `head.*`.

    Attributes:
        learning_rate: the peak of the schedule.
        warmup_proportion: share of `max_steps` with linear warm-up.
        lr_schedule: `linear`, `cosine` or `constant`.
        weight_decay: of all weights but biases and layer norms.
        max_grad_norm: gradients are clipped to this global norm; None leaves them as they are.
        layer_decay: multiplies the learning rate once for each layer further down, see `layer_rates`; 1
            is the same rate everywhere.
        freeze: patterns (`fnmatch`) of parameters that are not trained; one may stand without a list.
        r_drop: weight alpha of R-Drop, see `ClassificationModel.loss`; 0 is off.
        recompute: whether the encoder's layers compute their activations again in the backward pass
            instead of holding them, see `ErnieModel.recompute`.
        fgm_epsilon: length of the adversarial step on the parameters that `fgm_pattern` names; 0 is off.
        fgm_pattern: pattern (`fnmatch`) of the parameters that the adversarial step moves.

    Raises:
        ConfigError: a value that cannot be used.
    """

    learning_rate: float = 5e-5
    warmup_proportion: float = 0.1
    lr_schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    r_drop: float = 0.0
    recompute: bool = False
    fgm_epsilon: float = 0.0
    fgm_pattern: str = "encoder.embeddings.word.weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"layer_decay must be above 0 and at most 1, got {self.layer_decay}. To leave the lower "
                "layers as they are, freeze them."
            )
        for name in ("r_drop", "fgm_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 (off) or above, got {getattr(self, name)}.")


def layer_rates(decay: float, num_layers: int) -> Callable[[str], float]:
    """Returns structured parameter name -> multiplier of the learning rate, by the depth of its layer.

    What stands above the layers (the pooler and the heads) has 1, layer `i` of L (from 0, at the bottom)
    `decay ** (L - i)`, the embeddings `decay ** (L + 1)`.

    Source: the convention of ERNIE's fine-tuning in PaddleNLP (`layerwise_lr_decay`). ELECTRA's code (Clark
        et al. 2020) has one factor more, `decay ** (L - i + 1)`, wherever it is not 1.

    Args:
        decay: factor for each layer further down.
        num_layers: L.
    """

    def rate(name: str) -> float:
        layer = _LAYER.search(name)
        if layer:
            return decay ** (num_layers - int(layer[1]))
        return decay ** (num_layers + 1) if "embeddings." in name else 1.0

    return rate
