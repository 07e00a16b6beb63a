"""The plain values that travel through training: modes, configuration, hyper-parameters, run state."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from propeller.errors import NEAR_MISS, ConfigError, did_you_mean


class RunMode(enum.Enum):
    """What a model is run for."""

    TRAIN = "train"
    EVAL = "eval"
    PREDICT = "predict"


_POSITIVE = (
    "max_steps",
    "run_steps",
    "save_steps",
    "eval_steps",
    "eval_max_steps",
    "log_steps",
    "max_ckpt",
    "micro_batches",
)
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run goes on: where it writes, how long it trains, how often it evaluates and saves.

    A step is a completed optimizer update. Change one with `dataclasses.replace`.

    Attributes:
        model_dir: folder of checkpoints, metrics and exports.
        max_steps: the run ends after this step, and the schedule is laid out over it.
        run_steps: at most so many steps in this session; the schedule stays that of `max_steps`.
        save_steps: a checkpoint every so many steps, and always at the last one.
        eval_steps: an evaluation every so many steps, and always at the last one.
        eval_max_steps: at most so many batches in an evaluation; None takes all.
        log_steps: a log line every so many steps.
        skip_steps: no evaluation and no checkpoint before this step.
        max_ckpt: keep the newest so many checkpoints (two complete ones are always kept).
        seed: every random choice of a run follows from it; below 2**32.
        device: any device Paddle knows (`cpu`, `gpu`, `gpu:1`, `xpu`, ...); None takes the best.
        micro_batches: each rank works through its rows of a batch in so many parts, one after the other,
            which takes less memory and gives the same update.
        precision: `fp32`, or `fp16` or `bf16` on a GPU that has it (the weights stay float32).
        ema_decay: evaluate and export an exponential moving average of the weights, such as 0.999; None
            takes the weights.
        check_numerics: look for NaN and infinity after every operation and name the one that made it;
            training takes twice as long.
        profile: write where the time goes to `model_dir/profile/`: a table, and a trace for Chrome.

    Raises:
        ConfigError: a value has the wrong type or range.
    """

    model_dir: str = "output"
    max_steps: int | None = None
    run_steps: int | None = None
    save_steps: int = 1000
    eval_steps: int = 1000
    eval_max_steps: int | None = None
    log_steps: int = 100
    skip_steps: int = 0
    max_ckpt: int = 3
    seed: int = 0
    device: str | None = None
    micro_batches: int = 1
    precision: str = "fp32"
    ema_decay: float | None = None
    check_numerics: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"RunConfig.{name} must be at least 1, got {value}.")
        for name in ("skip_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"RunConfig.{name} must not be negative, got {getattr(self, name)}.")
        if self.seed >= 2**32:  # the seed of a step is made of it and 32 bits more
            raise ConfigError(f"RunConfig.seed must be below 2**32, got {self.seed}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"RunConfig.precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}."
            )
        if self.check_numerics and self.precision == "fp16":
            raise ConfigError("RunConfig.check_numerics ends a run at the overflows that fp16 lives with.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(f"RunConfig.ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        if not self.model_dir:
            raise ConfigError("RunConfig.model_dir must name a folder, got an empty string.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Builds one from parsed JSON.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"Unknown run_config key {key!r}.{did_you_mean(str(key), known)} "
                    f"Known keys: {', '.join(known)}."
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as JSON can hold them."""
        return dataclasses.asdict(self)


def _checked(name: str, annotation: str, value: Any) -> Any:
    """Returns `value` if it fits the annotation of its field; 1e4 is taken for the int it means."""
    kinds = annotation.split(" | ")
    if value is None and "None" in kinds:
        return None
    if "int" in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    if "float" in kinds and type(value) is int:
        return float(value)
    if "bool" in kinds and value in (0, 1):  # the older scripts write 0 and 1
        return bool(value)
    expected = next(kind for kind in (int, float, bool, str) if kind.__name__ in kinds)
    if isinstance(value, Path) and expected is str:
        return str(value)
    if type(value) is not expected:
        raise ConfigError(
            f"RunConfig.{name} must be {annotation.replace(' | None', ' or null')}, "
            f"got {value!r} ({type(value).__name__})."
        )
    return value


class HParams(Mapping[str, Any]):
    """Read-only hyper-parameters: `hparams['batch_size']`, `hparams.batch_size`, `hparams.get(...)`.

    Takes any key, for they are the user's; the task that reads them calls `check`.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None, **more: Any):
        object.__setattr__(self, "_values", {**(values or {}), **more})

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise KeyError(f"no hyper-parameter {key!r}.{did_you_mean(key, self._values)}") from None

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        try:
            return self._values[key]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {key!r}.{did_you_mean(key, self._values)}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("HParams are read-only; use join() to get changed ones.")

    def __reduce__(self) -> tuple[type[HParams], tuple[dict[str, Any]]]:
        return type(self), (dict(self._values),)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"HParams({self._values!r})"

    def join(self, *others: Mapping[str, Any]) -> HParams:
        """Returns new hyper-parameters in which later ones win."""
        joined = dict(self._values)
        for other in others:
            joined.update(other)
        return HParams(joined)

    def check(self, known: Iterable[str]) -> list[str]:
        """Names what the task that reads `known` will not use.

        Returns:
            The keys that are not in `known`, sorted.

        Raises:
            ConfigError: such a key looks like a typing slip of a known one.
        """
        known = set(known)
        unused = sorted(key for key in self._values if key not in known)
        for key in unused:
            near = did_you_mean(key, known, NEAR_MISS)
            if near:
                raise ConfigError(f"Unknown hyper-parameter {key!r}.{near}")
        return unused


_Group = TypeVar("_Group", bound="HParamsGroup")


@dataclasses.dataclass(frozen=True)
class HParamsGroup:
    """Hyper-parameters that are read together: the fields of a frozen dataclass with this base.

    A field is a `bool`, a `float` or a `str`, perhaps `| None`, or a `tuple[str, ...]`, of which one text may
    stand alone.

    Raises:
        ConfigError: a value of another type.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _as_field(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def keys(cls) -> list[str]:
        """The hyper-parameters read here."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls: type[_Group], hparams: HParams) -> _Group:
        """Takes what is given, and the defaults for the rest.

        Raises:
            ConfigError: a value that cannot be used.
        """
        return cls(**{key: hparams[key] for key in cls.keys() if key in hparams})

    def check_above_0(self, *names: str) -> None:
        """Checks the range of numbers.

        Raises:
            ConfigError: one is 0 or below, or no finite number.
        """
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 0, got {value!r}.")


def as_switch(name: str, value: Any) -> bool:
    """Returns a hyper-parameter that is on or off; the older scripts write 0 and 1.

    Raises:
        ConfigError: it is something else.
    """
    if value not in (True, False):  # 0 and 1 are equal to these
        raise ConfigError(f"{name} must be true or false, got {value!r}.")
    return bool(value)


def _as_field(name: str, annotation: str, value: Any) -> Any:
    """Returns a hyper-parameter in the type of its field."""
    if annotation == "bool":
        return as_switch(name, value)
    if annotation.startswith("tuple"):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(type(text) is str for text in texts):
            raise ConfigError(f"{name} must be text or a list of texts, got {value!r}.")
        return tuple(texts)
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("str"):
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be text, got {value!r}.")
    elif type(value) not in (int, float):
        raise ConfigError(f"{name} must be a number, got {value!r}.")
    return value


@dataclasses.dataclass(frozen=True)
class RunState:
    """How far a run has come. Read-only: the loop replaces it step by step.

    Attributes:
        step: completed optimizer updates.
        epoch: the pass over the data that the last batch belonged to, from 0.
        examples: examples seen in training.
        tokens: tokens seen in training, padding left out.
        evaluation_due: the evaluation or the export of this step did not come to its end.
    """

    step: int = 0
    epoch: int = 0
    examples: int = 0
    tokens: int = 0
    evaluation_due: bool = False


@dataclasses.dataclass(frozen=True)
class WarmStartSetting:
    """Where a new run takes its first weights from. A resume wins over it.

    Attributes:
        source: a folder or `.safetensors` file, or a function that returns `{name: array}`; it is
            called only when the run really starts anew.
        predicate: which parameters of the model to load, by name; None loads all.
        mapping: parameter name in the model -> tensor name in the source, where they differ.
        new: patterns (`fnmatch`) of parameters that may be missing or of another shape in the
            source, such as a classifier head.
    """

    source: str | Path | Callable[[], Mapping[str, Any]]
    predicate: Callable[[str], bool] | None = None
    mapping: Mapping[str, str] = dataclasses.field(default_factory=dict)
    new: tuple[str, ...] = ()
