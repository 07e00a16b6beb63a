"""AdamW as BERT and ERNIE are fine-tuned: warm-up, decay, exclusions, clipping.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", algorithm 2 (AdamW), and the
settings of Devlin et al., "BERT", appendix A.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence

from propeller.errors import ConfigError, did_you_mean
from propeller.paddle.runtime import paddle

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}

NO_DECAY = ("*bias", "*norm*")


def warmup_decay(schedule: str, *, max_steps: int | None, warmup_steps: int) -> Callable[[int], float]:
    """Returns step -> share of the peak learning rate: linear warm-up from 0, then decay to `max_steps`.

    Args:
        schedule: `linear` (to 0), `cosine` (half a wave, to 0) or `constant`.
        max_steps: the last step; may be None for `constant`.
        warmup_steps: steps of warm-up.

    Raises:
        ConfigError: an unknown schedule, or one that needs `max_steps` without it.
    """
    if schedule not in _SCHEDULES:
        raise ConfigError(
            f"Unknown schedule {schedule!r}.{did_you_mean(schedule, _SCHEDULES)} "
            f"Known: {', '.join(_SCHEDULES)}."
        )
    if max_steps is None and schedule != "constant":
        raise ConfigError(f"The {schedule} schedule is laid out over max_steps, which is not set.")
    decay = _SCHEDULES[schedule]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if max_steps is None:
            return 1.0
        return decay(min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps)))

    return factor


def adamw(
    model: paddle.nn.Layer,
    *,
    learning_rate: float,
    max_steps: int | None,
    warmup_proportion: float = 0.0,
    schedule: str = "linear",
    weight_decay: float = 0.01,
    no_decay: Sequence[str] = NO_DECAY,
    max_grad_norm: float | None = 1.0,
) -> paddle.optimizer.AdamW:
    """Builds AdamW (betas 0.9 and 0.999, epsilon 1e-8) over a model's trainable parameters.

    Args:
        model: the model.
        learning_rate: the peak.
        max_steps: the step at which the schedule ends.
        warmup_proportion: share of `max_steps` for linear warm-up.
        schedule: `linear`, `cosine` or `constant`.
        weight_decay: decoupled weight decay.
        no_decay: patterns (`fnmatch`, on lower-cased structured names) of parameters without it.
        max_grad_norm: clip the global norm of the gradients; None does not.

    Raises:
        ConfigError: a value out of range.
    """
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate must be positive, got {learning_rate}.")
    if not 0 <= warmup_proportion <= 1:
        raise ConfigError(f"warmup_proportion must be between 0 and 1, got {warmup_proportion}.")
    if weight_decay < 0:
        raise ConfigError(f"weight_decay must not be negative, got {weight_decay}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigError(f"max_grad_norm must be positive, or None not to clip, got {max_grad_norm}.")
    if warmup_proportion and max_steps is None:
        raise ConfigError("warmup_proportion is a share of max_steps, which is not set.")
    factor = warmup_decay(
        schedule, max_steps=max_steps, warmup_steps=int((max_steps or 0) * warmup_proportion)
    )
    # Paddle asks by its own parameter name (linear_0.w_0), not by the structured one.
    decayed = {
        parameter.name
        for name, parameter in model.named_parameters()
        if not any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in no_decay)
    }
    return paddle.optimizer.AdamW(
        learning_rate=paddle.optimizer.lr.LambdaDecay(learning_rate, factor),
        epsilon=1e-8,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        weight_decay=weight_decay,
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=None if max_grad_norm is None else paddle.nn.ClipGradByGlobalNorm(max_grad_norm),
    )
