"""First weights for a run that has no checkpoint yet."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.paddle

from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Model
from propeller.types import WarmStartSetting

log = logging.getLogger("propeller")

# Names of tensors in a line of the log; an encoder has hundreds.
_SHOWN = 5


def warm_start(model: Model, setting: WarmStartSetting) -> None:
    """Loads first weights and logs what was loaded, missing and left over.

    Raises:
        CheckpointError: a tensor is missing or has another shape and is not named as new, or the
            source cannot be read; all are listed.
    """
    tensors = setting.source() if callable(setting.source) else _read_tensors(Path(setting.source))
    loaded: dict[str, Any] = {}
    new: list[str] = []
    problems: list[str] = []
    for name, own in model.state_dict().items():
        if setting.predicate is not None and not setting.predicate(name):
            continue
        source_name = setting.mapping.get(name, name)
        found = tensors.get(source_name)
        if found is not None and list(found.shape) == list(own.shape):
            tensor = found if isinstance(found, paddle.Tensor) else paddle.to_tensor(found)
            loaded[name] = tensor.astype(own.dtype)  # a source may be half as precise
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in setting.new):
            new.append(name)
        elif found is None:
            problems.append(f"missing: {source_name}")
        else:
            problems.append(f"{name}: {list(found.shape)} where the model has {list(own.shape)}")
    unknown = sorted(set(setting.mapping) - set(model.state_dict()))
    if unknown:
        raise ConfigError(f"The warm start maps parameters the model does not have: {', '.join(unknown)}.")
    if problems:
        raise CheckpointError(
            f"Warm start failed: {'; '.join(problems)}. Is the source a model of the same kind, and do the "
            "hyper-parameters fit it? In code, WarmStartSetting(new=...) names what is meant to be new, such "
            "as a classifier head."
        )
    model.set_state_dict({**model.state_dict(), **loaded})  # all names, else Paddle warns of each new one
    left = sorted(set(tensors) - {setting.mapping.get(name, name) for name in loaded})
    log.info(
        "warm start: %d tensors loaded: %s; new: %s; left over: %s",
        len(loaded),
        *(_some(names) for names in (list(loaded), new, left)),
    )
    log.debug("warm start: all tensors loaded: %s; new: %s; left over: %s", list(loaded), new, left)


def _some(names: Sequence[str]) -> str:
    if len(names) > _SHOWN:
        return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more, all named at log level DEBUG"
    return ", ".join(names) or "none"


def _read_tensors(path: Path) -> Mapping[str, Any]:
    """Reads `path`, or the one `.safetensors` file of a checkpoint, export or model folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        tensors: Mapping[str, Any] = safetensors.paddle.load_file(str(file))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}.") from error
    return tensors
