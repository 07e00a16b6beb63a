"""How the models of the tasks are trained, as hyper-parameters name it; no Paddle."""

from __future__ import annotations

import dataclasses

from propeller.errors import ConfigError
from propeller.types import HParams


@dataclasses.dataclass(frozen=True)
class Training:
    """How the models here are trained, as hyper-parameters name it.

    Attributes:
        learning_rate: the peak of the schedule.
        warmup_proportion: share of `max_steps` with linear warm-up.
        lr_schedule: `linear`, `cosine` or `constant`.
        weight_decay: of all weights but biases and layer norms.
        max_grad_norm: gradients are clipped to this global norm; None leaves them as they are.
    """

    learning_rate: float = 5e-5
    warmup_proportion: float = 0.1
    lr_schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    @classmethod
    def keys(cls) -> list[str]:
        """The hyper-parameters read here."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls, hparams: HParams) -> Training:
        """Takes what is given, and the defaults for the rest.

        Raises:
            ConfigError: a value of the wrong type.
        """
        given = {key: hparams[key] for key in cls.keys() if key in hparams}
        for key, value in given.items():
            expected = "text" if key == "lr_schedule" else "a number"
            fits = type(value) in ((str,) if key == "lr_schedule" else (int, float))
            if not fits and not (key == "max_grad_norm" and value is None):
                raise ConfigError(f"{key} must be {expected}, got {value!r}.")
        return cls(**given)
