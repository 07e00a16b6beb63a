"""AdamW as BERT and ERNIE are fine-tuned: warm-up, decay, exclusions, clipping, frozen and slower parts.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", algorithm 2 (AdamW), and the
settings of Devlin et al., "BERT", appendix A.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Sequence

from propeller.errors import ConfigError, did_you_mean
from propeller.paddle.runtime import paddle

log = logging.getLogger("propeller")

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
    learning_rate_scale: Callable[[str], float] | None = None,
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
        learning_rate_scale: structured parameter name -> multiplier of the learning rate, weight decay
            included. It is kept with the parameter, as Paddle does; None leaves what is there (1, unless
            the layer's `ParamAttr` says otherwise).

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
    if learning_rate_scale is not None:
        _scale_learning_rates(model, learning_rate_scale)
    return paddle.optimizer.AdamW(
        learning_rate=paddle.optimizer.lr.LambdaDecay(learning_rate, factor),
        epsilon=1e-8,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        weight_decay=weight_decay,
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=None if max_grad_norm is None else paddle.nn.ClipGradByGlobalNorm(max_grad_norm),
    )


def _scale_learning_rates(model: paddle.nn.Layer, scale: Callable[[str], float]) -> None:
    """Not by parameter groups: Paddle would clip the norm of each group by itself."""
    scales = {name: scale(name) for name, p in model.named_parameters() if not p.stop_gradient}
    for name, value in scales.items():
        if not 0 < value < math.inf:
            raise ConfigError(
                f"The learning rate of {name} is scaled by {value}; expected a number above 0. To leave a "
                "parameter as it is, freeze it."
            )
    for name, parameter in model.named_parameters():
        if name in scales:
            parameter.optimize_attr["learning_rate"] = float(scales[name])


def freeze(model: paddle.nn.Layer, patterns: Sequence[str]) -> list[str]:
    """Keeps parameters as they are: they get no gradient, and an optimizer made later leaves them out.

    Args:
        model: the model.
        patterns: `fnmatch` patterns on structured names, such as `encoder.embeddings.*`.

    Returns:
        The names of the parameters that match, in the model's order.

    Raises:
        ConfigError: a pattern matches no parameter, or none is left to train; nothing was frozen then.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            raise ConfigError(
                f"No parameter matches {pattern!r}, which was to be frozen."
                f"{did_you_mean(pattern, [*parameters, *_branches(parameters)])} The model's parameters "
                f"begin with {', '.join(sorted({name.partition('.')[0] for name in parameters}))}."
            )
    frozen = [name for name in parameters if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if all(parameter.stop_gradient or name in frozen for name, parameter in parameters.items()):
        raise ConfigError(f"All parameters are frozen by {', '.join(patterns)}: nothing is left to train.")
    for name in frozen:
        parameters[name].stop_gradient = True
    if frozen:
        sizes = {name: math.prod(parameter.shape) for name, parameter in parameters.items()}
        share = sum(sizes[name] for name in frozen) / sum(sizes.values())
        log.info("frozen: %d of %d parameters, %.1f %% of the weights", len(frozen), len(sizes), 100 * share)
    return frozen


def _branches(names: Iterable[str]) -> set[str]:
    """Patterns that would match: `a.*` and `a.b.*` for `a.b.c`."""
    parts = (name.split(".") for name in names)
    return {".".join(part[:depth]) + ".*" for part in parts for depth in range(1, len(part))}
